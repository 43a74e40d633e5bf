"""A run that profiles one of its steps on one of its ranks: what the trace holds, and that the run is the same."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from sead_megatron.metrics import deterministic_keys
from sead_megatron.records import read_records
from tests.integration.jobs import run_job, write_job

PROMPTS = 6
# Student and teacher in two stages; without packing each of the six sequences is a microbatch.
LAYOUT = ("student.parallel.pipeline=2", "teacher.parallel={tensor: 1, pipeline: 2}")
JOB = {
    "steps": 4,
    "data": {"prompts_per_step": PROMPTS},
    "batch": {"packing": False},
    "evaluation": {"every": 2},
}
# Phases of step 2, in order; a checkpoint and an evaluation are due after it, and after neither step 1 nor step 3.
PHASES = [
    *(
        "rollout",
        "grading",
        "teacher",
        "stats",
        "coefficients",
        "update",
        "sync",
        "record",
        "evaluation",
        "checkpoint",
    ),
]


def _ranges(trace: Path) -> list[str]:
    """Names of the ranges of the profiled steps in the order of their start, without those of torch itself."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    found = [event for event in events if event.get("cat") == "user_annotation"]
    names = [event["name"] for event in sorted(found, key=lambda event: event["ts"])]
    return [name for name in names if name in PHASES or "/" in name]


def _times(record: dict[str, object]) -> set[str]:
    return {key.removeprefix("time/") for key in record if key.startswith("time/")}


@pytest.mark.slow
def test_one_step_on_the_last_rank(tmp_path: Path) -> None:
    """Two ranks; the same job with and without a profile."""
    records = {}
    for name, overrides in (
        ("plain", ()),
        ("profiled", ("profile={start_step: 2, stop_step: 3, ranks: [1]}",)),
    ):
        (tmp_path / name).mkdir()
        ended = run_job(write_job(tmp_path / name, **JOB), 2, *LAYOUT, *overrides)
        assert ended.returncode == 0, ended.output[-4000:]
        records[name] = read_records(tmp_path / name / "run/metrics.jsonl")

    assert not (tmp_path / "plain/run/profile").exists()
    traces = list((tmp_path / "profiled/run/profile").iterdir())
    assert [trace.name for trace in traces] == ["rank_1_steps_2_3.json.gz"]
    ranges = _ranges(traces[0])
    assert [name for name in ranges if name.startswith("step/")] == ["step/2"]
    assert ranges[0] == "step/2"
    assert [name for name in ranges if "/" not in name] == [*PHASES, "record"]
    # A phase that is timed is a range.
    assert _times(records["profiled"][1]) == {*PHASES, "other", "step"}
    every = Counter(
        f"{phase}/forward/{i}" for phase in ("teacher", "stats", "update") for i in range(PROMPTS)
    )
    every.update(f"update/backward/{i}" for i in range(PROMPTS))
    made = Counter(name for name in ranges if name.split("/")[1:2] in (["forward"], ["backward"]))
    assert made == every
    # This rank is the last stage: it waits for the other before each forward pass.
    assert [name for name in ranges if name.startswith("teacher/forward-recv/")] == [
        f"teacher/forward-recv/{i}" for i in range(PROMPTS)
    ]

    keys = [key for key in deterministic_keys() if key in records["plain"][0]]
    assert {"loss", "grad_norm", "kl/reverse"} <= set(keys)
    for plain, profiled in zip(records["plain"], records["profiled"], strict=True):
        assert {key: plain[key] for key in keys} == {key: profiled[key] for key in keys}
