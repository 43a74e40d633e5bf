"""The table of metric keys."""

import pytest

from sead_megatron.metrics import METRICS, check_keys, deterministic_keys

# The keys of the contract; renaming one breaks every dashboard and tool that reads metrics.jsonl.
STABLE = [
    "step",
    "loss",
    "grad_norm",
    "lr",
    "alpha",
    "zone/a_share",
    "zone/b_share",
    "zone/c_share",
    "zone/a_fkl_share",
    "zone/b_fkl_share",
    "zone/c_fkl_share",
    "zone/empty",
    "entropy/student",
    "entropy/teacher",
    "entropy/engine_trainer_diff_mean",
    "entropy/engine_trainer_diff_max",
    "kl/forward",
    "kl/reverse",
    "rollout/length_mean",
    "rollout/truncated",
    "rollout/pass_rate",
    "rollout/empty",
    "rollout/logprob_diff_mean",
    "rollout/logprob_diff_max",
    "curriculum/difficulty_mean",
    "curriculum/eligible",
    "time/step",
    "time/rollout",
    "time/grading",
    "time/teacher",
    "time/stats",
    "time/coefficients",
    "time/update",
    "time/moving_teacher",
    "time/sync",
    "time/checkpoint",
    "time/record",
    "time/other",
    "checkpoint/write_seconds",
    "tokens_per_second",
    "mfu",
    "memory/peak_bytes",
    "skipped_steps",
    "tokens/active",
    "tokens/response",
    "evaluation/accuracy",
    "weight_version",
]


def test_stable_keys_are_there_once() -> None:
    assert set(STABLE) <= METRICS.keys()
    check_keys(STABLE)


def test_unknown_key_is_refused() -> None:
    check_keys(["loss", "loss_nonfinite"])
    with pytest.raises(ValueError, match=r"unknown metric keys \['los', 'zone/d_share'\]"):
        check_keys(["loss", "los", "zone/d_share"])


def test_every_benchmark_has_a_key() -> None:
    check_keys(["evaluation/MATH-500", "evaluation/AIME24_nonfinite"])
    with pytest.raises(ValueError, match="'evaluations/MATH-500'"):
        check_keys(["evaluations/MATH-500"])


def test_every_domain_has_a_key() -> None:
    check_keys(["domain/math/reverse_kl"])
    with pytest.raises(ValueError, match="'domains/math/reverse_kl'"):
        check_keys(["domains/math/reverse_kl"])


def test_only_time_and_machine_are_not_deterministic() -> None:
    not_deterministic = METRICS.keys() - set(deterministic_keys())
    assert not_deterministic == {key for key in METRICS if key.startswith("time/")} | {
        "checkpoint/write_seconds",
        "tokens_per_second",
        "mfu",
        "memory/peak_bytes",
        "grader/timeouts",
        "grader/crashes",
    }
