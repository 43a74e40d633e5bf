import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sead_megatron.data.terms import Term
from sead_megatron.data.types import Coefficients, TokenTable
from sead_megatron.errors import UserError
from sead_megatron.objectives import Objective, build_objective
from sead_megatron.objectives.opd import OpdObjective
from sead_megatron.objectives.sead import SeadObjective, ZoneShares

A, B, C = 0, 1, 2
# Zones of these ten tokens, derived by hand in test_zones.py::test_hand_made_tokens.
TEACHER = torch.tensor([0.0, 2.0, 0.1, 0.2, 0.3, 1.0, 0.4, 0.5, 0.6, 0.7])
STUDENT = torch.tensor([0.0, 0.1, 1.5, 0.2, 0.3, 1.2, 0.4, 1.1, 0.5, 0.6])
ZONES = [A, C, B, A, A, B, A, B, A, B]


def make_table(**columns: Tensor) -> TokenTable:
    columns = {"teacher_entropy": TEACHER, "student_entropy": STUDENT} | columns
    return TokenTable(offsets=torch.tensor([0, len(columns["teacher_entropy"])]), **columns)


def empty_table() -> TokenTable:
    return make_table(**dict.fromkeys(TokenTable.column_names(), torch.zeros(0)))


def sead(total_steps: int = 2, **changes: Any) -> Objective:
    return build_objective(SeadObjective(name="sead", **changes), total_steps)


def kl_columns(forward: list[float], reverse: list[float]) -> dict[str, Tensor]:
    return {"forward_kl": torch.tensor(forward), "reverse_kl": torch.tensor(reverse)}


@pytest.mark.parametrize(("step", "alpha"), [(0, 0.8), (1, 0.4), (2, 0.0)])
@pytest.mark.parametrize("zone_c", ["fkl_decay", "mix"])
def test_coefficient_tables_of_ten_tokens(step: int, alpha: float, zone_c: str) -> None:
    coefficients = sead(zone_c=zone_c).coefficients(make_table(), step)
    on_c = [alpha, 1 - alpha if zone_c == "mix" else 0.0, 0.0, 0.0]
    rows = {A: [0.0, 0.0, 0.0, 0.0], B: [0.0, 1.0, 0.0, 0.0], C: on_c}
    torch.testing.assert_close(
        coefficients.weights, torch.tensor([rows[zone] for zone in ZONES]), rtol=0, atol=1e-7
    )
    assert coefficients.zones is not None and coefficients.zones.tolist() == ZONES
    assert coefficients.normalizer == 5.0  # C keeps its place in the denominator when its weight is 0
    assert coefficients.metrics["alpha"] == pytest.approx(alpha, abs=1e-15)


def toy_distributions(size: int = 30, vocabulary: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    sharpness = 4 * torch.rand(2, size, 1, generator=generator, dtype=torch.float64)
    student, teacher = sharpness * torch.randn(2, size, vocabulary, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher


def equation_4(student: Tensor, teacher: Tensor, alpha: float, scale: float, zone_c: str) -> Tensor:
    """The loss from the distributions, token by token; zones by sorting the entropies in python."""
    q, p = student.softmax(-1), teacher.softmax(-1)
    h_student = [float(-(row * row.log()).sum()) for row in q.detach()]
    h_teacher = [float(-(row * row.log()).sum()) for row in p]
    size = len(q)
    by_teacher = sorted(range(size), key=h_teacher.__getitem__)
    rank_teacher, rank_student = (
        {i: r for r, i in enumerate(sorted(range(size), key=h.__getitem__))} for h in (h_teacher, h_student)
    )
    zone_c_tokens = by_teacher[-size // 10 :]
    rest = by_teacher[: -size // 10]
    skipped = sorted(rest, key=lambda i: (max(rank_teacher[i], rank_student[i]), rank_student[i]))[
        : size // 2
    ]
    total = torch.zeros((), dtype=torch.float64)
    for i in range(size):
        forward_kl = sum(p[i, v] * (p[i, v] / q[i, v]).log() for v in range(p.shape[1]))
        reverse_kl = sum(q[i, v] * (q[i, v] / p[i, v]).log() for v in range(p.shape[1]))
        if i in zone_c_tokens:
            total = total + alpha * scale * forward_kl + ((1 - alpha) * reverse_kl if zone_c == "mix" else 0)
        elif i not in skipped:
            total = total + reverse_kl
    return total / (size - len(skipped))


@pytest.mark.parametrize("zone_c", ["fkl_decay", "mix"])
@pytest.mark.parametrize(("step", "alpha"), [(0, 0.8), (1, 0.4), (2, 0.0)])
def test_loss_and_gradient_are_equation_4_on_a_toy_vocabulary(zone_c: str, step: int, alpha: float) -> None:
    student, teacher = toy_distributions()
    expected = equation_4(student, teacher, alpha, 1.5, zone_c)
    (expected_gradient,) = torch.autograd.grad(expected, student)

    log_q, log_p = student.detach().log_softmax(-1), teacher.log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    table = make_table(
        teacher_entropy=-(p * log_p).sum(-1).float(), student_entropy=-(q * log_q).sum(-1).float()
    )
    coefficients = sead(zone_c=zone_c, lambda_fkl=1.5).coefficients(table, step)
    forward_kl, reverse_kl = (p * (log_p - log_q)).sum(-1), (q * (log_q - log_p)).sum(-1)
    weights = coefficients.weights.double()
    loss = (weights[:, 0] * forward_kl + weights[:, 1] * reverse_kl).sum() / coefficients.normalizer
    # The kernel's closed form: dFKL/dz = q - p, dRKL/dz = q (log q - log p - RKL), with q the student.
    gradient = weights[:, :1] * (q - p) + weights[:, 1:2] * q * (log_q - log_p - reverse_kl[:, None])
    assert coefficients.normalizer == 15.0
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-7, atol=0)
    torch.testing.assert_close(gradient / coefficients.normalizer, expected_gradient, rtol=1e-6, atol=1e-8)


def test_metrics_of_ten_tokens() -> None:
    forward = [1.0, 6.0, 2.0, 0.0, 0.0, 4.0, 0.0, 2.0, 1.0, 4.0]
    metrics = sead().coefficients(make_table(**kl_columns(forward, [0.5] * 10)), 0).metrics
    assert metrics == pytest.approx(
        {
            "alpha": 0.8,
            "lambda_fkl": 1.0,
            "zone/a_share": 0.5,
            "zone/b_share": 0.4,
            "zone/c_share": 0.1,
            "zone/a_fkl_share": 0.1,
            "zone/b_fkl_share": 0.6,
            "zone/c_fkl_share": 0.3,
            "zone/empty": 0.0,
            "zone/threshold_teacher": 2.0,
            "zone/threshold_a_teacher": 0.6,
            "zone/threshold_a_student": 0.5,
            "zone/threshold_joint": 0.6,
            "tokens/active": 5.0,
            "tokens/response": 10.0,
            "entropy/teacher": 0.58,
            "entropy/student": 0.59,
            "kl/forward": 2.0,
            "kl/reverse": 0.5,
        }
    )
    assert not {key for key in sead().coefficients(make_table(), 0).metrics if "kl" in key} - {"lambda_fkl"}


def test_rounding_below_zero_is_no_negative_share() -> None:
    forward = [-1e-7, 3.0, 1.0] + [0.0] * 7
    metrics = sead().coefficients(make_table(**kl_columns(forward, [0.5] * 10)), 0).metrics
    assert (metrics["zone/a_fkl_share"], metrics["zone/c_fkl_share"]) == (0.0, 0.75)
    equal_models = sead().coefficients(make_table(**kl_columns([0.0] * 10, [0.0] * 10)), 0).metrics
    assert [equal_models[f"zone/{zone}_fkl_share"] for zone in "abc"] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "changes", [{}, {"lambda_fkl": "auto"}, {"token_zones": False}, {"zone_mode": "absolute"}]
)
def test_no_response_token_gives_a_zero_loss(changes: dict[str, Any]) -> None:
    coefficients = sead(**changes).coefficients(empty_table(), 0)
    assert coefficients.weights.shape == (0, 4)
    assert coefficients.normalizer == 1.0
    assert all(math.isfinite(value) for value in coefficients.metrics.values())
    assert coefficients.metrics["tokens/active"] == 0.0 and "entropy/student" not in coefficients.metrics


def test_no_active_token_gives_a_zero_loss() -> None:
    coefficients = sead(zones=ZoneShares(a=100, b=0, c=0)).coefficients(make_table(), 0)
    assert not coefficients.weights.any() and coefficients.normalizer == 1.0
    assert coefficients.metrics["zone/empty"] == 2.0
    assert "zone/threshold_teacher" not in coefficients.metrics


def test_constant_alpha_without_annealing() -> None:
    weights = sead(annealing=False).coefficients(make_table(), 1).weights
    assert weights[1].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert sead(annealing=False, zone_c="mix").coefficients(make_table(), 1).weights[1].tolist() == [
        1.0,
        0.0,
        0.0,
        0.0,
    ]


def test_annealing_without_zones_mixes_every_token() -> None:
    objective = sead(token_zones=False, lambda_fkl=2.0)
    assert not objective.needs_teacher_entropy
    table = TokenTable(offsets=torch.tensor([0, 3]))
    coefficients = objective.coefficients(table, 1)
    torch.testing.assert_close(coefficients.weights, torch.tensor([[0.8, 0.6, 0.0, 0.0]] * 3))
    assert coefficients.normalizer == 3.0 and coefficients.zones is None
    assert not [key for key in coefficients.metrics if key.startswith("zone")]


def test_without_zones_and_annealing_it_is_opd() -> None:
    ablated = sead(token_zones=False, annealing=False).coefficients(make_table(), 1)
    opd = build_objective(OpdObjective(name="opd"), 2).coefficients(make_table(), 1)
    assert torch.equal(ablated.weights, opd.weights) and ablated.normalizer == opd.normalizer


def test_what_it_needs() -> None:
    assert sead().needs_teacher_entropy and not sead().needs_token_stats(0)
    assert sead(student_entropy="trainer").needs_token_stats(7)
    assert not sead(student_entropy="trainer", token_zones=False).needs_token_stats(7)
    assert sead(teacher_topk=16).teacher_topk == 0
    assert sead(teacher_entropy="topk", teacher_topk=16).teacher_topk == 16
    with pytest.raises(ValueError, match="no teacher_entropy"):
        sead().coefficients(TokenTable(offsets=torch.tensor([0, 10]), student_entropy=STUDENT), 0)


def test_weights_are_detached_and_float32() -> None:
    coefficients = sead().coefficients(make_table(), 0)
    assert not coefficients.weights.requires_grad and coefficients.weights.dtype == torch.float32


def test_auto_lambda_is_measured_once_and_survives_a_restart() -> None:
    objective = sead(lambda_fkl="auto", total_steps=4)
    assert objective.needs_token_stats(0)
    forward, reverse = [9.0, 6.0] + [9.0] * 8, [9.0, 9.0, 1.0, 9.0, 9.0, 2.0, 9.0, 3.0, 9.0, 6.0]
    first = objective.coefficients(make_table(**kl_columns(forward, reverse)), 0)
    assert first.metrics["lambda_fkl"] == 0.5  # mean RKL on B (1 + 2 + 3 + 6) / 4, FKL on C 6
    assert first.weights[1, Term.FORWARD_KL] == pytest.approx(0.4)
    assert not objective.needs_token_stats(1)
    later = objective.coefficients(make_table(**kl_columns([1.0] * 10, [7.0] * 10)), 1)
    assert later.metrics["lambda_fkl"] == 0.5

    resumed = sead(lambda_fkl="auto", total_steps=4)
    resumed.load_state_dict(objective.state_dict())
    assert not resumed.needs_token_stats(2)
    assert torch.equal(
        resumed.coefficients(make_table(), 2).weights, objective.coefficients(make_table(), 2).weights
    )


def test_auto_lambda_waits_for_a_measurable_batch() -> None:
    objective = sead(lambda_fkl="auto")
    with pytest.raises(ValueError, match="no reverse_kl"):
        objective.coefficients(make_table(), 0)
    one, zero, infinite = [1.0] * 10, [0.0] * 10, [math.inf] * 10
    for forward, reverse in (zero, one), (one, zero), (infinite, one), ([math.nan] * 10, one):
        coefficients = objective.coefficients(make_table(**kl_columns(forward, reverse)), 0)
        assert coefficients.metrics["lambda_fkl"] == 1.0 and objective.needs_token_stats(0)
    tiny = {name: torch.ones(2) for name in TokenTable.column_names()}  # A and B, nothing in C
    objective.coefficients(make_table(**tiny), 0)
    assert objective.needs_token_stats(0)


def test_auto_lambda_without_zones_is_over_all_tokens() -> None:
    objective = sead(lambda_fkl="auto", token_zones=False)
    objective.coefficients(make_table(**kl_columns([2.0] * 10, [1.0] * 5 + [5.0] * 5)), 0)
    assert objective.state_dict()["lambda_fkl"] == 1.5


def zones_of(coefficients: Coefficients) -> list[int]:
    assert coefficients.zones is not None
    zones: list[int] = coefficients.zones.tolist()
    return zones


def test_absolute_zones_freeze_the_last_rank_thresholds() -> None:
    config: dict[str, Any] = {"zone_mode": "absolute", "absolute_after": 2, "total_steps": 9}
    objective = sead(**config)
    sharper = make_table(teacher_entropy=TEACHER / 2, student_entropy=STUDENT / 2)
    for step, table in enumerate([sharper, make_table()]):
        assert zones_of(objective.coefficients(table, step)) == ZONES
    resumed = sead(**config)
    resumed.load_state_dict(objective.state_dict())
    for frozen in (objective, resumed):
        # C needs H_te >= 2, A has H_te <= .6 and H_s <= .5; halved, 1 is (1, .05), 5 (.5, .6), 9 (.35, .3)
        coefficients = frozen.coefficients(sharper, 2)
        assert zones_of(coefficients) == [A, B, B, A, A, B, A, B, A, A]
        assert coefficients.metrics["zone/threshold_teacher"] == 2.0
        assert coefficients.metrics["zone/c_share"] == 0.0
        assert coefficients.metrics["zone/empty"] == 1.0
        assert zones_of(frozen.coefficients(make_table(), 3)) == ZONES


def test_absolute_zones_do_not_freeze_a_zone_left_empty_by_a_small_batch() -> None:
    objective = sead(zone_mode="absolute", absolute_after=1, total_steps=9)
    small = make_table(teacher_entropy=torch.tensor([1.0, 2.0]), student_entropy=torch.tensor([1.0, 2.0]))
    assert zones_of(objective.coefficients(small, 0)) == [A, B]
    not_a_number = make_table(teacher_entropy=torch.full((10,), math.nan))
    objective.coefficients(not_a_number, 0)
    assert objective.state_dict()["thresholds"] is None
    assert zones_of(objective.coefficients(make_table(), 1)) == ZONES
    assert objective.state_dict()["thresholds"] is not None


def test_absolute_thresholds_of_a_rank_sum_are_refused() -> None:
    with pytest.raises(UserError, match=r"zone_a_score = .*sum_rank.*use max_rank or student"):
        sead(zone_mode="absolute", zone_a_score="sum_rank")


def test_state_of_another_objective_is_refused() -> None:
    with pytest.raises(ValueError, match="not a state of sead"):
        sead().load_state_dict({})


def test_zones_do_not_depend_on_how_tokens_are_split_into_rollouts() -> None:
    one = make_table()
    many = TokenTable(
        offsets=torch.tensor([0, 3, 3, 4, 10]), teacher_entropy=TEACHER, student_entropy=STUDENT
    )
    first, second = (sead().coefficients(table, 0) for table in (one, many))
    assert torch.equal(first.weights, second.weights) and zones_of(first) == zones_of(second)
