"""The quick start's task, tokenizer, data files and tiny models are what its README says they are."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from random import Random
from types import ModuleType

import pytest

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"


def load(name: str) -> ModuleType:
    """Import a script of the example, which is no package, under its plain name."""
    spec = importlib.util.spec_from_file_location(name, QUICKSTART / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there, and train_pair imports the other two
    spec.loader.exec_module(module)
    return module


task = load("task")
chat_tokenizer = load("chat_tokenizer")


def records(name: str) -> list[dict]:
    return [json.loads(line) for line in (QUICKSTART / name).read_text().splitlines()]


def contents(name: str) -> list[str]:
    return [record["messages"][0]["content"] for record in records(name)]


@pytest.mark.parametrize(
    ("text", "value", "legal", "successors"),
    [
        ("3*8+2+9", 5, [0, 2], ["4+2+9", "3*8+1"]),  # 2+9 is free, 8+2 is not: the 8 belongs to a product
        ("2+3*4", 4, [1], ["2+2"]),
        ("2*3*4+5*6", 4, [0, 1, 3], ["6*4+5*6", "2*2+5*6", "2*3*4+0"]),
        ("7", 7, [], []),
    ],
)
def test_reductions_by_hand(text: str, value: int, legal: list[int], successors: list[str]) -> None:
    expression = task.Expression.parse(text)
    assert expression.value() == value
    assert expression.legal_reductions() == legal
    assert [str(expression.reduce(i)) for i in legal] == successors


@pytest.mark.parametrize("operands", range(3, 7))
def test_every_step_keeps_the_value_that_python_computes(operands: int) -> None:
    rng = Random(operands)
    for _ in range(200):
        expression = task.sample_expression(rng, operands)
        response = task.solve(expression, rng)
        chain, boxed = response.split(" ")
        values = {eval(step) % 10 for step in [str(expression), *chain.split("=")]}
        assert values == {expression.value()} == {int(boxed.removeprefix("\\boxed{").removesuffix("}"))}
        assert [len(step) for step in chain.split("=")] == list(range(2 * operands - 3, 0, -2))
        assert task.is_valid_solution(expression, response)


@pytest.mark.parametrize(
    "response",
    [
        "1+5=5 \\boxed{5}",  # 1 + 5 is 6
        "4+3=6 \\boxed{6}",  # two errors that cancel: the right answer for no good reason
        "6 \\boxed{6}",  # a step is missing
        "1+5=6 \\boxed{5}",  # the box holds something else
        "1+5=6",  # no box
        "1+5 \\boxed{6}",  # not finished
    ],
)
def test_invalid_solutions_are_refused(response: str) -> None:
    expression = task.Expression.parse("1+2+3")
    assert task.is_valid_solution(expression, "1+5=6 \\boxed{6}")
    assert not task.is_valid_solution(expression, response)


def test_all_orders_occur_equally_often() -> None:
    """1+2+3+4 has 3 * 2 orders, all with different texts; 4 standard deviations of 6000 draws are 115."""
    expression = task.Expression.parse("1+2+3+4")
    for solver in (task.solve, lambda *arguments: task.solve_carelessly(*arguments, 0.5)):
        rng = Random(0)
        counts = Counter(solver(expression, rng) for _ in range(6000))
        assert len(counts) == 6
        assert all(abs(count - 1000) < 115 for count in counts.values())


@pytest.mark.parametrize(
    ("text", "response", "forks"),
    [
        ("1+2+3", "3+3=6 \\boxed{6}", [0]),
        # First step: 3+3+4, 1+5+4 or 1+2+7: the first digit and, after "1+", the second. Second step: 6 or 1.
        ("1+2+3+4", "1+5+4=6+4=0 \\boxed{0}", [0, 2, 6]),
        ("2+3*4", "2+2=4 \\boxed{4}", []),
        ("3*5*3", "5*3=5 \\boxed{5}", [0]),
        ("5*5*5", "5*5=5 \\boxed{5}", []),  # both orders read the same
    ],
)
def test_forks_by_hand(text: str, response: str, forks: list[int]) -> None:
    assert task.fork_positions(task.Expression.parse(text), response) == forks


@pytest.mark.parametrize(
    ("text", "step", "offset"),
    [
        ("1+2+3", "3+3", None),
        ("1+2+3", "1+5", None),
        ("1+2+3", "4+3", 0),
        ("1+2+3", "1+3", 2),  # 1 begins 1+5
        ("1+2+3", "3*3", 1),
        ("1+2+3+4", "3+3", 3),  # the step ends where "+4" had to follow
    ],
)
def test_where_a_slip_is_noticed(text: str, step: str, offset: int | None) -> None:
    assert task._first_illegal_offset(task.Expression.parse(text), step) == offset


def test_after_a_slip_the_solution_goes_on_from_what_was_written() -> None:
    rng = Random(5)
    slipped = 0
    for _ in range(500):
        expression = task.sample_expression(rng, 5)
        response, slips = task.solve_with_slips(expression, rng, 0.3)
        assert task.is_valid_solution(expression, response) == (not slips)
        slipped += bool(slips)
        start = 0
        for step in response.partition(" ")[0].split("="):
            offset = task._first_illegal_offset(expression, step)
            assert (start + offset in slips) if offset is not None else step in _successors(expression)
            expression = task.Expression.parse(step)
            start += len(step) + 1
        assert response.endswith(f" \\boxed{{{expression}}}")
    assert 250 < slipped < 400  # 1 - 0.7^4 = 76 %, less the slips that happen to write a legal step


def _successors(expression: object) -> set[str]:
    return {str(expression.reduce(i)) for i in expression.legal_reductions()}  # type: ignore[attr-defined]


def test_carelessness_adds_large_factors() -> None:
    rng = Random(6)
    product = task.Expression.parse("3*4")
    assert task.solve_carelessly(product, rng, 1.0) == "7 \\boxed{7}"
    assert task.solve_carelessly(product, rng, 0.0) == "2 \\boxed{2}"
    assert task.solve_carelessly(task.Expression.parse("2*4"), rng, 1.0) == "8 \\boxed{8}"
    careless = sum(task.solve_carelessly(product, rng, 0.6).startswith("7") for _ in range(2000))
    assert abs(careless - 1200) < 4 * 22  # four standard deviations of a binomial


def test_forks_of_an_invalid_solution_are_an_error() -> None:
    with pytest.raises(ValueError, match="not a valid solution"):
        task.fork_positions(task.Expression.parse("1+2+3"), "4+3=7 \\boxed{7}")


def test_math_verify_grades_responses() -> None:
    math_verify = pytest.importorskip("math_verify")
    rng = Random(3)
    for record in records("prompts_eval.jsonl")[:64]:
        gold = math_verify.parse(record["answer"])
        response = task.solve(task.expression_of(record["messages"][0]["content"]), rng)
        wrong = (int(record["answer"]) + 1 + rng.randrange(9)) % 10
        chain = response.partition(" ")[0]
        assert math_verify.verify(gold, math_verify.parse(response))
        assert not math_verify.verify(gold, math_verify.parse(f"{chain} \\boxed{{{wrong}}}"))


def test_tokenizer_round_trip() -> None:
    from transformers import AutoTokenizer

    for folder in (QUICKSTART, QUICKSTART / "teacher", QUICKSTART / "student"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert (len(tokenizer), tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == (
            67,
            "<pad>",
            "<s>",
            "</s>",
        )
        rng = Random(0)
        for _ in range(50):
            response = task.solve(task.sample_expression(rng, 6), rng)
            ids = tokenizer(response).input_ids
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == response
            assert len(ids) == len(response) - len("boxed")  # one token a character, `\boxed` is a single one
    messages = [{"role": "user", "content": "Evaluate 1+2 modulo 10."}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<s><|user|>Evaluate 1+2 modulo 10.<|assistant|>"
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.convert_ids_to_tokens(ids) == [
        *("<s>", "<|user|>", "Evaluate", " ", "1", "+", "2", " modulo", " ", "1", "0", ".", "<|assistant|>")
    ]


def test_tokenizer_files_are_what_the_script_writes(tmp_path: Path) -> None:
    chat_tokenizer.build_tokenizer(256).save_pretrained(tmp_path)
    for folder in (QUICKSTART, QUICKSTART / "teacher", QUICKSTART / "student"):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            written = json.loads((tmp_path / name).read_text())
            assert json.loads((folder / name).read_text()) == written
        assert (folder / "chat_template.jinja").read_text() == (tmp_path / "chat_template.jinja").read_text()


def test_prompt_files_are_what_the_generator_writes() -> None:
    train = records("prompts_train.jsonl")
    assert len(train) == task.TRAIN_PROMPTS
    assert train[:500] == task.prompt_records("train", 500)
    assert records("prompts_eval.jsonl") == task.prompt_records("eval", task.EVAL_PROMPTS)


def test_training_never_meets_an_evaluation_prompt() -> None:
    train, evaluation = contents("prompts_train.jsonl"), contents("prompts_eval.jsonl")
    assert len(set(train)) == len(train) and len(set(evaluation)) == len(evaluation) == 256
    assert not set(train) & set(evaluation)
    assert all(task.is_held_out(task.expression_of(prompt)) for prompt in evaluation)
    rng = Random(11)
    drawn = [task.sample_expression(rng, 3) for _ in range(3000)]
    assert not any(task.is_held_out(expression) for expression in drawn)


def test_answers_and_difficulties() -> None:
    train = records("prompts_train.jsonl")
    for record in train + records("prompts_eval.jsonl"):
        expression = task.expression_of(record["messages"][0]["content"])
        assert record["answer"] == str(eval(str(expression)) % 10)
    provenance, *rows = records("difficulty.jsonl")
    assert provenance["provenance"]["rollouts_per_prompt"] == 8
    assert [row["id"] for row in rows] == [record["id"] for record in train]
    assert all(row["difficulty"] * 8 in range(9) for row in rows)
    by_operands: dict[int, list[float]] = {}
    for row, record in zip(rows, train, strict=True):
        operands = len(task.expression_of(record["messages"][0]["content"]).digits)
        by_operands.setdefault(operands, []).append(row["difficulty"])
    means = [sum(values) / len(values) for _, values in sorted(by_operands.items())]
    # Longer is harder: a curriculum has something to sort.
    assert means == sorted(means) and means[-1] - means[0] > 0.3


def test_committed_files_stay_small() -> None:
    caches = {"__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"}
    files = [path for path in QUICKSTART.rglob("*") if path.is_file() and not caches & set(path.parts)]
    assert max(path.stat().st_size for path in files) <= 5_000_000
    assert sum(path.stat().st_size for path in files) <= 14_000_000


def test_teacher_is_right_and_unsure_only_at_forks_and_student_is_neither() -> None:
    """64 of the 256 held-out prompts; recipe.json has the numbers of all."""
    import torch
    from transformers import AutoModelForCausalLM

    train_pair = load("train_pair")
    tokenizer = chat_tokenizer.build_tokenizer(256)
    held_out = records("prompts_eval.jsonl")[:64]
    measured = {}
    for name in ("teacher", "student"):
        model = AutoModelForCausalLM.from_pretrained(QUICKSTART / name, dtype=torch.float32).eval()
        accuracy = train_pair.accuracy_by_operands(model, tokenizer, held_out)["all"]
        measured[name] = (accuracy, train_pair.entropy_at_forks(model, tokenizer, held_out))
        assert model.config.tie_word_embeddings == (name == "student")
    (teacher_accuracy, teacher_entropy), (student_accuracy, _) = measured["teacher"], measured["student"]
    assert teacher_accuracy >= 95 and 25 <= student_accuracy <= 55
    assert teacher_entropy["entropy_at_forks"] > 0.5 > 0.05 > teacher_entropy["entropy_elsewhere"]
