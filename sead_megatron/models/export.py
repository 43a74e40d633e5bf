"""This rank's shards -> full Hugging Face tensors, as a stream that every rank of a replica walks together.

The stream gathers parameters in buckets: one all-gather over the tensor-parallel group and one broadcast over the
pipeline group a bucket. Every yielded tensor has storage of its own, since consumers keep references.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from sead_megatron.models.build import BuiltModel
from sead_megatron.models.converted import companion_files
from sead_megatron.models.family import WeightRule

MIB = 1 << 20


@dataclass(frozen=True)
class _Entry:
    """One parameter of a stage's export plan (the same on every rank of the replica)."""

    name: str
    shape: torch.Size
    rule: WeightRule

    def hf_shapes(self, model: BuiltModel) -> list[torch.Size]:
        shards = [torch.empty(self.shape, device="meta")] * model.groups.layout.tensor
        return [tensor.shape for tensor in self.rule.layout.merge(shards, model.config)]


def _stage_plans(model: BuiltModel) -> list[list[_Entry]]:
    """For every pipeline stage, its parameters in order."""
    mine = [
        _Entry(name, parameter.shape, rule)
        for name, parameter in model.module.named_parameters()
        if not (rule := model.weights.rule(name)).is_tied_copy
    ]
    plans: list[list[_Entry]] = [[] for _ in range(model.groups.layout.pipeline)]
    dist.all_gather_object(plans, mine, group=model.groups.collection.pp)
    return plans


def _buckets(plan: Sequence[_Entry], bytes_per_element: int, limit: int) -> Iterator[list[_Entry]]:
    bucket: list[_Entry] = []
    size = 0
    for entry in plan:
        entry_bytes = entry.shape.numel() * bytes_per_element
        if bucket and size + entry_bytes > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append(entry)
        size += entry_bytes
    if bucket:
        yield bucket


def _gather_over_tp(model: BuiltModel, bucket: Sequence[_Entry]) -> list[list[Tensor]]:
    """Hugging Face tensors of one bucket on the stage that owns it."""
    parameters = dict(model.module.named_parameters())
    local = torch.cat([parameters[entry.name].detach().flatten() for entry in bucket])
    size = model.groups.layout.tensor
    gathered = [torch.empty_like(local) for _ in range(size)]
    dist.all_gather(gathered, local, group=model.groups.collection.tp)
    shards = [flat.split([entry.shape.numel() for entry in bucket]) for flat in gathered]
    return [
        entry.rule.layout.merge([rank_shards[i].view(entry.shape) for rank_shards in shards], model.config)
        for i, entry in enumerate(bucket)
    ]


def _broadcast_over_pp(
    model: BuiltModel, stage: int, bucket: Sequence[_Entry], merged: list[list[Tensor]] | None
) -> list[list[Tensor]]:
    """Sends one bucket's Hugging Face tensors from the owning stage to the other stages."""
    group = model.groups.collection.pp
    shapes = [entry.hf_shapes(model) for entry in bucket]
    parameter = next(model.module.parameters())
    if merged is None:
        total = sum(shape.numel() for per_entry in shapes for shape in per_entry)
        flat = torch.empty(total, dtype=parameter.dtype, device=parameter.device)
    else:
        flat = torch.cat([tensor.flatten() for tensors in merged for tensor in tensors])
    dist.broadcast(flat, src=dist.get_process_group_ranks(group)[stage], group=group)
    if merged is not None:
        return merged
    parts = iter(flat.split([shape.numel() for per_entry in shapes for shape in per_entry]))
    return [[next(parts).view(shape).clone() for shape in per_entry] for per_entry in shapes]


class HFStream:
    """The weights of a replica as full Hugging Face tensors, again and again (a collective to build and to walk).

    Every rank of the replica must walk the whole stream; all of them yield the same tensors in the same order.
    """

    def __init__(self, model: BuiltModel, bucket_mib: int = 256) -> None:
        self._model = model
        self._limit = bucket_mib * MIB
        self._plans = _stage_plans(model)

    @property
    def names(self) -> set[str]:
        """Names that a complete stream yields."""
        return {name for plan in self._plans for entry in plan for name in entry.rule.hf_names}

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yields (Hugging Face name, full tensor) with the current weights."""
        model = self._model
        element_bytes = next(model.module.parameters()).element_size()
        for stage, plan in enumerate(self._plans):
            for bucket in _buckets(plan, element_bytes, self._limit):
                merged = _gather_over_tp(model, bucket) if stage == model.groups.pp_rank else None
                if model.groups.layout.pipeline > 1:
                    merged = _broadcast_over_pp(model, stage, bucket, merged)
                if merged is None:
                    raise RuntimeError(f"stage {stage} belongs to no rank of a pipeline of one")
                for entry, tensors in zip(bucket, merged, strict=True):
                    yield from zip(entry.rule.hf_names, tensors, strict=True)


def export_directory(
    model: BuiltModel, source: str | Path, target: str | Path, *, write: bool, shard_gib: float = 4.0
) -> None:
    """Writes a Hugging Face directory: config and tokenizer files of `source`, weights of the model.

    A collective over the replica; only the rank with `write=True` touches the disk. Sharded with an index when
    larger than `shard_gib`; the target appears complete or not at all.
    """
    target = Path(target)
    partial = target.with_name(target.name + ".partial")
    if write:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    shard: dict[str, Tensor] = {}
    files: list[list[str]] = []
    size = total = 0

    def flush() -> None:
        if write and shard:
            save_file(shard, partial / f"shard-{len(files)}.safetensors", metadata={"format": "pt"})
            files.append(list(shard))
        shard.clear()

    for name, tensor in HFStream(model):
        tensor_bytes = tensor.numel() * tensor.element_size()
        if size + tensor_bytes > shard_gib * (1 << 30):
            flush()
            size = 0
        if write:
            shard[name] = tensor.cpu().contiguous()
        size, total = size + tensor_bytes, total + tensor_bytes
    flush()
    if write:
        _finish_directory(Path(source), partial, files, total)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)


def _finish_directory(source: Path, partial: Path, files: list[list[str]], total_bytes: int) -> None:
    """Gives the shards their final names, writes the index and copies everything that is not a weight."""
    width = max(5, int(math.log10(len(files))) + 1)
    weight_map = {}
    for number, names in enumerate(files):
        final = (
            "model.safetensors"
            if len(files) == 1
            else f"model-{number + 1:0{width}d}-of-{len(files):0{width}d}.safetensors"
        )
        (partial / f"shard-{number}.safetensors").rename(partial / final)
        weight_map.update(dict.fromkeys(names, final))
    if len(files) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for path in companion_files(source):
        shutil.copy2(path, partial / path.name)
