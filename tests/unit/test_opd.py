import pytest
import torch

from sead_megatron.data.types import TokenTable
from sead_megatron.objectives import Objective, build_objective
from sead_megatron.objectives.opd import OpdObjective


def opd() -> Objective:
    return build_objective(OpdObjective(name="opd"), 10)


def test_reverse_kl_on_every_response_token() -> None:
    table = TokenTable(offsets=torch.tensor([0, 2, 3]), student_entropy=torch.tensor([1.0, 2.0, 6.0]))
    coefficients = opd().coefficients(table, 4)
    assert coefficients.weights.tolist() == [[0.0, 1.0, 0.0, 0.0]] * 3
    assert coefficients.normalizer == 3.0
    assert coefficients.zones is None
    assert coefficients.metrics == {"tokens/active": 3.0, "tokens/response": 3.0, "entropy/student": 3.0}


def test_kl_means_are_logged_when_measured() -> None:
    table = TokenTable(
        offsets=torch.tensor([0, 2]), forward_kl=torch.tensor([1.0, 3.0]), reverse_kl=torch.tensor([0.5, 1.0])
    )
    metrics = opd().coefficients(table, 0).metrics
    assert (metrics["kl/forward"], metrics["kl/reverse"]) == (2.0, 0.75)


def test_means_are_taken_in_float64() -> None:
    entropy = torch.full((1_000_001,), 1e-4)
    entropy[0] = 1e6
    table = TokenTable(offsets=torch.tensor([0, len(entropy)]), student_entropy=entropy)
    expected = (1e6 + 1e6 * float(torch.tensor(1e-4))) / 1_000_001
    assert opd().coefficients(table, 0).metrics["entropy/student"] == pytest.approx(expected, rel=1e-12)


def test_no_response_token_gives_a_zero_loss() -> None:
    coefficients = opd().coefficients(TokenTable(offsets=torch.tensor([0])), 0)
    assert coefficients.weights.shape == (0, 4) and coefficients.normalizer == 1.0


def test_it_needs_nothing_and_has_no_state() -> None:
    objective = opd()
    assert not objective.needs_teacher_entropy and not objective.needs_token_stats(0)
    assert objective.teacher_topk == 0
    objective.load_state_dict(objective.state_dict())
    with pytest.raises(ValueError, match="opd has no state"):
        objective.load_state_dict({"lambda_fkl": 1.0})
