"""What the kernels of ``tiles.cu`` need of a GPU, as ptxas reports it; no GPU wanted.

python -m sead_kernels.split_kl.cuda.resources [sm_90a ...]
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..native_build import BuildError
from .build import ARCHITECTURES, NO_NVCC, SOURCE, find_nvcc


@dataclass(frozen=True)
class Resources:
    """Of one compiled kernel: registers per thread, spilled bytes (loads and stores), shared bytes per block."""

    registers: int
    spills: int
    shared: int


def kernel_resources(architecture: str, source: Path = SOURCE) -> dict[str, Resources]:
    """By kernel name; of several instantiations of a template the largest numbers.

    Raises:
        BuildError: nvcc is missing or fails.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError(NO_NVCC)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        command = [*nvcc, "-std=c++17", "-O3", "-Xptxas", "-v", "-cubin", f"-arch={architecture}"]
        done = subprocess.run(
            [*command, str(source), "-o", cubin.name],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
    if done.returncode:
        raise BuildError(f"nvcc failed for {architecture}: {done.stderr.strip()[:500]}")
    found: dict[str, Resources] = {}
    for entry in done.stderr.split("Compiling entry function")[1:]:
        name = re.search(r"\d+([a-z]\w*?_kernel)", entry)
        registers, spills = re.search(r"Used (\d+) registers", entry), re.findall(r"(\d+) bytes spill", entry)
        shared = re.search(r"(\d+) bytes smem", entry)
        if name is None or registers is None or len(spills) != 2:
            raise BuildError(f"ptxas' report is not understood: {entry[:300]}")
        new = Resources(int(registers[1]), sum(map(int, spills)), int(shared[1]) if shared else 0)
        old = found.get(name[1], Resources(0, 0, 0))
        found[name[1]] = Resources(
            max(old.registers, new.registers), max(old.spills, new.spills), max(old.shared, new.shared)
        )
    return found


def main() -> None:
    table = Table("kernel", "architecture", "registers", "spilled bytes", "shared bytes")
    for architecture in sys.argv[1:] or ARCHITECTURES:
        for name, used in kernel_resources(architecture).items():
            table.add_row(name, architecture, str(used.registers), str(used.spills), str(used.shared))
    Console().print(table)


if __name__ == "__main__":
    main()
