"""The ablation of SEAD and its comparison with other objectives, on two processor cores.

    python benchmarks/ablation/run.py [--jobs 2]

Makes its inputs (hinted student, prompts with solutions, difficulty), picks each method's learning rate on validation
prompts, trains every cell with every seed, and writes `benchmarks/results/ablation.json`. What is finished stays: the
same command goes on where it was stopped, runs included. Everything but the result is under `runs/ablation/`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from analysis import summarise  # noqa: E402
from cells import (  # noqa: E402
    LARGEST_LEARNING_RATE,
    LEARNING_RATES,
    METHODS,
    SMALLEST_LEARNING_RATE,
    Overrides,
    factorial,
)
from hinted_student import evaluation_records, make_hinted_student, with_solutions  # noqa: E402
from record_run import commit, machine  # noqa: E402
from self_teacher import examine  # noqa: E402
from task import prompt_records, write_jsonl  # noqa: E402

from sead_megatron.records import read_records  # noqa: E402

HERE = Path(__file__).parent
WORK = ROOT / "runs" / "ablation"
RESULT = ROOT / "benchmarks" / "results" / "ablation.json"
STEPS = yaml.safe_load((HERE / "config.yaml").read_text())["steps"]
SEEDS = (1, 2, 3, 4, 5)
VALIDATION_SEED = 100  # of the runs that choose the learning rates
TRAIN_PROMPTS, VALIDATION_PROMPTS, TEST_PROMPTS = 2880, 256, 512


@dataclass(frozen=True)
class Job:
    """One training run."""

    name: str
    seed: int
    overrides: Overrides

    @property
    def directory(self) -> Path:
        return WORK / self.name / f"seed_{self.seed}"

    @property
    def finished(self) -> bool:
        path = self.directory / "evaluations.jsonl"
        return path.exists() and any(row["step"] == STEPS for row in read_records(path))

    def arguments(self) -> list[str]:
        """Overrides in the command line's own form."""
        values = {"seed": self.seed, "run_dir": str(self.directory.relative_to(ROOT)), **self.overrides}
        return [f"{key}={json.dumps(value)}" for key, value in _flat(values)]


def _flat(values: Overrides, prefix: str = "") -> Iterable[tuple[str, object]]:
    """Dotted keys; an objective is replaced as a whole, since its fields depend on its name."""
    for key, value in values.items():
        if isinstance(value, dict) and value and key not in ("objective", "reference"):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def prepare() -> None:
    """Student, prompts and difficulty, unless they are there."""
    WORK.mkdir(parents=True, exist_ok=True)
    if not (WORK / "student" / "tokenizer.json").exists():
        make_hinted_student(WORK / "student")
    write_jsonl(WORK / "prompts_train.jsonl", with_solutions(prompt_records("train", TRAIN_PROMPTS), seed=14))
    write_jsonl(WORK / "prompts_test.jsonl", evaluation_records(TEST_PROMPTS, seed=15))
    write_jsonl(WORK / "prompts_validation.jsonl", evaluation_records(VALIDATION_PROMPTS, seed=16))
    difficulty = WORK / "difficulty.jsonl"
    config = str(HERE / "config.yaml")
    tool = [
        str(ROOT / "tools" / "estimate_difficulty.py"),
        config,
        str(difficulty),
        "--prompts-per-call",
        "960",
    ]
    _call("difficulty", [sys.executable, *tool, "run_dir=runs/ablation/difficulty", "seed=17"])


def _call(name: str, command: list[str]) -> None:
    """Run to the end with one thread; its output goes to a log, and is shown if it fails."""
    log = WORK / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("a") as output:
        code = subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, check=False
        ).returncode
    if code:
        raise SystemExit(f"{name} failed (exit code {code}):\n{log.read_text()[-4000:]}")


def train(job: Job) -> None:
    if not job.finished:
        command = [
            sys.executable,
            "-m",
            "sead_megatron",
            "train",
            str(HERE / "config.yaml"),
            *job.arguments(),
        ]
        _call(f"{job.name}_{job.seed}", command)
    accuracy = read_records(job.directory / "evaluations.jsonl")[-1]["accuracy"]
    print(f"{job.name:24} seed {job.seed}  accuracy {100 * accuracy:.1f} %", flush=True)


def train_all(jobs: list[Job], at_a_time: int) -> None:
    with ThreadPoolExecutor(at_a_time) as pool:
        list(pool.map(train, jobs))


def validation_job(method: str, lr: float) -> Job:
    """A run of a method that is evaluated on the validation prompts."""
    settings = {
        **METHODS[method],
        "optimizer": {"lr": lr},
        "evaluation": {"prompts": "runs/ablation/prompts_validation.jsonl", "every": STEPS},
    }
    return Job(f"validation/{method}_{lr:g}", VALIDATION_SEED, settings)


def validate(at_a_time: int) -> dict[str, dict[float, float]]:
    """Validation accuracy of each method at each learning rate, until neither the smallest nor the largest is best."""
    accuracies: dict[str, dict[float, float]] = {method: {} for method in METHODS}
    pending = [(method, lr) for method in METHODS for lr in LEARNING_RATES]
    while pending:
        jobs = [validation_job(method, lr) for method, lr in pending]
        train_all(jobs, at_a_time)
        for (method, lr), job in zip(pending, jobs, strict=True):
            accuracies[method][lr] = read_records(job.directory / "evaluations.jsonl")[-1]["accuracy"]
        untried = {method: untried_rate(rates) for method, rates in accuracies.items()}
        pending = [(method, lr) for method, lr in untried.items() if lr is not None]
    return accuracies


def untried_rate(accuracies: dict[float, float]) -> float | None:
    """The next learning rate beyond the best one, where that is the smallest or the largest so far."""
    chosen = best(accuracies)
    if chosen == min(accuracies) > SMALLEST_LEARNING_RATE:
        return chosen / 2
    if chosen == max(accuracies) < LARGEST_LEARNING_RATE:
        return chosen * 2
    return None


def best(accuracies: dict[float, float]) -> float:
    """The learning rate with the highest accuracy; of equal ones the largest."""
    return max(sorted(accuracies, reverse=True), key=accuracies.__getitem__)


def final_jobs(learning_rate: dict[str, float]) -> list[Job]:
    """All cells with all seeds. The table's eight share OPD's learning rate: only the components differ."""
    cells = {name: (overrides, learning_rate["opd"]) for name, overrides in factorial().items()}
    for method, overrides in METHODS.items():
        cells[method] = (overrides, learning_rate[method])
    del cells["opd"]  # the table has it, sead_000: the same loss
    if learning_rate["sead"] == learning_rate["opd"]:
        del cells["sead"]  # sead_111
    return [
        Job(name, seed, {**overrides, "optimizer": {"lr": lr}})
        for seed in SEEDS
        for name, (overrides, lr) in cells.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--jobs", type=int, default=2, help="runs at the same time, one core each (default 2)"
    )
    at_a_time = parser.parse_args().jobs
    prepare()
    accuracies = validate(at_a_time)
    learning_rate = {method: best(rates) for method, rates in accuracies.items()}
    print("learning rates:", learning_rate, flush=True)
    jobs = final_jobs(learning_rate)
    train_all(jobs, at_a_time)
    result = {
        "commit": commit(),
        "machine": machine(),
        "validation_accuracy": accuracies,
        "learning_rate": learning_rate,
        **summarise({(job.name, job.seed): job.directory for job in jobs}),
        "self_teacher": examine(WORK / "opsd", WORK / "student", WORK / "prompts_train.jsonl"),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {RESULT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
