"""examples/smollm2: the configuration loads, the problems are well-formed and their answers right."""

import json
from pathlib import Path

import pytest

from sead_megatron.config.load import load_config
from sead_megatron.evaluation.grading import grade

EXAMPLE = Path(__file__).parents[2] / "examples/smollm2"
# Worked independently of the files, in their order.
ANSWERS = {
    "prompts": [39, 370, 360, 58, 55, 5, 78, 36, 24, 65, 17, 420, 66, 91, 2, 38],
    "evaluation": [13, 24, 5, 5, 36, 25, 100, 20],
}


def rows(name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (EXAMPLE / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", list(ANSWERS))
def test_problems(name: str) -> None:
    assert [int(str(row["answer"])) for row in rows(name)] == ANSWERS[name]
    for row in rows(name):
        assert isinstance(row["messages"], list)
        (message,) = row["messages"]
        assert message["role"] == "user" and message["content"].startswith("Solve the following math problem")
        assert "\\boxed{}" in message["content"] and row["domain"]
        assert grade(f"\\boxed{{{row['answer']}}}", str(row["answer"]))


def test_nothing_held_out_is_trained_on() -> None:
    every = [*rows("prompts"), *rows("evaluation")]
    assert len({str(row["id"]) for row in every}) == len({str(row["messages"]) for row in every}) == 24


def test_configuration() -> None:
    config = load_config(EXAMPLE / "config.yaml")
    root = EXAMPLE.parents[1]
    assert (config.device, config.precision.student, config.objective.name) == ("cpu", "float32", "sead")
    assert (root / config.data.prompts).is_file() and (root / str(config.evaluation.prompts)).is_file()
    assert len(rows("prompts")) % config.data.prompts_per_step == 0
