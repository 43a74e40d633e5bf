"""Every objective's gradient against finite differences of its published loss.

The losses are written from the papers, per token and with plain loops, and share nothing with the objectives. What a
paper detaches (advantages, gates, weights) is computed once, at the student's own logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.objective_world import World, finite_differences, loss_gradient, make_objective, make_world

Loss = Callable[[Tensor], Tensor]


def entropy(logits: Tensor) -> Tensor:
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    p = teacher.softmax(-1)
    return (p * (p.log() - student.log_softmax(-1))).sum(-1)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    q = student.softmax(-1)
    return (q * (q.log() - teacher.log_softmax(-1))).sum(-1)


def policy_loss(world: World, advantage: Tensor, normalizer: float) -> Loss:
    """``-1/n sum A log q(y)``."""
    return lambda z: -(advantage * world.sampled(z.log_softmax(-1))).sum() / normalizer


def log_ratio(world: World) -> Tensor:
    return world.sampled(world.teacher.log_softmax(-1)) - world.sampled(world.student.log_softmax(-1))


def opd_full(world: World) -> Loss:
    return lambda z: reverse_kl(z, world.teacher).mean()


def opd_sampled(world: World) -> Loss:
    return policy_loss(world, log_ratio(world), world.num_tokens)


def lightning_clipped(world: World) -> Loss:
    return policy_loss(world, log_ratio(world).clamp(-0.5, 0.5), world.num_tokens)


def opd_off_temperature(world: World) -> Loss:
    ratio = world.sampled(world.student.softmax(-1)) / world.sampled((world.student / 0.7).softmax(-1))
    return policy_loss(world, log_ratio(world) * ratio.clamp(max=1.2), world.num_tokens)


def tip(world: World) -> Loss:
    def scaled(x: Tensor) -> Tensor:
        return (x - x.min()) / (x.max() - x.min())

    h, d = scaled(entropy(world.student)), scaled(reverse_kl(world.student, world.teacher))
    score = h + d - h * d
    kept = sorted(range(world.num_tokens), key=lambda i: float(score[i]))[
        -math.ceil(world.num_tokens * 0.5) :
    ]
    return lambda z: reverse_kl(z, world.teacher)[kept].mean()


def reopold_first(world: World) -> Loss:
    floor = math.log(0.1) / 0.9
    kept = log_ratio(world) >= floor
    return policy_loss(world, log_ratio(world) * kept, int(kept.sum()))


def reopold_second(world: World) -> Loss:
    h = entropy(world.student)
    kept = torch.zeros(world.num_tokens)
    kept[sorted(range(world.num_tokens), key=lambda i: float(h[i]))[-math.ceil(world.num_tokens * 0.2) :]] = 1
    return policy_loss(world, log_ratio(world).clamp(min=math.log(0.1) / 0.9) * kept, int(kept.sum()))


def vopd(world: World) -> Loss:
    value = -reverse_kl(world.student, world.teacher)
    return policy_loss(world, log_ratio(world) - value, world.num_tokens)


def gopd(world: World) -> Loss:
    p, q, ref = (
        world.sampled(logits.log_softmax(-1)) for logits in (world.teacher, world.student, world.reference)
    )
    return policy_loss(world, 1.25 * (p - ref) - (q - ref), world.num_tokens)


def group_advantage(world: World, reward: Tensor) -> list[float]:
    result = []
    for i, group in enumerate(world.facts.group.tolist()):
        own = [float(reward[j]) for j in range(len(reward)) if int(world.facts.group[j]) == group]
        mean = sum(own) / len(own)
        std = math.sqrt(sum((r - mean) ** 2 for r in own) / (len(own) - 1))
        result.append((float(reward[i]) - mean) / std if std else 0.0)
    return result


def per_token(world: World, values: list[float]) -> Tensor:
    return torch.tensor(
        [v for v, s in zip(values, world.slices(), strict=True) for _ in range(s.stop - s.start)],
        dtype=torch.float64,
    )


def grpo(world: World) -> Loss:
    return policy_loss(world, per_token(world, group_advantage(world, world.facts.reward)), world.num_tokens)


def grpo_sequences_overlong_and_reference(world: World) -> Loss:
    """GRPO's sequence mean, DAPO's overlong penalty over the last 4 of 8 tokens, k3 to the reference."""
    lengths = [s.stop - s.start for s in world.slices()]
    penalty = torch.tensor([min(1.0, max(0.0, (n - 4) / 4)) for n in lengths], dtype=torch.float64)
    advantage = per_token(world, group_advantage(world, world.facts.reward - penalty))

    def loss(z: Tensor) -> Tensor:
        log_q = world.sampled(z.log_softmax(-1))
        log_r = world.sampled(world.reference.log_softmax(-1)) - log_q
        tokens = -advantage * log_q + 0.04 * (log_r.exp() - log_r - 1)
        means = [tokens[s].mean() for s in world.slices() if s.stop > s.start]
        return torch.stack(means).mean()

    return loss


def sampling_ratio(world: World) -> Tensor:
    return world.sampled(world.student.softmax(-1)) / world.sampled((world.student / 0.7).softmax(-1))


def mopd(world: World) -> Loss:
    """Log-ratio plus half of the group's advantage; a token with a ratio outside [0.8, 1.2] is left out."""
    outcome = per_token(world, group_advantage(world, world.facts.reward))
    ratio = sampling_ratio(world)
    inside = [0.8 <= float(r) <= 1.2 for r in ratio]
    assert 3 <= sum(inside) <= world.num_tokens - 3
    weights = [float(r) if i else 0.0 for r, i in zip(ratio, inside, strict=True)]
    advantage = torch.tensor(weights, dtype=torch.float64) * (log_ratio(world) + 0.5 * outcome)

    def loss(z: Tensor) -> Tensor:
        return sequence_mean(world, -advantage * world.sampled(z.log_softmax(-1)))

    return loss


def mopd_without_outcomes(world: World) -> Loss:
    return policy_loss(world, sampling_ratio(world) * log_ratio(world), world.num_tokens)


def egrsd(window: int) -> Callable[[World], Loss]:
    def loss(world: World) -> Loss:
        lengths = [s.stop - s.start for s in world.slices()]
        rewards = [
            float(r) * (1 + 0.1 * (1 - n / 8)) for r, n in zip(world.facts.reward, lengths, strict=True)
        ]
        mean = sum(rewards) / len(rewards)
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
        direction = [(r - mean) / std for r in rewards]
        h, gap = entropy(world.teacher), log_ratio(world)
        top = max(1.0, float(h.max()))
        advantage = torch.zeros(world.num_tokens, dtype=torch.float64)
        for a, tokens in zip(direction, world.slices(), strict=True):
            for t in range(tokens.start, tokens.stop):
                smallest = min(float(h[j]) / top for j in range(t, min(t + window, tokens.stop - 1) + 1))
                weight = min(1.2, max(0.8, math.exp(math.copysign(1, a) * float(gap[t]))))
                advantage[t] = a * weight * min(1.0, max(0.1, 1 - 0.1 * smallest))
        return policy_loss(world, advantage, world.num_tokens)

    return loss


def dasd(world: World) -> Loss:
    h, gap = entropy(world.student), log_ratio(world)
    advantage = per_token(world, group_advantage(world, world.facts.reward))
    for tokens in world.slices():
        if tokens.start == tokens.stop:
            continue
        own, inside = h[tokens], gap[tokens]
        tau = torch.quantile(own, 0.8)
        sigma = (own - own.mean()).abs().mean() + 1e-6
        d = (inside - inside.mean()) / (inside.std(correction=0) + 1e-6)
        advantage[tokens] += 0.1 * torch.tanh((tau - own) / sigma) * torch.sigmoid(d.abs() - 1) * d
    return policy_loss(world, advantage, world.num_tokens)


def sekd(world: World) -> Loss:
    h = entropy(world.student)
    kept = []
    for tokens in world.slices():
        order = sorted(range(tokens.start, tokens.stop), key=lambda i: float(h[i]), reverse=True)
        kept.append(order[: math.ceil(0.2 * len(order))])
    return lambda z: torch.stack([forward_kl(z, world.teacher)[k].mean() for k in kept if k]).mean()


def scope(world: World) -> Loss:
    """Of right rollouts the weighted likelihood, of wrong ones the weighted log-ratio."""
    q, p = world.sampled(world.student.log_softmax(-1)), world.sampled(world.teacher.log_softmax(-1))
    slices, rewards = world.slices(), world.facts.reward.tolist()
    mean_q, mean_p = ([float(x[s].mean()) if s.stop > s.start else 0.0 for s in slices] for x in (q, p))
    advantage = torch.zeros(world.num_tokens, dtype=torch.float64)
    for i, tokens in enumerate(slices):
        peers = [
            j for j in range(len(slices)) if rewards[j] == rewards[i] and int(world.facts.group[j]) == i // 3
        ]
        scores = [-mean_q[j] if rewards[i] else mean_p[j] for j in peers]
        own = -mean_q[i] if rewards[i] else mean_p[i]
        weight = len(peers) * math.exp(own) / sum(math.exp(score) for score in scores)
        advantage[tokens] = weight * (1.0 if rewards[i] else (p - q)[tokens])
    return policy_loss(world, advantage, world.num_tokens)


def paced(divergence: Callable[[Tensor, Tensor], Tensor]) -> Callable[[World], Loss]:
    def loss(world: World) -> Loss:
        assert world.facts.difficulty is not None
        weights = [float(d) * (1 - float(d)) for d in world.facts.difficulty]
        pairs = [(w, s) for w, s in zip(weights, world.slices(), strict=True) if s.stop > s.start]

        def value(z: Tensor) -> Tensor:
            per = divergence(z, world.teacher)
            return torch.stack([w * per[s].mean() for w, s in pairs]).sum() / sum(w for w, _ in pairs)

        return value

    return loss


def drkl(world: World) -> Loss:
    """Binary KL on the teacher's likeliest token plus gamma times the KL of the other tokens among themselves."""
    return drkl_on([max(range(len(row)), key=row.__getitem__) for row in world.teacher.tolist()], world)


def drkl_sampled(world: World) -> Loss:
    return drkl_on(world.labels.tolist(), world)


def drkl_on(targets: list[int], world: World) -> Loss:
    def loss(z: Tensor) -> Tensor:
        q, p = z.softmax(-1), world.teacher.softmax(-1)
        total = torch.zeros((), dtype=torch.float64)
        for t, y in enumerate(targets):
            others = [v for v in range(z.shape[1]) if v != y]
            s, r = q[t, y], p[t, y]
            binary = s * (s / r).log() + (1 - s) * ((1 - s) / (1 - r)).log()
            q_hat, p_hat = q[t, others] / (1 - s), p[t, others] / (1 - r)
            total = total + binary + 0.5 * (q_hat * (q_hat / p_hat).log()).sum()
        return total / world.num_tokens

    return loss


def decoupled(world: World) -> Loss:
    return lambda z: (0.3 * forward_kl(z, world.teacher) + 0.7 * reverse_kl(z, world.teacher)).mean()


def jsd(student: Tensor, teacher: Tensor, b: float) -> Tensor:
    q, p = student.softmax(-1), teacher.softmax(-1)
    m = b * p + (1 - b) * q
    return (b * p * (p / m).log() + (1 - b) * q * (q / m).log()).sum(-1)


def sequence_mean(world: World, per_token: Tensor) -> Tensor:
    return torch.stack([per_token[s].mean() for s in world.slices() if s.stop > s.start]).mean()


def gkd(b: float) -> Callable[[World], Loss]:
    return lambda world: lambda z: sequence_mean(world, jsd(z, world.teacher, b))


def gkd_skew(world: World) -> Loss:
    """DistiLLM's skew reverse KL."""

    def loss(z: Tensor) -> Tensor:
        q, p = z.softmax(-1), world.teacher.softmax(-1)
        return sequence_mean(world, (q * (q / (0.1 * q + 0.9 * p)).log()).sum(-1))

    return loss


def opsd(world: World) -> Loss:
    """Each entry's contribution is cut at 0.05 before the sum."""

    def loss(z: Tensor) -> Tensor:
        q, p = z.softmax(-1), world.teacher.softmax(-1)
        m = 0.5 * p + 0.5 * q
        entries = 0.5 * p * (p / m).log() + 0.5 * q * (q / m).log()
        return entries.clamp(max=0.05).sum(-1).mean()

    return loss


def pw_opsd(world: World) -> Loss:
    def loss(z: Tensor) -> Tensor:
        p = world.teacher.softmax(-1)
        clipped = (p * (p.log() - z.log_softmax(-1))).clamp(max=0.05).sum(-1)
        means = []
        for tokens in world.slices():
            length = tokens.stop - tokens.start
            if length:
                places = [(index - 0.5) / length for index in range(1, length + 1)]
                gates = [0.25 + 0.75 / (1 + math.exp(-(place - 0.3) / 0.1)) for place in places]
                means.append((torch.tensor(gates, dtype=torch.float64) * clipped[tokens]).mean())
        return torch.stack(means).mean()

    return loss


def eopd(world: World) -> Loss:
    """Sampled OPD plus, where the teacher's entropy exceeds 0.8 nat, the KL of its renormalised top 3."""
    gate, advantage = entropy(world.teacher) > 0.8, log_ratio(world)
    p = world.teacher.softmax(-1)
    top = p.topk(3, dim=-1)
    renormalised = top.values / top.values.sum(-1, keepdim=True)

    def loss(z: Tensor) -> Tensor:
        log_q = z.log_softmax(-1)
        forward = (renormalised * (renormalised.log() - log_q.gather(-1, top.indices))).sum(-1)
        return (-advantage * world.sampled(log_q) + 2.0 * gate * forward).sum() / world.num_tokens

    return loss


def topk_opd(world: World) -> Loss:
    q, p = world.student.softmax(-1), world.teacher.softmax(-1)
    ids = q.topk(3, dim=-1).indices
    on = q.gather(-1, ids)
    advantage = -(on / p.gather(-1, ids)).log() * on / on.sum(-1, keepdim=True)
    return lambda z: -(advantage * z.log_softmax(-1).gather(-1, ids)).sum(-1).mean()


def akl(world: World) -> Loss:
    """The head: the likeliest tokens of the teacher until they hold half of its probability."""
    q, p = world.student.softmax(-1), world.teacher.softmax(-1)
    weights = []
    for t in range(world.num_tokens):
        head, mass = [], 0.0
        for v in sorted(range(p.shape[1]), key=lambda v: -float(p[t, v])):
            if mass < 0.5:
                head.append(v)
                mass += float(p[t, v])
        gaps = (p[t] - q[t]).abs()
        weights.append(float(gaps[head].sum() / gaps.sum()))
    forward = torch.tensor(weights, dtype=torch.float64)
    return lambda z: (
        forward * forward_kl(z, world.teacher) + (1 - forward) * reverse_kl(z, world.teacher)
    ).mean()


ALL_TOKENS = {"ratio_low": 0.0, "reduce": "token_mean"}
# name, settings, step of four, published loss
CASES: dict[str, tuple[str, dict[str, Any], int, Callable[[World], Loss]]] = {
    "opd": ("opd", {}, 0, opd_full),
    "opd sampled": ("opd", {"form": "sampled"}, 0, opd_sampled),
    "opd off temperature": ("opd", {"form": "sampled", "importance_clip": 1.2}, 0, opd_off_temperature),
    "lightning": ("lightning", {}, 0, opd_sampled),
    "lightning, clipped": ("lightning", {"advantage_clip": 0.5}, 0, lightning_clipped),
    "tip": ("tip", {}, 0, tip),
    "reopold, first phase": ("reopold", {}, 1, reopold_first),
    "reopold, second phase": ("reopold", {}, 2, reopold_second),
    "vopd": ("vopd", {}, 0, vopd),
    "gopd": ("gopd", {}, 0, gopd),
    "grpo": ("grpo", {}, 0, grpo),
    "grpo, sequences, overlong, reference": (
        "grpo",
        {"reduce": "sequence_mean", "overlong_buffer": 4, "reference_kl": 0.04},
        0,
        grpo_sequences_overlong_and_reference,
    ),
    "mopd": ("mopd", {"outcome": 0.5, "ratio_low": 0.8, "ratio_high": 1.2}, 0, mopd),
    "mopd, tokens": ("mopd", {"outcome": 0.0, "ratio_high": 1e6, **ALL_TOKENS}, 0, mopd_without_outcomes),
    "egrsd": ("egrsd", {}, 0, egrsd(0)),
    "cl-egrsd": ("egrsd", {"look_ahead": 2}, 0, egrsd(2)),
    "dasd": ("dasd", {}, 0, dasd),
    "sekd": ("sekd", {}, 0, sekd),
    "scope": ("scope", {}, 0, scope),
    "paced, first": ("paced", {}, 1, paced(forward_kl)),
    "paced, then": ("paced", {}, 2, paced(reverse_kl)),
    "drkl": ("drkl", {}, 0, drkl),
    "drkl, sampled": ("drkl", {"target": "sampled"}, 0, drkl_sampled),
    "decoupled": ("decoupled", {"mu": 0.3}, 0, decoupled),
    "akl": ("akl", {"topk": 3}, 0, akl),
    "gkd": ("gkd", {"share": 0.3}, 0, gkd(0.3)),
    "gkd, skew": ("gkd", {"divergence": "skew_reverse", "share": 0.1}, 0, gkd_skew),
    "opsd": ("opsd", {}, 0, opsd),
    "pw-opsd": ("opsd", {"divergence": "forward", "positions": {}}, 0, pw_opsd),
    "eopd": ("eopd", {"topk": 3, "alpha": 2.0}, 0, eopd),
    "topk opd": ("topk_opd", {"topk": 3}, 0, topk_opd),
}


@pytest.mark.parametrize("case", CASES)
def test_gradient_is_that_of_the_published_loss(case: str) -> None:
    name, settings, step, published = CASES[case]
    world = make_world()
    objective = make_objective(name, **settings)
    coefficients = objective.coefficients(world.table(), step)
    reads_teacher = objective.config.needs_teacher and not objective.config.reads_cache
    gradient = loss_gradient(world, coefficients, has_teacher=reads_teacher)
    expected = finite_differences(published(world), world.student)
    assert float(expected.norm()) > 1e-3
    # Columns and coefficients are float32.
    assert float((gradient - expected).norm() / expected.norm()) <= 3e-6
