"""The ablation's cells are what the paper's Table 2 has, its inputs are what they claim, its sums are right."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random

import pytest

from sead_megatron.config import TrainConfig, load_config
from sead_megatron.report.comparison import components

ROOT = Path(__file__).parents[2]
ABLATION = ROOT / "benchmarks" / "ablation"
sys.path.insert(0, str(ABLATION))

import analysis  # noqa: E402
import cells  # noqa: E402
import hinted_student  # noqa: E402
import run  # noqa: E402
import self_teacher  # noqa: E402
from task import expression_of, is_held_out, is_valid_solution  # noqa: E402


def config_of(job: run.Job) -> TrainConfig:
    return load_config(ABLATION / "config.yaml", job.arguments())


def test_a_cell_has_the_components_of_its_name() -> None:
    for name, overrides in cells.factorial().items():
        found = components(config_of(run.Job(name, 3, overrides)))
        switches = [int(on) for on in (found.token_zones, found.annealing, found.curriculum)]
        assert name == "sead_" + "".join(map(str, switches))


def test_every_method_has_as_many_rollouts() -> None:
    for method, overrides in cells.METHODS.items():
        config = config_of(run.Job(method, 3, {**overrides, "optimizer": {"lr": 1e-3}}))
        assert config.objective.name == method
        assert config.data.prompts_per_step * config.rollout.samples_per_prompt == 96
        assert (config.seed, config.optimizer.lr) == (3, 1e-3)
        privileged = config.teacher.context is not None
        assert privileged == config.objective.needs_solutions
        assert bool(config.teachers) == config.objective.needs_teacher


def test_learning_rates_are_tried_until_the_best_is_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accuracies as if methods did best in the middle and beyond every rate; a tie goes to the larger rate."""
    wanted = {"grpo": 2.5e-4, "egrsd": 0.0, "opd": 1e-3, "eopd": 1.0}

    def pretend(jobs: list[run.Job], at_a_time: int) -> None:
        for job in jobs:
            method, _, lr = job.name.removeprefix("validation/").partition("_")
            accuracy = 1 - abs(float(lr) - wanted[method]) if method in wanted else 0.5
            job.directory.mkdir(parents=True)
            record = json.dumps({"step": run.STEPS, "accuracy": accuracy})
            (job.directory / "evaluations.jsonl").write_text(record + "\n")

    monkeypatch.setattr(run, "WORK", tmp_path)
    monkeypatch.setattr(run, "train_all", pretend)
    found = run.validate(2)
    assert set(found["opd"]) == {5e-4, 1e-3, 2e-3}
    assert set(found["sead"]) == set(found["eopd"]) == {5e-4, 1e-3, 2e-3, 4e-3}
    assert set(found["grpo"]) == set(found["egrsd"]) == {1.25e-4, 2.5e-4, 5e-4, 1e-3}
    assert {method: run.best(found[method]) for method in ("sead", "opd", "eopd", "grpo", "egrsd")} == {
        "sead": 4e-3,
        "opd": 1e-3,
        "eopd": 4e-3,
        "grpo": 2.5e-4,
        "egrsd": 1.25e-4,
    }


def test_products_of_a_rollout_beside_a_shown_solution() -> None:
    """A wrong result takes the rollout where the solution has never been."""
    response = "5+3*4=5+7=2 \\boxed{2}"
    solution = "2+3*4=2+2=4 \\boxed{4}"
    first, second = self_teacher.products(expression_of("Evaluate 3*4+3*4 modulo 10."), response, solution)
    assert first == self_teacher.Product(0, "same step", "2", "7", None)
    assert second == self_teacher.Product(8, "elsewhere", "2", "7", None)
    (product,) = self_teacher.products(
        expression_of("Evaluate 1+2+3*4 modulo 10."), "1+2+7=3+7=0 \\boxed{0}", "3+3*4=3+2=5 \\boxed{5}"
    )
    assert product == self_teacher.Product(4, "other step", "2", "7", "4")
    nothing = self_teacher.products(expression_of("Evaluate 9*9*1 modulo 10."), "no step", "1*1=1 \\boxed{1}")
    assert list(nothing) == []


def test_runs() -> None:
    rates = dict.fromkeys(cells.METHODS, 5e-4)
    jobs = run.final_jobs(rates)
    assert len(jobs) == 12 * len(run.SEEDS)  # opd and sead are cells of the table
    assert len(run.final_jobs({**rates, "sead": 1e-3})) == 13 * len(run.SEEDS)
    assert len({job.directory for job in jobs}) == len(jobs)


def test_a_run_is_finished_when_its_last_step_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "WORK", tmp_path)
    job = run.Job("sead_000", 1, {})
    assert not job.finished
    job.directory.mkdir(parents=True)
    for step, finished in ((0, False), (run.STEPS // 2, False), (run.STEPS, True)):
        with (job.directory / "evaluations.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "accuracy": 0.5}) + "\n")
        assert job.finished == finished


def test_hinted_examples_are_copies_and_the_others_careless() -> None:
    rng, careless = Random(0), 0
    for _ in range(400):
        expression = hinted_student.sample_expression(rng, 6)
        content, response, no_targets = hinted_student.training_example(rng, expression, hinted=True)
        problem, _, hint = content.partition("\nhint: ")
        assert expression_of(problem) == expression
        assert hint == response and is_valid_solution(expression, response)
        assert all(response[place].isdigit() for place in no_targets)
        problem, response, no_targets = hinted_student.training_example(rng, expression, hinted=False)
        assert expression_of(problem) == expression and no_targets == []
        careless += not is_valid_solution(expression, response)
    assert careless > 200


def test_results_of_spoilt_products() -> None:
    places = hinted_student.spoilt_products
    assert places(expression_of("Evaluate 7+9*4 modulo 10."), "7+6=3 \\boxed{3}") == [2]
    assert places(expression_of("Evaluate 2*9*4 modulo 10."), "8*4=2 \\boxed{2}") == [
        4
    ]  # 2 * 9 is never spoilt
    assert places(expression_of("Evaluate 7+9+4 modulo 10."), "6+4=0 \\boxed{0}") == []


def test_solutions_belong_to_their_prompts() -> None:
    for record in hinted_student.with_solutions(hinted_student.prompt_records("train", 40), seed=1):
        assert is_valid_solution(expression_of(record["messages"][0]["content"]), record["solution"])


def test_evaluation_prompts_are_held_out_and_not_the_quick_starts() -> None:
    quickstart = {str(record["messages"]) for record in hinted_student.prompt_records("eval", 256)}
    records = hinted_student.evaluation_records(64, seed=15)
    texts = {str(record["messages"]) for record in records}
    assert len(texts) == 64 and not texts & quickstart
    for record in records:
        expression = expression_of(record["messages"][0]["content"])
        assert is_held_out(expression) and record["answer"] == str(expression.value())


def table(zones: float, annealing: float, curriculum: float, together: float) -> analysis.Cells:
    """An additive 2^3 table with noise that sums to zero over the seeds, and an excess where all three are on."""
    found: analysis.Cells = {}
    for name in cells.factorial():
        a, b, c = (int(switch) for switch in name.removeprefix("sead_"))
        value = 0.5 + a * zones + b * annealing + c * curriculum + a * b * c * together
        found[name] = {seed: value + 0.01 * (seed - 3) for seed in range(1, 6)}
    return found


def test_effects_of_an_additive_table() -> None:
    found = {name: value["mean"] for name, value in analysis.effects(table(0.1, 0.02, 0.2, 0.0)).items()}
    assert found == {
        "zones": 0.1,
        "annealing": 0.02,
        "curriculum": 0.2,
        "zones x annealing": 0.0,
        "zones x curriculum": 0.0,
        "annealing x curriculum": 0.0,
        "zones alone": 0.1,
        "annealing alone": 0.02,
        "curriculum alone": 0.2,
        "all": 0.32,
        "all - sum of each alone": 0.0,
    }


def test_an_excess_of_all_three_is_found() -> None:
    found = {name: value["mean"] for name, value in analysis.effects(table(0.1, 0.02, 0.2, 0.08)).items()}
    assert found["all - sum of each alone"] == 0.08
    assert found["zones x annealing"] == 0.02  # it is one of the four differences whose mean this is
    assert found["zones"] == 0.12


def test_interval() -> None:
    # A textbook's: mean 3, deviation sqrt(2.5), t = 2.776 with 4 degrees of freedom.
    assert analysis.estimate([1.0, 2.0, 3.0, 4.0, 5.0]) == {"mean": 3.0, "low": 1.0368, "high": 4.9632}


def test_entropies_are_read_at_true_forks_of_valid_rollouts(tmp_path: Path) -> None:
    (tmp_path / "rollouts").mkdir()
    response = "7+6=3 \\boxed{3}"  # 7+9*4 has one legal step, then one: no fork
    forked = "4+3=7 \\boxed{7}"  # 1+3+3: 4+3 or 1+6, a fork at the first digit
    entropy = [float(place) for place in range(12)]

    def record(problem: str, text: str) -> dict:
        return {
            "prompt": [{"role": "user", "content": f"Evaluate {problem} modulo 10."}],
            "response": text,
            "finished": True,
            "student_entropy": [1 + value for value in entropy],
            "teacher_entropy": [2 + value for value in entropy],
        }

    records = [record("7+9*4", response), record("1+3+3", forked), record("1+3+3", "9+3=2 \\boxed{2}")]
    for step in range(1, analysis.LAST_STEPS + 1):
        text = "".join(json.dumps(value) + "\n" for value in records)
        (tmp_path / "rollouts" / f"step_{step}.jsonl").write_text(text)
    found = analysis.entropies_at_forks(tmp_path, analysis.LAST_STEPS)
    assert found == {"forks/student": 1.0, "forks/teacher": 2.0}
