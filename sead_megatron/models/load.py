"""Hugging Face or converted directory -> this rank's shard. Each rank reads for itself, and only what it needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sead_megatron.errors import UserError
from sead_megatron.models.architecture import HFConfig
from sead_megatron.models.build import BuiltModel
from sead_megatron.models.converted import check_converted, is_distributed
from sead_megatron.models.layouts import TensorSource, Vocabulary, padded_vocab_size
from sead_megatron.models.safetensors_index import SafetensorsIndex, read_index
from sead_megatron.models.stored_tensors import StoredTensors
from sead_megatron.parallel.groups import ParallelGroups


class CheckpointReader:
    """Slices of the tensors of a Hugging Face directory, read lazily from (sharded) safetensors files."""

    def __init__(self, index: SafetensorsIndex, stack: ExitStack) -> None:
        self._index = index
        self._stack = stack
        self._files: dict[Path, Any] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor; UserError when it is missing."""
        if name not in self._index.tensors:
            raise UserError(
                str(self._index.directory), name, "the tensor is missing", "re-export the checkpoint"
            )
        return tuple(self._index.tensors[name].shape)

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) along `dim` (0 or 1) of a stored tensor."""
        self.shape(name)
        path = self._index.tensors[name].file
        if path not in self._files:
            self._files[path] = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        part = self._files[path].get_slice(name)
        return part[start:stop] if dim == 0 else part[:, start:stop]


@contextmanager
def open_checkpoint(directory: str | Path, config: HFConfig) -> Iterator[TensorSource]:
    """Opens the weights of a Hugging Face directory, or of one that `tools/convert_checkpoint.py` has written.

    Not through Megatron's own `dist_checkpointing.load`, which takes the whole world: teacher and student have groups
    of their own, and an output layer is read by some ranks only.
    """
    with ExitStack() as stack:
        if is_distributed(directory):
            check_converted(directory)
            yield stack.enter_context(StoredTensors(directory, config))
        else:
            yield CheckpointReader(read_index(Path(directory)), stack)


@torch.no_grad()
def load_weights(model: BuiltModel, directory: str | Path) -> None:
    """Fills every parameter of this rank's shard; UserError when a tensor is missing or has another shape."""
    groups = model.groups
    with open_checkpoint(directory, model.config) as source:
        for name, parameter in model.module.named_parameters():
            rule = model.weights.rule(name)
            shard = rule.layout.read_shard(
                source, rule.hf_names, groups.tp_rank, groups.layout.tensor, tuple(parameter.shape)
            )
            if shard.shape != parameter.shape:
                raise UserError(
                    f"{directory}: {', '.join(rule.hf_names)}",
                    tuple(shard.shape),
                    f"this rank's shard of {name} is {tuple(parameter.shape)}",
                    "make config.json describe the stored tensors",
                )
            # On the parameter's device first: FP8 parameters quantise what is copied into them.
            parameter.copy_(shard.to(device=parameter.device, dtype=parameter.dtype))


@torch.no_grad()
def load_output_shard(
    config: HFConfig, directory: str | Path, groups: ParallelGroups, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Rows of a model's output layer in another model's vocabulary partition: [padded vocabulary / TP, H].

    Used for the teacher's output layer, which lives on the student's last-stage ranks (`groups`).
    """
    name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    rows = padded_vocab_size(config.vocab_size, groups.layout.tensor) // groups.layout.tensor
    with open_checkpoint(directory, config) as source:
        shape = (rows, config.hidden_size)
        shard = Vocabulary().read_shard(source, [name], groups.tp_rank, groups.layout.tensor, shape)
    # A copy even where neither device nor type change: what safetensors hands out keeps the whole tensor alive.
    return torch.empty(shape, device=device, dtype=dtype).copy_(shard)
