"""Compares a conversion with its source bit by bit, piece by piece."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from sead_megatron.errors import UserError
from sead_megatron.models.convert import Conversion, Tensors, open_tensors
from sead_megatron.models.converted import TORCH_DIST, check_converted, is_distributed
from sead_megatron.models.hf_tensors import row_blocks
from sead_megatron.models.layouts import Vocabulary
from sead_megatron.models.stored_tensors import StoredTensors


def verify(plan: Conversion, directory: Path, advance: Callable[[int], None]) -> None:
    """Reads `directory`, which `plan` has written, and its source; every tensor must be the source's to the last bit,
    in the type that it was converted to.

    Raises UserError for the first tensor that is not, or for padding that is not zero.
    """
    if not directory.is_dir():
        raise UserError("OUT", str(directory), "no such directory", "convert first")
    if is_distributed(directory) != (plan.layout == TORCH_DIST):
        raise UserError(
            "OUT", str(directory), f"does not hold {plan.layout}", "give what SOURCE was converted to"
        )
    if is_distributed(directory):
        check_converted(directory)
    for path in directory.iterdir():
        if path.is_file():
            _forget_cached_pages(path)
    with plan.open_source() as source, open_tensors(directory, plan.config) as result:
        compare(source, result, plan.dtypes, directory, plan.options.chunk_bytes, advance)
        if isinstance(result, StoredTensors):
            for parameter in result.parameters:
                if isinstance(parameter.layout, Vocabulary) and _bits(result.padding(parameter)).any():
                    what = f"{directory}: {parameter.key}"
                    raise UserError(what, None, "its padding is not zero", _remedy())


def compare(
    source: Tensors,
    result: Tensors,
    dtypes: Mapping[str, torch.dtype],
    directory: Path,
    chunk_bytes: int,
    advance: Callable[[int], None],
) -> None:
    """UserError for the first of the tensors `dtypes` that differs."""
    for name, dtype in dtypes.items():
        what = f"{directory}: {name}"
        shape = source.shape(name)
        if result.shape(name) != shape or result.dtype(name) != dtype:
            found = [*result.shape(name), str(result.dtype(name))]
            raise UserError(what, found, f"must be {[*shape, str(dtype)]}", _remedy())
        for start, stop in row_blocks(shape, dtype.itemsize, chunk_bytes):
            wanted = source.read(name, 0, start, stop).to(dtype)
            found_rows = result.read(name, 0, start, stop)
            if not torch.equal(_bits(wanted), _bits(found_rows)):
                constraint = (
                    f"{_different(wanted, found_rows)} of its bytes in rows {start} to {stop - 1} differ"
                )
                raise UserError(what, None, f"{constraint} from the source's", _remedy())
            advance(wanted.nbytes)


def _bits(tensor: Tensor) -> Tensor:
    """As bytes: a NaN equals itself, and zeros of both signs differ."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def _different(wanted: Tensor, found: Tensor) -> int:
    return int((_bits(wanted) != _bits(found)).sum())


def _forget_cached_pages(path: Path) -> None:
    """The comparison is with what the disk holds, not with what is still in memory of it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _remedy() -> str:
    return "check the disk, and convert again with --overwrite"
