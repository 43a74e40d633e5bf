"""The plan of a run: what fits, what a step takes, which layouts are proposed, and the command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sead_megatron.config import TrainConfig
from sead_megatron.errors import UserError
from sead_megatron.models.hf_config import read_hf_config
from sead_megatron.models.stages import layer_parameters
from sead_megatron.plan.devices import DEVICES, GIB, device_with_memory
from sead_megatron.plan.fit import USABLE_SHARE, check_fit
from sead_megatron.plan.lengths import Lengths, read_lengths
from sead_megatron.plan.memory import Run, plan_memory
from sead_megatron.plan.search import search
from sead_megatron.plan.timing import Assumptions, estimate

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "tests/hf_configs"
LENGTHS = Lengths(4000.0, 0.8, 16384)


def run_of(pair: tuple[str, str] = ("nemotron_nano_8b", "nemotron_super_49b"), **sections: Any) -> Run:
    raw: dict[str, Any] = {
        "run_dir": "unused",
        "steps": 181,
        "student": {"path": str(CONFIGS / pair[0]), "parallel": {"tensor": 4}},
        "teacher": {"path": str(CONFIGS / pair[1]), "parallel": {"tensor": 4}},
        "precision": {"student": "bfloat16", "teacher": "fp8_blockwise"},
        "data": {"prompts": "unused", "prompts_per_step": 96},
        "rollout": {
            "tensor_parallel": 8,
            "max_new_tokens": 16384,
            "max_model_len": 18432,
            "kv_cache_gib": 6.75,
        },
        "batch": {"max_tokens_per_microbatch": 18432},
        "curriculum": {"name": "uniform"},
    }
    for name, changes in sections.items():
        raw[name] = raw.get(name, {}) | changes
    config = TrainConfig.model_validate(raw)
    teachers = tuple(read_hf_config(path) for path in config.teacher.directories)
    return Run(config, read_hf_config(config.student.path), teachers, 32, DEVICES["h100"])


# --- memory


def test_ranks_hold_the_whole_models_together() -> None:
    """Weights over the ranks of a block add up to the models' published sizes, padding and norms aside."""
    run = run_of(
        student={"parallel": {"tensor": 2, "pipeline": 2}}, teacher={"parallel": {"tensor": 2, "pipeline": 4}}
    )
    memory = plan_memory(run)
    student = sum(rank.always["student weights"] for rank in memory[:4])
    assert student == pytest.approx(2 * 8.03e9, rel=1e-3)
    teacher = sum(rank.always["teacher weights"] for rank in memory[:8])
    # One byte an element but for the ends and the embedding; the output layer lies in the student's partition.
    ends = sum(layer_parameters(run.teachers[0])[i] for i in (0, -1)) + 128256 * 8192
    assert teacher == pytest.approx(49.87e9 - 128256 * 8192 + ends, rel=1e-3)
    outputs = [rank.always["teacher output layer"] for rank in memory[:4]]
    assert outputs == [0, 0, 128256 * 8192, 128256 * 8192]


def test_modelopt_compresses_teachers_and_no_reference() -> None:
    def memory(teacher: str) -> dict[str, int]:
        reference = {"path": str(CONFIGS / "nemotron_nano_8b"), "parallel": {"tensor": 4}}
        run = run_of(precision={"teacher": teacher}, reference=reference)
        return plan_memory(replace(run, reference=run.student), [0])[0].always

    compressed, quantised, plain = memory("modelopt_fp8"), memory("fp8_tensorwise"), memory("bfloat16")
    assert compressed["teacher weights"] == quantised["teacher weights"] < 0.6 * plain["teacher weights"]
    assert compressed["reference model"] == plain["reference model"] > 1.5 * quantised["reference model"]


def test_local_layers_keep_more() -> None:
    local = plan_memory(run_of(precision={"allow_local_layers": True}), [0])[0].phases["update"][
        "activations"
    ]
    assert local > 1.2 * plan_memory(run_of(), [0])[0].phases["update"]["activations"]


def test_the_optimizer_is_sharded_over_the_replicas() -> None:
    whole = plan_memory(run_of(optimizer={"distributed": False}))[0]
    shared = plan_memory(run_of())[0]
    assert whole.from_step_2["optimizer moments"] / shared.from_step_2["optimizer moments"] == pytest.approx(
        8, rel=1e-3
    )
    assert (
        shared.total("rollout", first_step=True)
        == shared.total("rollout") - shared.from_step_2["optimizer moments"]
    )
    assert shared.total("update", first_step=True) == shared.total("update")


def test_recompute_and_offload() -> None:
    full = plan_memory(run_of(student={"recompute": "full"}))[0].phases
    none = plan_memory(run_of())[0].phases
    assert full["update"]["activations"] < 0.2 * none["update"]["activations"]
    offloaded = plan_memory(run_of(teacher={"offload_hidden": True}))[0].phases
    assert none["update"]["teacher hidden states"] == 12 * 16384 * 8192 * 2  # 96 rollouts over 8 replicas
    assert "teacher hidden states" not in offloaded["update"]


def test_every_teacher_has_its_place(tmp_path: Path) -> None:
    """Weights and output layers add up; hidden states and activations are those of the larger teacher."""
    run = run_of()
    wide, small = run.teachers[0], run.student
    alone = {teacher: plan_memory(replace(run, teachers=(teacher,)))[3] for teacher in (wide, small)}
    both = plan_memory(replace(run, teachers=(small, wide)))[3]
    for name in ("teacher weights", "teacher output layer"):
        assert both.always[name] == sum(memory.always[name] for memory in alone.values())
    for phase in ("teacher", "update"):
        assert both.phases[phase] == alone[wide].phases[phase] != alone[small].phases[phase]
    times = [
        estimate(replace(run, teachers=teachers), LENGTHS) for teachers in ((wide,), (small,), (wide, small))
    ]
    assert times[2].teacher == pytest.approx((times[0].teacher + times[1].teacher) / 2)


def test_no_teacher_has_no_place() -> None:
    run = run_of()
    for memory in plan_memory(replace(run, teachers=())):
        terms = [memory.terms(phase) for phase in ("rollout", "teacher", "update", "sync")]
        assert sum(value for term in terms for name, value in term.items() if name.startswith("teacher")) == 0
    assert estimate(replace(run, teachers=()), LENGTHS).teacher == 0


def test_a_plan_that_does_not_fit_names_the_term() -> None:
    memory = plan_memory(run_of())
    check_fit(memory, DEVICES["h100"].memory_bytes, "H100")
    with pytest.raises(UserError) as caught:
        check_fit(memory, 40 * GIB, "a card of 40 GiB")
    assert str(caught.value).startswith("memory of rank 0 in the update phase = ")
    assert "must be at most 38.0 GiB (95% of a card of 40 GiB); it ends with activations (" in str(
        caught.value
    )
    assert str(caught.value).endswith(
        "set student.recompute to full, or lower batch.max_tokens_per_microbatch; tools/plan.py shows every term"
    )


@pytest.mark.parametrize(
    ("changes", "term"),
    [
        ({"teacher": {"parallel": {"tensor": 1}}, "precision": {"teacher": "bfloat16"}}, "teacher weights"),
        ({"rollout": {"kv_cache_gib": 60}}, "KV cache"),
        ({"student": {"parallel": {"tensor": 1}}, "optimizer": {"distributed": False}}, "optimizer masters"),
        ({"kernel": {"cache_mib": 60000}}, "logit cache"),
    ],
)
def test_the_term_that_breaks_it(changes: dict[str, Any], term: str) -> None:
    memory = plan_memory(run_of(**changes))
    with pytest.raises(UserError, match=f"it ends with {term} "):
        check_fit(memory, DEVICES["h100"].memory_bytes, "H100")


# --- time


def test_tail_and_tensor_parallel_rollouts() -> None:
    """Decoding a few sequences reads the weights for every token: TP shortens it, and so does FP8."""
    by_tensor = [
        estimate(run_of(rollout={"tensor_parallel": size}), LENGTHS).rollout for size in (1, 2, 4, 8)
    ]
    assert by_tensor == sorted(by_tensor, reverse=True)
    fp8 = estimate(run_of(rollout={"quantization": "fp8"}), LENGTHS)
    assert fp8.rollout < by_tensor[-1]
    assert fp8.rollout > 0.5 * fp8.total and fp8.rollout_tail > 0.25 * fp8.rollout
    # Slow collectives take the gain away.
    slow = Assumptions(collective_latency=1e-4)
    assert (
        estimate(run_of(), LENGTHS, slow).rollout
        > estimate(run_of(rollout={"tensor_parallel": 1}), LENGTHS, slow).rollout
    )


def test_decoding_by_hand() -> None:
    """One engine, two sequences of equal length: length steps, each reading weights and cache once."""
    run = run_of(
        rollout={"tensor_parallel": 1, "max_num_seqs": 2},
        data={"prompts_per_step": 2},
        student={"parallel": {"tensor": 1}},
        teacher={"parallel": {"tensor": 1}},
    )
    run = replace(run, world=1)
    given = Assumptions(prompt_tokens=1)
    fixed = Lengths(1000.0, 1e-9, 16384, measured=(1000,))
    weights, cache = run.engine_weights(), run.kv_bytes_per_token()
    assert weights == pytest.approx(2 * 8.03e9, rel=1e-3) and cache == 32 * 2 * 8 * 128 * 2
    bandwidth = DEVICES["h100"].memory_bandwidth * given.memory_efficiency
    expected = 1000 * ((weights + 2 * 501 * cache) / bandwidth + given.decode_overhead)
    assert estimate(run, fixed, given).rollout == pytest.approx(expected, rel=2e-3)
    one_slot = run.config.rollout.model_copy(update={"max_num_seqs": 1})
    waves = replace(run, config=run.config.model_copy(update={"rollout": one_slot}))
    assert estimate(waves, fixed, given).rollout > 1.9 * expected


def test_flops_are_those_of_the_models() -> None:
    run = run_of()
    fixed = Lengths(1.0, 1e-9, 16384, measured=(1000,))
    time = estimate(run, fixed, Assumptions(prompt_tokens=24))
    tokens = 96 * 1024
    assert time.tokens == tokens
    # 2 a weight and token, and a little for attention; the embedding is looked up.
    computed = 49.87e9 - 128256 * 8192
    assert 1.0 < time.flops["teacher"] / (2 * computed * tokens) < 1.05
    assert 0.9 < time.flops["update"] / (6 * 8.03e9 * tokens) < 1.15


def test_sliding_windows_and_bubbles() -> None:
    olmo = run_of(("olmo3_7b", "olmo3_32b"), precision={"teacher": "bfloat16"})
    wide = replace(olmo, teachers=(replace(olmo.teachers[0], sliding_window=10**6),))
    assert estimate(wide, LENGTHS).flops["teacher"] > estimate(olmo, LENGTHS).flops["teacher"]
    # One row in all: 8 stages take 8 times as long as their share of the work.
    short = Lengths(1.0, 1e-9, 16384, measured=(100,))
    row = {"data": {"prompts_per_step": 8}, "student": {"parallel": {"tensor": 4, "pipeline": 8}}}
    flat = estimate(
        run_of(**row, teacher={"parallel": {"tensor": 4}}), short, Assumptions(link_efficiency=1e9)
    )
    deep = estimate(
        run_of(**row, teacher={"parallel": {"tensor": 4, "pipeline": 8}}),
        short,
        Assumptions(link_efficiency=1e9),
    )
    assert deep.teacher > 5 * flat.teacher


def test_lengths(tmp_path: Path) -> None:
    drawn = LENGTHS.draw(20000, np.random.default_rng(0))
    assert drawn.max() == 16384 and drawn.min() >= 1
    assert np.median(drawn) == pytest.approx(4000, rel=0.05)
    path = tmp_path / "lengths.txt"
    path.write_text("10\n\n20\n99999\n")
    lengths = read_lengths(path, 100)
    assert set(lengths.draw(200, np.random.default_rng(0)).tolist()) == {10, 20, 100}
    path.write_text("10\nten\n")
    with pytest.raises(UserError, match=r'lengths.txt, line 2 = "ten": must be a length in tokens'):
        read_lengths(path, 100)
    path.write_text("\n")
    with pytest.raises(UserError, match="holds no length"):
        read_lengths(path, 100)


# --- search


def test_search_proposes_what_fits() -> None:
    run = run_of(student={"parallel": {"tensor": 1}}, precision={"teacher": "bfloat16"})
    found = search(run, LENGTHS, Assumptions(), count=3, fp8_rollouts=False)
    assert len(found) == 3
    times = [round(candidate.time.total, 2) for candidate in found]
    assert times == sorted(times)
    for candidate in found:
        assert candidate.memory.peak <= USABLE_SHARE * DEVICES["h100"].memory_bytes
        assert candidate.run.config.rollout.quantization == "none"
        raw = candidate.run.config
        assert f"student.parallel.tensor={raw.student.parallel.tensor}" in candidate.overrides
        # The proposed configuration is the one that was judged.
        assert estimate(candidate.run, LENGTHS, Assumptions()).total == candidate.time.total
    assert (
        search(
            replace(run, device=device_with_memory("small", 8 * GIB)),
            LENGTHS,
            Assumptions(),
            fp8_rollouts=False,
        )
        == []
    )


# --- the command line


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/plan.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(run_of().config.model_dump()))
    return str(path)


def test_table_and_json_agree(config: str) -> None:
    table, raw = plan(config, "--world-size", "32"), plan(config, "--world-size", "32", "--format", "json")
    assert table.returncode == raw.returncode == 0, table.stderr + raw.stderr
    content = json.loads(raw.stdout)
    assert f"fullest rank {content['peak_bytes'] / GIB:.1f} GiB" in table.stdout
    assert len(content["ranks"]) == 32
    assert content["peak_bytes"] == max(
        sum(phase["later_steps"].values()) for rank in content["ranks"] for phase in rank["phases"].values()
    )
    for assumption in ("collective latency 1e-05", "median 4,000", "decode overhead"):
        assert assumption in table.stdout.replace("\n", " ")


LIGHTNING = [
    "objective={name: lightning}",
    "data.cache=unused",
    "rollout.temperature=1.0",
    "teacher.path=nowhere",
]


def test_a_run_on_cached_scores_holds_the_student_only(config: str) -> None:
    """Neither a teacher nor an engine in memory and time; an engine again where it evaluates."""
    alone = json.loads(plan(config, "--world-size", "32", "--format", "json", *LIGHTNING).stdout)
    for phase in (phase for rank in alone["ranks"] for phase in rank["phases"].values()):
        for name in phase["later_steps"]:
            assert not name.startswith(("teacher", "engine", "KV")), name
    assert alone["time"]["rollout"] == alone["time"]["teacher"] == 0 < alone["time"]["update"]
    evaluated = plan(config, "--world-size", "32", *LIGHTNING, "evaluation.prompts=unused")
    assert "no teacher, 4 engines of TP8" in evaluated.stdout and "KV cache" in evaluated.stdout
    ended = plan(config, "--world-size", "32", "--search", *LIGHTNING)
    assert ended.stderr == (
        "error: --search: objective lightning loads no teacher, whose layouts are searched; leave it out\n"
    )


def test_dry_run_of_a_run_on_cached_scores(config: str) -> None:
    command = [sys.executable, "-m", "sead_megatron", "dry-run", config, "--world-size", "8", *LIGHTNING]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "8 ranks: student TP4 PP1 DP2, no teacher; configuration" in ended.stdout
    assert re.search(r"built on rank 0: student [\d,]+ parameters", ended.stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--world-size", "6"],
            "error: student.parallel tensor * pipeline = 4: must divide the world size (6)",
        ),
        (["--world-size", "0"], "error: command line: argument --world-size: '0' is not a positive integer"),
        (
            ["--world-size", "32", "--gpu", "v100"],
            "error: command line: argument --gpu: invalid choice: 'v100'",
        ),
        (
            ["--world-size", "32", "--lengths", "none.txt"],
            'error: --lengths = "none.txt": No such file or directory',
        ),
        (
            ["--world-size", "32", "student.path=nowhere"],
            'error: student.path = "nowhere": no such directory',
        ),
        (["--world-size", "32", "rollout.kv_cache_gib=70"], "error: memory of rank"),
        (
            ["--world-size", "32", "teacher.parallel.tensor=3"],
            "error: teacher.parallel.tensor = 3: must divide",
        ),
    ],
)
def test_mistakes(config: str, arguments: list[str], message: str) -> None:
    ended = plan(config, *arguments)
    assert ended.returncode == 2
    assert ended.stderr.startswith(message) and ended.stderr.count("\n") == 1, ended.stderr
