"""Every key of `metrics.jsonl`: its unit, its meaning, and whether two equal runs must agree on it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sead_megatron.records import NONFINITE_SUFFIX


@dataclass(frozen=True)
class Metric:
    """One key of a step's record. `deterministic`: equal configuration and machine give the same number."""

    name: str
    unit: str
    meaning: str
    deterministic: bool = True


_TABLE = [
    Metric("step", "", "optimizer step, counted from 1"),
    Metric("loss", "nats", "the objective: coefficient-weighted sum over active tokens / its normaliser"),
    Metric("grad_norm", "", "global L2 norm of the gradient before clipping"),
    Metric("lr", "", "learning rate of this update"),
    Metric("skipped_steps", "steps", "updates skipped so far for a non-finite loss or gradient"),
    Metric(
        "teacher/nonfinite_tokens",
        "tokens",
        "response tokens at which a frozen model gave a NaN or an infinity; only in steps that have some",
    ),
    Metric(
        "weight_version",
        "",
        "version of the student weights that sampled this step's rollouts; -1: responses of the data",
    ),
    Metric("alpha", "", "annealing coefficient of the forward KL (SEAD, Eq. 7)"),
    Metric("lambda_fkl", "", "scale of forward KL on zone C against reverse KL on zone B (SEAD, Eq. 4)"),
    Metric("zone/a_share", "share", "response tokens in zone A (student and teacher confident, no gradient)"),
    Metric("zone/b_share", "share", "response tokens in zone B (teacher confident, student not; reverse KL)"),
    Metric("zone/c_share", "share", "response tokens in zone C (teacher uncertain; forward KL)"),
    Metric("zone/a_fkl_share", "share", "zone A's part of the forward KL summed over all response tokens"),
    Metric("zone/b_fkl_share", "share", "zone B's part of the forward KL summed over all response tokens"),
    Metric("zone/c_fkl_share", "share", "zone C's part of the forward KL summed over all response tokens"),
    Metric("zone/threshold_teacher", "nats", "smallest teacher entropy in zone C"),
    Metric("zone/threshold_a_teacher", "nats", "largest teacher entropy in zone A"),
    Metric("zone/threshold_a_student", "nats", "largest student entropy in zone A"),
    Metric("zone/threshold_joint", "nats", "largest of both entropies in zone A (tau of SEAD, Theorem 1)"),
    Metric("zone/empty", "zones", "zones without a token in this step"),
    Metric("entropy/student", "nats", "student entropy at the loss' temperature, mean over response tokens"),
    Metric("entropy/teacher", "nats", "teacher entropy at the loss' temperature, mean over response tokens"),
    Metric(
        "entropy/teacher_slack",
        "nats",
        "by how much the exact teacher entropy can exceed a top-k one, mean over response tokens",
    ),
    Metric(
        "entropy/engine_trainer_diff_mean",
        "nats",
        "|engine - trainer| student entropy, mean where both exist",
    ),
    Metric(
        "entropy/engine_trainer_diff_max",
        "nats",
        "|engine - trainer| student entropy, maximum where both exist",
    ),
    Metric(
        "kl/forward", "nats", "KL(teacher || student), mean over the response tokens where it was evaluated"
    ),
    Metric(
        "kl/reverse", "nats", "KL(student || teacher), mean over the response tokens where it was evaluated"
    ),
    Metric(
        "topk/overlap", "share", "student's k likeliest tokens that are among the teacher's, mean over tokens"
    ),
    Metric("topk/student_mass", "share", "student's probability on the teacher's k likeliest tokens, mean"),
    Metric("topk/teacher_mass", "share", "teacher's probability on the student's k likeliest tokens, mean"),
    Metric("rollout/length_mean", "tokens", "response length, mean over rollouts"),
    Metric("rollout/truncated", "share", "rollouts cut by max_new_tokens"),
    Metric("rollout/empty", "rollouts", "rollouts without a response token"),
    Metric(
        "rollout/pass_rate", "share", "rollouts with the right final answer, among those with a gold answer"
    ),
    Metric(
        "grader/timeouts",
        "answers",
        "answers since the last record, evaluations included, whose grading hit a limit of time; they count as wrong",
        deterministic=False,
    ),
    Metric(
        "grader/crashes",
        "answers",
        "answers since the last record at which a grading process died otherwise; they count as wrong",
        deterministic=False,
    ),
    Metric("rollout/logprob_diff_mean", "nats", "|engine - trainer| logprob of sampled tokens, mean"),
    Metric("rollout/logprob_diff_max", "nats", "|engine - trainer| logprob of sampled tokens, maximum"),
    Metric("advantage/mean", "nats", "advantage of the sampled tokens, mean over response tokens"),
    Metric("advantage/clipped", "share", "response tokens whose advantage was clipped (lightning)"),
    Metric(
        "cache/drift",
        "nats",
        "log mu(y) - log q(y) of cached responses, mean over tokens: how far the student has left their sampler mu",
    ),
    Metric("importance/mean", "", "importance weight q(y) / mu(y) after clipping, mean over response tokens"),
    Metric(
        "importance/clipped",
        "share",
        "response tokens whose importance weight was clipped, or 0 for being out of bounds",
    ),
    Metric("reward/mean", "", "reward with the objective's bonuses and penalties, mean over rollouts"),
    Metric("reward/equal_groups", "share", "rollouts of prompts whose rewards are all equal (no advantage)"),
    Metric(
        "domain/<domain>/reverse_kl",
        "nats",
        "log q(y) - log p(y) of the sampled tokens of a domain's prompts, mean; one key each (mopd)",
    ),
    Metric("gate/mean", "", "entropy gate of EGRSD, mean over response tokens"),
    Metric("length_curriculum/stage", "", "stage of the length curriculum (decoupled), from 0"),
    Metric("tokens/active", "tokens", "response tokens with a non-zero coefficient"),
    Metric("tokens/response", "tokens", "response tokens of the global batch"),
    Metric(
        "curriculum/difficulty_mean",
        "",
        "difficulty (1 - pass rate of the initial student), mean over prompts",
    ),
    Metric("curriculum/eligible", "prompts", "prompts that this step could draw from"),
    Metric("curriculum/filled", "prompts", "prompts of this step taken from beyond the competence threshold"),
    Metric(
        "evaluation/accuracy",
        "share",
        "held-out prompts answered correctly by greedy decoding after this step",
    ),
    Metric(
        "evaluation/<benchmark>",
        "share",
        "right responses to a benchmark of evaluation.benchmarks after this step; one key each, by its file's name",
    ),
    Metric("time/step", "s", "wall time from the last record to this one", deterministic=False),
    Metric("time/rollout", "s", "choice of the prompts and sampling", deterministic=False),
    Metric("time/grading", "s", "answers of the rollouts graded", deterministic=False),
    Metric("time/teacher", "s", "scoring by the teachers and the reference model", deterministic=False),
    Metric("time/stats", "s", "forward-only student statistics", deterministic=False),
    Metric("time/coefficients", "s", "token statistics turned into coefficients", deterministic=False),
    Metric("time/update", "s", "forward, backward and optimizer", deterministic=False),
    Metric("time/moving_teacher", "s", "the teacher moved after the student", deterministic=False),
    Metric("time/sync", "s", "weights from the trainer to the engine", deterministic=False),
    Metric(
        "time/checkpoint",
        "s",
        "waiting for a checkpoint: copying this rank's share, then only what is not yet written when the next is due",
        deterministic=False,
    ),
    Metric("time/evaluation", "s", "held-out evaluation", deterministic=False),
    Metric(
        "time/record",
        "s",
        "record and sampled rollouts; what is written after the times were taken counts in the next step",
        deterministic=False,
    ),
    Metric("time/other", "s", "time/step without all phases", deterministic=False),
    Metric(
        "checkpoint/write_seconds",
        "s",
        "writing a checkpoint beside training, slowest rank; in the record of the step that found it on disk",
        deterministic=False,
    ),
    Metric(
        "tokens_per_second",
        "tokens/s",
        "response tokens of the whole world / (time/step - time/evaluation - time/checkpoint)",
        deterministic=False,
    ),
    Metric(
        "mfu",
        "share",
        "model FLOP/s of scoring, statistics and update over the seconds of time/teacher, time/stats and time/update "
        "/ bf16 peak of all devices; 2 FLOPs a weight and token forward, 6 forward and backward, no attention scores, "
        "no recomputation",
        deterministic=False,
    ),
    Metric("memory/peak_bytes", "bytes", "largest peak of memory over the ranks", deterministic=False),
]

# Keys with a name of the user's: a benchmark's file, a domain of the prompts.
_OPEN_PREFIXES = ("evaluation/", "domain/")

METRICS: dict[str, Metric] = {metric.name: metric for metric in _TABLE}

OTHER = "other"
"""What no phase of a step was timed for."""

PHASES = tuple(key.removeprefix("time/") for key in METRICS if key.startswith("time/") and key != "time/step")
"""Where the seconds of a step go: they add up to `time/step`."""

# They come every so many steps, and would hide how fast the steps are.
_NOT_TRAINING = ("evaluation", "checkpoint")


def phase_seconds(record: Mapping[str, Any]) -> float:
    """Seconds of a step's record in all phases."""
    return _seconds(record, PHASES)


def training_seconds(record: Mapping[str, Any]) -> float:
    """Seconds of a step's record without evaluation and checkpoint."""
    return _seconds(record, (phase for phase in PHASES if phase not in _NOT_TRAINING))


def _seconds(record: Mapping[str, Any], phases: Iterable[str]) -> float:
    return sum(record.get(f"time/{phase}") or 0.0 for phase in phases)


def check_keys(keys: Iterable[str]) -> None:
    """Raise ValueError for keys that are not in the table (those of non-finite values, benchmarks and domains are)."""
    unknown = sorted(
        key
        for key in keys
        if key.removesuffix(NONFINITE_SUFFIX) not in METRICS and not key.startswith(_OPEN_PREFIXES)
    )
    if unknown:
        raise ValueError(f"unknown metric keys {unknown}: add them to sead_megatron/metrics.py")


def deterministic_keys() -> list[str]:
    """The keys that two runs of one configuration are compared by."""
    return [metric.name for metric in _TABLE if metric.deterministic]
