"""Hugging Face directory -> Megatron distributed checkpoint and back, in one process, with memory for a few chunks.

`plan_conversion` checks everything that can be checked without reading a tensor; `convert` writes file after file into
a directory beside the output, so that a killed conversion goes on at the file it was in.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sead_megatron.errors import UserError, alternatives
from sead_megatron.models.architecture import HFConfig
from sead_megatron.models.config_reader import read_json_object
from sead_megatron.models.converted import (
    SAFETENSORS,
    TORCH_DIST,
    Marker,
    check_converted,
    companion_files,
    config_hash,
    is_distributed,
    write_atomically,
)
from sead_megatron.models.distributed_writer import DistributedWriter
from sead_megatron.models.family import WeightMap, is_ignored
from sead_megatron.models.hf_config import read_hf_config
from sead_megatron.models.hf_tensors import (
    DTYPES,
    HFTensor,
    HFTensors,
    aligned,
    row_blocks,
    write_safetensors,
)
from sead_megatron.models.partial_directory import PartialDirectory, check_disk_space, check_output
from sead_megatron.models.registry import FAMILIES
from sead_megatron.models.safetensors_index import check_tensors, read_index
from sead_megatron.models.stored_layout import CHUNK_BYTES, StoredParameter, chunks, stored_parameters
from sead_megatron.models.stored_tensors import StoredTensors

GB = 10**9
DTYPE_CHOICES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# A header in front of every chunk, and the index.
_OVERHEAD_PER_CHUNK = 4096
_OVERHEAD = 1 << 20

Tensors = HFTensors | StoredTensors
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Options:
    """How to convert."""

    dtype: torch.dtype | None = None
    """Of all tensors; None keeps each one's."""
    shard_bytes: int = 5 * GB
    """Size of the files; one that is begun is what a kill loses."""
    chunk_bytes: int = CHUNK_BYTES
    """Size of the pieces that are held in memory."""
    overwrite: bool = False
    model: Path | None = None
    """Where config.json and tokenizer come from when the source is a checkpoint of a run, which has none."""


@dataclass(frozen=True)
class Conversion:
    """A checked conversion."""

    source: Path
    target: Path
    layout: str
    """What is written: `torch_dist` or `safetensors`."""
    companions: Path
    """Where config.json and tokenizer come from."""
    config: HFConfig
    parameters: tuple[StoredParameter, ...]
    dtypes: Mapping[str, torch.dtype]
    """What each Hugging Face tensor is written in."""
    source_dtypes: Mapping[str, torch.dtype]
    files: tuple[tuple[StoredParameter, ...], ...]
    """The parameters of each output file."""
    options: Options

    @property
    def tensor_bytes(self) -> int:
        """Of all Hugging Face tensors as they are written."""
        return sum(self.bytes_of(parameter) for parameter in self.parameters)

    @property
    def largest_tensor_bytes(self) -> int:
        """Of the largest Hugging Face tensor as it is written."""
        return max(tensor.bytes for parameter in self.parameters for tensor in self.hf_tensors(parameter))

    @property
    def needed_bytes(self) -> int:
        """Disk space of the whole output, rounded up."""
        pieces = sum(
            len(chunks(parameter, self.dtype(parameter).itemsize, self.options.chunk_bytes))
            for parameter in self.parameters
        )
        padding = sum(parameter.shape[0] * parameter.width for parameter in self.parameters)
        padding -= sum(parameter.hf_elements for parameter in self.parameters)
        copied = sum(path.stat().st_size for path in companion_files(self.companions))
        return self.tensor_bytes + padding * 4 + pieces * _OVERHEAD_PER_CHUNK + copied + _OVERHEAD

    def dtype(self, parameter: StoredParameter) -> torch.dtype:
        """What a parameter is written in."""
        return self.dtypes[next(iter(parameter.hf_shapes))]

    def hf_tensors(self, parameter: StoredParameter) -> list[HFTensor]:
        """A parameter's Hugging Face tensors as they are written."""
        return [HFTensor(name, shape, self.dtypes[name]) for name, shape in parameter.hf_shapes.items()]

    def bytes_of(self, parameter: StoredParameter) -> int:
        """Size of its Hugging Face tensors."""
        return parameter.hf_elements * self.dtype(parameter).itemsize

    @contextmanager
    def open_source(self) -> Iterator[Tensors]:
        """The source's tensors."""
        with open_tensors(self.source, self.config) as tensors:
            yield tensors

    def file_name(self, number: int) -> str:
        """Name of an output file."""
        if self.layout == TORCH_DIST:
            return DistributedWriter.file_name(number)
        count = len(self.files)
        return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"

    def identity(self) -> dict[str, object]:
        """What must be equal for a conversion to go on where another one stopped."""
        files = sorted(path for path in self.source.iterdir() if path.is_file())
        stats = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
        return {
            "source": str(self.source.resolve()),
            "source files": stats,
            "layout": self.layout,
            "dtype": str(self.options.dtype),
            "file sizes": [self.options.shard_bytes, self.options.chunk_bytes],
        }


@contextmanager
def open_tensors(directory: Path, config: HFConfig) -> Iterator[Tensors]:
    """The tensors of a directory of either kind under their Hugging Face names, read piece by piece."""
    if is_distributed(directory):
        with StoredTensors(directory, config) as stored:
            yield stored
    else:
        with HFTensors(read_index(directory)) as tensors:
            yield tensors


def plan_conversion(source: Path, target: Path, options: Options, *, writes: bool = True) -> Conversion:
    """Checks source, output and options; nothing is written and no tensor is read.

    `writes`: False for an output that is there to be compared.

    Raises UserError: an output that exists, a source that is incomplete, cut short or of an unsupported architecture,
    tensors that are not those of its config.json, tensors of several types that share a name in the checkpoint.
    """
    if not source.is_dir():
        raise UserError("SOURCE", str(source), "no such directory", "give the directory of a checkpoint")
    if writes:
        check_output(target, source, overwrite=options.overwrite)
    distributed = is_distributed(source)
    companions = source if options.model is None else options.model
    if options.model is not None and (not distributed or (source / "config.json").exists()):
        raise UserError(
            "--model",
            str(options.model),
            "the source has a config.json of its own",
            "leave the option out",
        )
    if distributed and options.model is None:
        if not (source / "config.json").is_file():
            raise UserError(
                str(source),
                None,
                "is a distributed checkpoint without config.json",
                "give --model DIR, the directory of the model that the run trained",
            )
        check_converted(source)
    config = read_hf_config(companions, "--model" if options.model else "SOURCE")
    if not distributed:
        shapes = WeightMap(FAMILIES[config.architecture], config).hf_shapes()
        check_tensors(read_index(source), shapes, lambda name: is_ignored(config, name))
    with open_tensors(source, config) as tensors:
        parameters = tensors.parameters if isinstance(tensors, StoredTensors) else stored_parameters(config)
        given = {name: tensors.dtype(name) for parameter in parameters for name in parameter.hf_shapes}
    _check_loadable(given, source)
    wanted = {name: options.dtype or dtype for name, dtype in given.items()}
    if not distributed:
        _check_one_type_a_name(parameters, wanted, source)
    layout = SAFETENSORS if distributed else TORCH_DIST
    files = tuple(_files(parameters, wanted, options.shard_bytes))
    return Conversion(
        source, target, layout, companions, config, tuple(parameters), wanted, given, files, options
    )


def _check_loadable(dtypes: Mapping[str, torch.dtype], source: Path) -> None:
    for name, dtype in dtypes.items():
        if dtype not in DTYPES.values():
            known = alternatives([_short(known) for known in DTYPES.values()])
            raise UserError(
                f"{source}: {name}", _short(dtype), f"must be {known}", "use an unquantized checkpoint"
            )


def _check_one_type_a_name(
    parameters: list[StoredParameter], dtypes: Mapping[str, torch.dtype], source: Path
) -> None:
    """A stored tensor has one type, whichever layers and Hugging Face tensors are in it."""
    types: dict[str, tuple[str, torch.dtype]] = {}
    for parameter in parameters:
        for name in parameter.hf_shapes:
            first, dtype = types.setdefault(parameter.key, (name, dtypes[name]))
            if dtypes[name] != dtype:
                raise UserError(
                    f"{source}: {name}",
                    _short(dtypes[name]),
                    f"must be {_short(dtype)} like {first}: {parameter.key} holds both",
                    "give --dtype",
                )


def _files(
    parameters: list[StoredParameter], dtypes: Mapping[str, torch.dtype], limit: int
) -> Iterator[tuple[StoredParameter, ...]]:
    """Runs of parameters of at most `limit` bytes, or one parameter."""
    run: list[StoredParameter] = []
    size = 0
    for parameter in parameters:
        own = parameter.hf_elements * dtypes[next(iter(parameter.hf_shapes))].itemsize
        if run and size + own > limit:
            yield tuple(run)
            run, size = [], 0
        run.append(parameter)
        size += own
    yield tuple(run)


def convert(
    plan: Conversion, advance: Advance, check: Callable[[Path], None] = lambda directory: None
) -> None:
    """Writes the output. Raises UserError when the disk is too small or another conversion was begun there.

    `advance` is told every step in bytes of Hugging Face tensors, those of files that a killed conversion finished at
    once; `check` sees the whole directory before it gets its name.
    """
    partial = PartialDirectory(plan.target)
    identity = plan.identity()
    if plan.options.overwrite and partial.path.exists():
        _restart_if_other(partial, identity)
    partial.check(identity)
    check_disk_space(plan.target, plan.needed_bytes - _size(partial.path))
    partial.open(identity)
    try:
        _fill(plan, partial, advance)
        try:
            check(partial.path)
        except UserError:
            # Nothing to go on with: the next conversion writes every file again.
            partial.remove()
            raise
        partial.commit()
    finally:
        partial.close()


def _fill(plan: Conversion, partial: PartialDirectory, advance: Advance) -> None:
    with plan.open_source() as source:
        write = _write_distributed if plan.layout == TORCH_DIST else _write_hf
        write(plan, source, partial, advance)
    _copy_companions(plan, partial.path)
    _write_marker(plan, partial.path)


def _restart_if_other(partial: PartialDirectory, identity: Mapping[str, object]) -> None:
    try:
        partial.check(identity)
    except UserError:
        partial.remove()


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _write_distributed(
    plan: Conversion, source: Tensors, partial: PartialDirectory, advance: Advance
) -> None:
    dtypes = {parameter.key: plan.dtype(parameter) for parameter in plan.parameters}
    writer = DistributedWriter(partial.path, plan.files, dtypes, plan.options.chunk_bytes)
    results = []
    for number, parameters in enumerate(plan.files):
        name = plan.file_name(number)
        note = partial.finished(name)
        if note is None:
            written = writer.write_file(number, source, advance)
            partial.finish(name, pickle.dumps(written))
        else:
            written = pickle.loads(note)
            advance(sum(plan.bytes_of(parameter) for parameter in parameters))
        results.append(written)
    writer.finish(results)


def _write_hf(plan: Conversion, source: Tensors, partial: PartialDirectory, advance: Advance) -> None:
    weight_map: dict[str, str] = {}
    for number, parameters in enumerate(plan.files):
        name = plan.file_name(number)
        tensors = aligned([tensor for parameter in parameters for tensor in plan.hf_tensors(parameter)])
        weight_map.update({tensor.name: name for tensor in tensors})
        if partial.finished(name) is None:
            blocks = _hf_blocks(tensors, source, plan.options.chunk_bytes, advance)
            write_safetensors(partial.path / name, tensors, blocks, metadata={"format": "pt"})
            partial.finish(name)
        else:
            advance(sum(tensor.bytes for tensor in tensors))
    if len(plan.files) > 1:
        index = {
            "metadata": {"total_size": plan.tensor_bytes},
            "weight_map": dict(sorted(weight_map.items())),
        }
        content = json.dumps(index, indent=2) + "\n"
        write_atomically(partial.path / "model.safetensors.index.json", content.encode())


def _hf_blocks(
    tensors: list[HFTensor], source: Tensors, chunk_bytes: int, advance: Advance
) -> Iterator[Tensor]:
    for tensor in tensors:
        for start, stop in row_blocks(tensor.shape, tensor.dtype.itemsize, chunk_bytes):
            block = source.read(tensor.name, 0, start, stop).to(tensor.dtype)
            yield block
            advance(block.nbytes)


def _copy_companions(plan: Conversion, directory: Path) -> None:
    for path in companion_files(plan.companions):
        shutil.copy2(path, directory / path.name)
    if plan.options.dtype is not None:
        # What loads "in the stored type" asks config.json.
        raw = read_json_object(directory / "config.json")
        for key in ("dtype", "torch_dtype"):
            if key in raw:
                raw[key] = _short(plan.options.dtype)
        write_atomically(directory / "config.json", (json.dumps(raw, indent=2) + "\n").encode())


def _write_marker(plan: Conversion, directory: Path) -> None:
    types = {_short(dtype) for dtype in plan.dtypes.values()}
    names = [plan.file_name(number) for number in range(len(plan.files))]
    if plan.layout == TORCH_DIST:
        names += DistributedWriter.INDEX_FILES
    elif len(names) > 1:
        names.append("model.safetensors.index.json")
    Marker(
        layout=plan.layout,
        architecture=plan.config.architecture,
        config_sha256=config_hash(plan.companions),
        dtype=types.pop() if len(types) == 1 else "mixed",
        tensors=len(plan.dtypes),
        bytes=plan.tensor_bytes,
        files={name: os.stat(directory / name).st_size for name in names},
    ).write(directory)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
