"""Mistakes that a conversion makes easily, put in on purpose: the comparison must see each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch


@dataclasses.dataclass(frozen=True)
class ConcatenatedQKV:
    """The wrong layout of `linear_qkv`: all query heads, all key heads, all value heads."""

    partition_dim = 0

    def read_shard(
        self, source: Any, names: Sequence[str], rank: int, size: int, local_shape: Sequence[int]
    ) -> torch.Tensor:
        widths = [source.shape(name)[0] // size for name in names]
        return torch.cat(
            [source.read(name, 0, rank * w, (rank + 1) * w) for name, w in zip(names, widths, strict=True)]
        )


def _swapped_gate_and_up(name: str, entry: Any) -> Any:
    layout, shapes = entry
    swapped = name.endswith("linear_fc1.weight")
    return (layout, dict(reversed(shapes.items()))) if swapped else entry


def _concatenated_qkv(name: str, entry: Any) -> Any:
    return (ConcatenatedQKV(), entry[1]) if name.endswith("linear_qkv.weight") else entry


def _swapped_qk_norms(name: str, entry: Any) -> Any:
    layout, shapes = entry
    swap = {"self_attn.q_norm.weight": "self_attn.k_norm.weight"}
    swap |= {there: here for here, there in swap.items()}
    return layout, {swap.get(hf, hf): shape for hf, shape in shapes.items()}


TABLE_FAULTS: dict[str, Callable[[str, Any], Any]] = {
    "swapped gate and up": _swapped_gate_and_up,
    "concatenated q k v": _concatenated_qkv,
    "swapped q and k norms": _swapped_qk_norms,
}


def _rope(**changes: Any) -> Callable[[Any], Any]:
    return lambda config: dataclasses.replace(config, rope=dataclasses.replace(config.rope, **changes))


def _without_attention_factor(config: Any) -> Any:
    scaling = dataclasses.replace(config.rope.scaling, attention_factor=1.0)
    return _rope(scaling=scaling)(config)


CONFIG_FAULTS: dict[str, Callable[[Any], Any]] = {
    "wrong eps": lambda config: dataclasses.replace(config, rms_norm_eps=1e-6),
    "no rope scaling": _rope(scaling=None),
    "another rope base": _rope(theta=10000.0),
    "window off by one": lambda config: dataclasses.replace(config, sliding_window=config.sliding_window + 1),
    "YaRN everywhere": _rope(scales_sliding_layers=True),
    "no attention factor": _without_attention_factor,
}


def _no_sum_over_ranks(x: torch.Tensor, group: Any) -> torch.Tensor:
    return x * group.size()


def _no_sum_of_gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    return grad, None


CODE_FAULTS: dict[str, tuple[str, Any]] = {
    "QK norm without all-reduce": (
        "sead_megatron.models.sublayers._SumOverRanks.apply",
        staticmethod(_no_sum_over_ranks),
    ),
    "QK norm without backward all-reduce": (
        "sead_megatron.models.sublayers._SumOverRanks.backward",
        staticmethod(_no_sum_of_gradients),
    ),
    "linear sublayer of this rank only": (
        "sead_megatron.models.sublayers.gather_from_tensor_model_parallel_region",
        lambda columns, group: columns.repeat(1, 1, group.size()),
    ),
    "norms after the sublayers left out": (
        "sead_megatron.models.sublayers.NormedResidualAdd._add",
        lambda self, output, residual, dropout: residual + output[0],
    ),
}
FAULTS = (*TABLE_FAULTS, *CONFIG_FAULTS, *CODE_FAULTS, "QK norm gradients not summed over TP")


def faulty_config(config: Any, fault: str | None) -> Any:
    """A model's HFConfig, wrong in one field when the fault is one of the config."""
    return CONFIG_FAULTS[fault](config) if fault in CONFIG_FAULTS else config


@contextmanager
def faulty_code(architecture: str, fault: str | None) -> Iterator[None]:
    """Puts a wrong weight table into the registry, or a wrong function into a module."""
    if fault in CODE_FAULTS:
        with mock.patch(*CODE_FAULTS[fault]):
            yield
        return
    if fault not in TABLE_FAULTS:
        yield
        return
    from sead_megatron.models.registry import FAMILIES

    family = FAMILIES[architecture]

    def wrong(config: Any, layer: Any) -> Any:
        table = family.layer_weights(config, layer)
        return {name: TABLE_FAULTS[fault](name, entry) for name, entry in table.items()}

    with mock.patch.dict(FAMILIES, {architecture: dataclasses.replace(family, layer_weights=wrong)}):
        yield
