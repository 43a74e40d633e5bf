"""Which part of Adam's state this rank holds, whatever kind of optimizer Megatron made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, eq=False)
class OwnedRange:
    """Elements [start, stop) of a parameter's flat shard, and the optimizer's tensors of them."""

    parameter: Tensor
    start: int
    stop: int
    master: Tensor
    """Float32, flat, stop - start elements; the parameter's own storage where that is float32."""
    state: dict[str, Any]
    """The optimizer's, by name; empty before the first update."""

    @property
    def has_own_master(self) -> bool:
        """Whether the master is more than the parameter itself."""
        return self.master.untyped_storage().data_ptr() != self.parameter.untyped_storage().data_ptr()

    def moment(self, name: str) -> Tensor:
        """A moment of the range, flat float32."""
        moment: Tensor = self.state[name]
        return moment.view(-1)


def _parts(megatron: Any) -> list[Any]:
    return list(getattr(megatron, "chained_optimizers", [megatron]))


def is_sharded(megatron: Any) -> bool:
    """Whether every replica owns another part (Megatron's distributed optimizer); otherwise all hold equal copies."""
    return all(hasattr(part, "gbuf_ranges") for part in _parts(megatron))


def owned_ranges(megatron: Any) -> Iterator[OwnedRange]:
    """What the optimizer of this rank updates, in its own order (megatron-core 0.16.1 and 0.19.2)."""
    for part in _parts(megatron):
        for parameter, start, stop, master in _masters(part):
            yield OwnedRange(parameter, start, stop, master.detach().view(-1), part.optimizer.state[master])


def _masters(part: Any) -> Iterator[tuple[Tensor, int, int, Tensor]]:
    inner = part.optimizer
    if hasattr(part, "gbuf_ranges"):
        buckets = [bucket for ranges in part.gbuf_ranges for all_ in ranges.values() for bucket in all_]
        for bucket in buckets:
            for parameter, ranges in bucket["param_map"].items():
                group, order = part.model_param_group_index_map[parameter]
                owned = ranges["param"]
                yield parameter, owned.start, owned.end, inner.param_groups[group]["params"][order]
        return
    # Float32 parameters are their own masters, those of other types have theirs as `main_param`.
    pairs = [(p, p) for group in inner.param_groups for p in group["params"]]
    if hasattr(part, "float16_groups"):
        pairs = [(p, p.main_param) for group in part.float16_groups for p in group]
        pairs += [(p, p) for group in part.fp32_from_fp32_groups for p in group]
    for parameter, master in pairs:
        yield parameter, 0, parameter.numel(), master


def applied_updates(megatron: Any) -> int:
    """Updates that Adam has made; 0 when every step so far was skipped, and then there are no moments."""
    counts = [0]
    for part in _parts(megatron):
        # Torch's Adam counts for each parameter, those of Transformer Engine and apex for each group.
        counts += [int(group["step"]) for group in part.optimizer.param_groups if "step" in group]
        counts += [int(state["step"]) for state in part.optimizer.state.values() if "step" in state]
    return max(counts)


def make_moments(megatron: Any, updates: int) -> None:
    """Gives an optimizer that has made no update the moments (zeros) and the count of one that made `updates`."""
    for part in _parts(megatron):
        inner = part.optimizer
        counts_each = isinstance(inner, (torch.optim.Adam, torch.optim.AdamW))
        for group in inner.param_groups:
            if not counts_each:
                group["step"] = updates
            for master in group["params"]:
                state = {name: torch.zeros_like(master, dtype=torch.float32) for name in MOMENTS}
                if counts_each:
                    state["step"] = torch.tensor(float(updates))
                inner.state[master] = state
