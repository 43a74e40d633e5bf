"""The weights of a checkpoint for an engine, without a Megatron model in between."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from sead_megatron.models.convert import open_tensors
from sead_megatron.models.converted import check_converted, is_distributed
from sead_megatron.models.family import WeightMap, is_ignored
from sead_megatron.models.hf_config import read_hf_config
from sead_megatron.models.registry import FAMILIES
from sead_megatron.models.safetensors_index import check_tensors, read_index
from sead_megatron.models.stored_tensors import find_parameters, read_metadata


class CheckpointWeights:
    """Full Hugging Face tensors of a directory, in the type they are stored in (a `WeightSource`).

    The directory is a Hugging Face one, one that `tools/convert_checkpoint.py` wrote, or a checkpoint of a run, which
    has no config.json: `model` is then the directory of the model that the run trained. Every rank reads for itself,
    one tensor at a time.
    """

    def __init__(self, directory: str | Path, model: str | Path | None = None) -> None:
        """Reads headers only.

        Raises UserError: tensors that lack, have another shape or type, or that config.json does not have; files that
        are missing or cut short.
        """
        self._directory = Path(directory)
        self._config = read_hf_config(directory if model is None else model)
        shapes = WeightMap(FAMILIES[self._config.architecture], self._config).hf_shapes()
        if not is_distributed(directory):
            check_tensors(read_index(directory), shapes, lambda name: is_ignored(self._config, name))
        else:
            if model is None:
                check_converted(directory)
            find_parameters(directory, self._config, read_metadata(directory))
        self._names = list(shapes)

    @property
    def names(self) -> set[str]:
        """What a complete stream holds; a tied output layer is not in it."""
        return set(self._names)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yields (Hugging Face name, tensor), each in storage of its own, in the order of the layers."""
        with open_tensors(self._directory, self._config) as tensors:
            for name in self._names:
                yield name, tensors.read(name)
