"""Compiles every kernel as shipped, without a GPU, and reports what the compiler made of it.

``python -m sead_kernels.split_kl.triton.aot`` prints a table; ``--json`` a list of objects. Limits are in
``budgets.toml``, checked by ``test_aot.py``.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..pointwise import RuleNumbers
from ..topk import MAX_TOPK
from .dz import dz_kernel, support_dz_kernel
from .entropy import entropy_kernel, topk_kernel
from .launch import EMPTY_KEY
from .pointwise import pointwise_dz_kernel, pointwise_stats_kernel
from .selected import gather_kernel, scatter_kernel
from .stats import stats_kernel
from .tile_sizes import (
    ARCHITECTURES,
    FLOAT32_TILES,
    GATHER_BLOCKS,
    SCATTER_BLOCKS,
    SELECTED_OPTIONS,
    TENSOR_CORE_TILES,
    tile_blocks,
)

_PROGRAMS = Path(triton.backends.nvidia.__file__).parent / "bin"
_GEMM_KERNELS = {
    "stats": stats_kernel,
    "entropy": entropy_kernel,
    "topk": topk_kernel,
    "dz": dz_kernel,
    "support_dz": support_dz_kernel,
    "pointwise_stats": pointwise_stats_kernel,
    "pointwise_dz": pointwise_dz_kernel,
}
_TOPK_SLOTS = [1 << i for i in range(MAX_TOPK.bit_length())]
_POINTERS = {
    "best_keys": "*i64",
    "columns": "*i32",
    "ids": "*i64",
    "logits": "*fp32",
    "scalars": "*fp32",
    "states": "*fp32",
    "values": "*fp32",
}
_FLOATS = ("scale", *RuleNumbers._fields)
_FORMATS = {"bf16": "", "fp32": "_fp32"}


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration: ``constants`` by parameter name, ``options`` of the compiler."""

    kernel: str
    arch: str
    function: triton.JITFunction
    format: str
    constants: dict[str, int]
    options: dict[str, object]

    def source(self) -> ASTSource:
        """What a launch compiles: no integer is specialised, every pointer is aligned to 16 bytes."""
        names = self.function.arg_names
        signature = {name: self._type(name) for name in names}
        aligned = {
            (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name][0] == "*"
        }
        return ASTSource(self.function, signature, self.constants, aligned)

    def _type(self, name: str) -> str:
        if name in self.constants:
            return "constexpr"
        if name in _POINTERS:
            return _POINTERS[name]
        if name in _FLOATS:
            return "fp32"
        tokens, vocab, hidden = (self.constants.get(block) for block in ("BT", "BV", "BK"))
        is_matrix = name == "dz" or name.endswith(("hidden", "weight"))
        if not is_matrix:
            return "i32"
        if tokens is None or vocab is None:
            return f"*{self.format}"
        rows = vocab if name.endswith("weight") else tokens
        columns = vocab // 2 if name == "dz" else hidden
        return f"tensordesc<{self.format}[{rows}, {columns}]>"


@dataclass(frozen=True)
class Resources:
    """``spill_loads`` and ``spill_stores`` count LDL and STL instructions, ``shared`` and ``stack`` are bytes.

    The last three count matrix instructions in the PTX: of Hopper, of Blackwell, and the older ones of both.
    """

    kernel: str
    arch: str
    registers: int
    spill_loads: int
    spill_stores: int
    shared: int
    stack: int
    wgmma: int
    tcgen05: int
    mma_sync: int


def cases() -> Iterator[Case]:
    """Every kernel that a launch can compile: K = 128 stands for every K of float32."""
    for arch in ARCHITECTURES.values():
        for format, suffix in _FORMATS.items():
            for name, function in _GEMM_KERNELS.items():
                tile = TENSOR_CORE_TILES[name, arch] if format == "bf16" else FLOAT32_TILES[name]
                blocks, options = tile_blocks(name, tile), tile.options()
                if name != "topk":
                    yield Case(name + suffix, arch, function, format, blocks, options)
                    continue
                for slots in _TOPK_SLOTS if format == "bf16" else [MAX_TOPK]:
                    constants = blocks | {"K": slots, "EMPTY": EMPTY_KEY}
                    yield Case(f"topk_{slots}{suffix}", arch, function, format, constants, options)
            yield Case("gather" + suffix, arch, gather_kernel, format, GATHER_BLOCKS, SELECTED_OPTIONS)
            yield Case("scatter" + suffix, arch, scatter_kernel, format, SCATTER_BLOCKS, SELECTED_OPTIONS)


def inspect(case: Case) -> Resources:
    """Compile one case (or take it from Triton's cache) and read its machine code."""
    target = GPUTarget("cuda", int(case.arch.removeprefix("sm_")), 32)
    compiled = triton.compile(case.source(), target=target, options=case.options)
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _output("cuobjdump", "--dump-resource-usage", str(cubin))
        code = _output("nvdisasm", "-c", str(cubin))
    ptx = compiled.asm["ptx"]
    return Resources(
        kernel=case.kernel,
        arch=case.arch,
        registers=_number("REG", usage),
        spill_loads=len(re.findall(r"\bLDL\b", code)),
        spill_stores=len(re.findall(r"\bSTL\b", code)),
        shared=compiled.metadata.shared,
        stack=_number("STACK", usage),
        wgmma=ptx.count("wgmma.mma_async"),
        tcgen05=ptx.count("tcgen05.mma"),
        mma_sync=ptx.count("mma.sync"),
    )


def _output(program: str, *arguments: str) -> str:
    return subprocess.run(
        [_PROGRAMS / program, *arguments], capture_output=True, text=True, check=True
    ).stdout


def _number(field: str, usage: str) -> int:
    found = re.search(rf"\b{field}:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump names no {field}: {usage}")
    return int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compile every kernel without a GPU and count its resources."
    )
    parser.add_argument("--json", action="store_true", help="a list of objects on stdout")
    as_json = parser.parse_args().json
    found = [asdict(inspect(case)) for case in cases()]
    if as_json:
        print(json.dumps(found))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Triton {triton.__version__}", title_justify="left")
    for name in found[0]:
        is_text = name in ("kernel", "arch")
        table.add_column(name.replace("_", "\n"), justify="left" if is_text else "right", no_wrap=is_text)
    for row in found:
        table.add_row(*map(str, row.values()))
    Console(width=max(Console().width, 110)).print(table)


if __name__ == "__main__":
    main()
