"""Tile kernels of the ``torch`` backend: in-place elementwise passes, any device, float32 and float64."""

from __future__ import annotations

import torch
from torch import Tensor

from .entropy_state import merge_rows
from .pointwise import RuleNumbers
from .state import merge
from .topk import largest, merge_largest


class TorchTiles:
    """See :class:`tile_kernels.TileKernels`."""

    stats_keeps_tiles = False
    stats_scratch, entropy_scratch, gradient_scratch, pointwise_scratch = 2, 1, 1, 4

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """None: plain torch runs on every device."""
        return None

    def stats(
        self, z: Tensor, w: Tensor, scratch: list[Tensor], columns: Tensor, scale: float, state: Tensor
    ) -> None:
        exp, delta = scratch
        _scale(z, scale)
        _scale(w, scale)
        z_y, w_y = _sampled_logit(z, columns), _sampled_logit(w, columns)
        m_s, m_t = z.amax(1), w.amax(1)
        z.sub_(m_s[:, None])
        w.sub_(m_t[:, None])
        torch.sub(z, w, out=delta)
        torch.exp(z, out=exp)
        s_s, u_s, x_s = exp.sum(1), z.mul_(exp).sum(1), exp.mul_(delta).sum(1)
        torch.exp(w, out=exp)
        s_t, u_t, x_t = exp.sum(1), w.mul_(exp).sum(1), exp.mul_(delta).sum(1)
        tile = torch.stack([m_s, s_s, u_s, x_s, m_t, s_t, u_t, x_t, z_y, w_y])
        state.copy_(merge(state, tile))

    def entropy(self, z: Tensor, scratch: list[Tensor], columns: Tensor, scale: float, rows: Tensor) -> None:
        (exp,) = scratch
        _scale(z, scale)
        z_y, m = _sampled_logit(z, columns), z.amax(1)
        torch.exp(z.sub_(m[:, None]), out=exp)
        rows.copy_(merge_rows(rows, torch.stack([m, exp.sum(1), z.mul_(exp).sum(1), z_y])))

    def topk(
        self, z: Tensor, scratch: list[Tensor], first_id: int, scale: float, logits: Tensor, ids: Tensor
    ) -> None:
        # Scaled before they are compared: logits that differ can be equal after it.
        scaled = z if scale == 1.0 else torch.mul(z, scale, out=scratch[0])
        tile = largest(scaled, min(logits.shape[1], z.shape[1]), first_id)
        merged = merge_largest((logits, ids), tile, logits.shape[1])
        logits.copy_(merged[0])
        ids.copy_(merged[1])

    def gradient(
        self,
        z: Tensor,
        w: Tensor,
        scratch: list[Tensor],
        columns: Tensor,
        scale: float,
        scalars: Tensor,
        dz: Tensor,
    ) -> None:
        (p,) = scratch
        student_lse, teacher_lse, offset, difference, entropy, forward, logprob = scalars[:, :, None].unbind(
            0
        )
        _scale(w, scale).sub_(teacher_lse)
        torch.exp(_scale(z, scale).sub_(student_lse), out=p)
        z.sub_(w)
        torch.addcmul(offset, z, difference, out=z)
        z.addcmul_(w, entropy, value=-1)
        z.mul_(p).addcmul_(w.exp_(), forward, value=-1)
        owned = _owned(columns, z.shape[1])
        # One column per row: the scatter has no collisions, hence one possible result.
        column = columns.clamp(0, z.shape[1] - 1)[:, None]
        z.scatter_add_(1, column, torch.where(owned[:, None], logprob, 0.0))
        if dz is not z:
            dz.copy_(z)

    def support_gradient(
        self,
        z: Tensor,
        scratch: list[Tensor],
        scale: float,
        scalars: Tensor,
        columns: Tensor,
        values: Tensor,
        dz: Tensor,
    ) -> None:
        (p,) = scratch
        lse, offset, slope = scalars[:, :, None].unbind(0)
        torch.exp(_scale(z, scale).sub_(lse), out=p)
        torch.addcmul(offset, z, slope, out=z).mul_(p)
        # Foreign columns go to the spare one behind the tile, whose content nobody reads.
        width = z.shape[1]
        extended = z.as_strided((z.shape[0], width + 1), z.stride(), z.storage_offset())
        extended.scatter_(1, torch.where(_owned(columns, width), columns, width), values)
        if dz is not z:
            dz.copy_(z)

    def pointwise_stats(
        self,
        z: Tensor,
        w: Tensor,
        scratch: list[Tensor],
        scale: float,
        lse: Tensor,
        rule: RuleNumbers,
        sums: Tensor,
    ) -> None:
        _scale(z, scale).sub_(lse[0][:, None])
        _scale(w, scale).sub_(lse[1][:, None])
        value, moment = _pointwise_entries(z, w, scratch, rule)
        sums[0] += value.sum(1)
        sums[1] += moment.sum(1)
        sums[2] += z.sum(1)
        sums[3] += z.sub_(w).abs_().sum(1)

    def pointwise_gradient(
        self,
        z: Tensor,
        w: Tensor,
        scratch: list[Tensor],
        scale: float,
        scalars: Tensor,
        rule: RuleNumbers,
        dz: Tensor,
    ) -> None:
        student_lse, teacher_lse, mean, coefficient = scalars[:, :, None].unbind(0)
        _scale(z, scale).sub_(student_lse)
        _scale(w, scale).sub_(teacher_lse)
        _, moment = _pointwise_entries(z, w, scratch, rule)
        z.mul_(mean)
        dz.copy_(torch.sub(moment, z, out=z).mul_(coefficient))


def _pointwise_entries(
    log_p: Tensor, log_q: Tensor, scratch: list[Tensor], rule: RuleNumbers
) -> tuple[Tensor, Tensor]:
    """(min(f, clip), p g) of every entry, in scratch tiles, by the formulas of ``pointwise``.

    ``log_p`` and ``log_q`` become p and q.
    """
    ratio, log_sum, share, value = scratch
    torch.sub(log_p, log_q, out=ratio)
    lean = torch.add(ratio, rule.log_student - rule.log_teacher, out=log_sum)
    torch.sigmoid(lean, out=share)
    lean.abs_().neg_().exp_().log1p_()
    p, q = log_p.exp_(), log_q.exp_()
    torch.neg(ratio, out=value).sub_(rule.log_student).clamp_(max=-rule.log_teacher).sub_(log_sum)
    value.mul_(q).mul_(rule.teacher_term)
    moment = ratio.sub_(rule.log_teacher).clamp_(max=-rule.log_student).sub_(log_sum)  # ln(p/m)
    value.add_(torch.mul(moment, p, out=log_sum), alpha=rule.student_term)
    moment.add_(1).sub_(share).mul_(p).mul_(rule.student_term)
    moment.addcmul_(q, share, value=-rule.teacher_term)
    if rule.clip < float("inf"):
        moment.masked_fill_(value > rule.clip, 0)
        value.clamp_(max=rule.clip)
    return value, moment


def _scale(tile: Tensor, scale: float) -> Tensor:
    return tile if scale == 1.0 else tile.mul_(scale)


def _owned(columns: Tensor, width: int) -> Tensor:
    return (columns >= 0) & (columns < width)


def _sampled_logit(logits: Tensor, columns: Tensor) -> Tensor:
    """Dense on purpose: selecting the owned rows would synchronise a CUDA stream for every tile."""
    picked = logits.gather(1, columns.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    return torch.where(_owned(columns, logits.shape[1]), picked, torch.zeros_like(picked))
