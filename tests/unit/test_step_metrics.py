"""What a step's record says, from what the step produced."""

import torch

from sead_megatron.data.types import TokenTable
from sead_megatron.training.step_metrics import engine_trainer_differences
from sead_megatron.training.student import Update


def test_the_engine_is_compared_on_sampled_tokens_only() -> None:
    """A loss on the teacher's likeliest tokens measures no sampled one: the pass before the update did."""
    table = TokenTable(
        offsets=torch.tensor([0, 3]),
        rollout_logprob=torch.tensor([-1.0, -2.0, -3.0]),
        student_entropy=torch.tensor([1.0, 2.0, 3.0]),
        student_logprob=torch.tensor([-1.5, -2.25, -9.0]),
    )
    active = torch.tensor([True, True, False])
    entropy = {"student_entropy": torch.tensor([1.0, 2.5, 0.0])}
    sampled = {**entropy, "student_logprob": torch.tensor([-1.0, -2.125, 0.0])}
    of_update = engine_trainer_differences(table, table, Update(0.0, True, 0.0, 0.0, active, sampled))
    assert of_update == {
        "rollout/logprob_diff_mean": 0.0625,
        "rollout/logprob_diff_max": 0.125,
        "entropy/engine_trainer_diff_mean": 0.25,
        "entropy/engine_trainer_diff_max": 0.5,
    }
    of_pass = engine_trainer_differences(table, table, Update(0.0, True, 0.0, 0.0, active, entropy))
    assert of_pass["rollout/logprob_diff_mean"] == 0.375 and of_pass["rollout/logprob_diff_max"] == 0.5
    nothing = Update(0.0, True, 0.0, 0.0, torch.zeros(3, dtype=torch.bool), entropy)
    assert engine_trainer_differences(table, table, nothing) == {}
