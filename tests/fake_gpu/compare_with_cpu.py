"""Training on fake GPUs that compute, compared with the same training on the CPU, number for number.

    python tests/fake_gpu/compare_with_cpu.py FAKE RESULTS [--ranks 1 2 4]

FAKE: what `cuda/build.sh` has built for this Python. RESULTS: a folder for models, checkpoints and numbers.
Layers are the local ones (Transformer Engine's kernels compute nothing here). For each number of ranks the same
program runs twice in this Python: over gloo, and over CUDA devices and NCCL. It ends with an error where they differ.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

# Relative differences in norm. On one and two ranks the first forward pass is equal in every bit. A backward pass is
# not: CUDA's RMSNorm is one operator and the CPU's several, so gradients are summed in another order, as they are over
# the query heads of a group and over ranks; Adam divides by sqrt(v) and widens that. Seen: float32 1.7e-6, bfloat16
# 1.4e-2.
FLOAT32_TOLERANCE = 2e-5
BFLOAT16_TOLERANCE = 2e-2

_ALONE = {"student": [1, 1], "teacher": [1, 1], "max_tokens": 128, "packing": True}
CASES: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "float32": _ALONE,
        "grouped_query": _ALONE | {"model": "grouped"},
        "bfloat16": _ALONE | {"dtype": "bfloat16", "distributed": False},
        "triton_loss": _ALONE | {"backend": "triton"},
        "cuda_loss": _ALONE | {"backend": "cuda"},
    },
    2: {
        "tensor": _ALONE | {"student": [2, 1, True], "teacher": [2, 1, True]},
        "pipeline": _ALONE | {"student": [1, 2], "teacher": [2, 1]},
        "data": _ALONE | {"teacher": [1, 2]},
    },
    4: {
        "tensor_pipeline": _ALONE | {"student": [2, 2], "teacher": [4, 1, True]},
        "tensor_data": _ALONE | {"student": [2, 1, True], "teacher": [2, 2]},
    },
}


def write_models(directory: Path) -> dict[str, Path]:
    """Two students, one with grouped-query attention, and their teacher."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_models import save_tiny_llama

    return {
        "plain": save_tiny_llama(directory / "plain", 0, num_key_value_heads=8),
        "grouped": save_tiny_llama(directory / "grouped", 0),
        "teacher": save_tiny_llama(directory / "teacher", 1, num_hidden_layers=3, num_key_value_heads=8),
    }


def run_ranks(device: str, ranks: int, cases: dict[str, Any], results: Path, fake: Path) -> None:
    """All cases of a number of ranks on one device."""
    results.mkdir(parents=True)
    arguments = results / "arguments.json"
    arguments.write_text(json.dumps({"device": device, "cases": cases, "results": str(results)}))
    paths = (ROOT, ROOT / "tests", ROOT / "tests/distributed/programs", HERE)
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"} | {
        "PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        # Megatron compiles small functions: on the fake GPU that would be a Triton kernel.
        "TORCHDYNAMO_DISABLE": "1",
        "TRITON_INTERPRET": "1",
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*launch, str(HERE / "computed_step.py"), str(arguments)]
    if device == "cuda":
        command = ["bash", "-c", '. "$0" && exec "$@"', str(fake / "env.sh"), *command]
    log = results / "log.txt"
    with log.open("w") as output:
        ended = subprocess.run(command, env=environment, stdout=output, stderr=output, cwd=ROOT, check=False)
    if ended.returncode:
        lines = [line for line in log.read_text().splitlines() if line.startswith("[rank")]
        raise SystemExit(f"{device}, {ranks} ranks: failed, see {log}\n" + "\n".join(lines[-30:]))


def largest_difference(wanted: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Relative difference in norm, the largest over all quantities, and the quantity's name."""
    if wanted.keys() != found.keys():
        raise SystemExit(f"only one side has {sorted(wanted.keys() ^ found.keys())}")
    worst, name = 0.0, "none"
    for key, value in wanted.items():
        expected, other = value.double(), found[key].double()
        if not bool(torch.isfinite(other).all()):
            raise SystemExit(f"{key} is not finite")
        difference = float((expected - other).norm() / expected.norm().clamp(min=1e-12))
        if difference > worst:
            worst, name = difference, key
    return worst, name


def part(numbers: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """The numbers of one of the recorded steps."""
    return {key.removeprefix(name): value for key, value in numbers.items() if key.startswith(f"{name}/")}


def first_forward(numbers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is known before anything has been updated."""
    backward = ("/weights", "/grad_norm")
    return {key: value for key, value in part(numbers, "first").items() if not key.startswith(backward)}


def without_choices(numbers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without what a threshold decides after an update: bfloat16's rounding carries a few tokens into another zone."""
    choices = ("second/zones", "second/update/", "resumed/zones", "resumed/update/")
    return {key: value for key, value in numbers.items() if not key.startswith(choices)}


def check_case(name: str, case: dict[str, Any], exact: bool, cpu: Path, cuda: Path) -> bool:
    """Whether CUDA's numbers are the CPU's, and those after a resume are those without."""
    numbers = {device: torch.load(folder / f"{name}.pt") for device, folder in (("cpu", cpu), ("cuda", cuda))}
    rounded = case.get("dtype") == "bfloat16"
    tolerance = BFLOAT16_TOLERANCE if rounded else FLOAT32_TOLERANCE
    compared = (without_choices(numbers[d]) if rounded else numbers[d] for d in ("cpu", "cuda"))
    difference, where = largest_difference(*compared)
    forward, _ = largest_difference(*(first_forward(numbers[device]) for device in ("cpu", "cuda")))
    resumed, _ = largest_difference(part(numbers["cuda"], "second"), part(numbers["cuda"], "resumed"))
    moved, _ = largest_difference(*(part(numbers["cuda"], f"{step}/weights") for step in ("first", "second")))
    passed = difference <= tolerance and (forward == 0 or not exact) and resumed == 0 and moved > 1e-3
    print(
        f"{'ok' if passed else 'FAILED'}: {name}: {len(numbers['cpu'])} tensors, largest difference {difference:.1e} "
        f"({where}), allowed {tolerance:.0e}; first forward {forward:.1e}; after a resume {resumed:.1e}; "
        f"a step moves {moved:.1e}",
        flush=True,
    )
    return passed


def main() -> int:
    """Runs and compares; 1 when a case fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("fake", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=[*CASES])
    given = parser.parse_args()
    models = write_models(given.results / "models")
    passed = True
    for ranks in given.ranks:
        started = time.monotonic()
        cases = {
            name: case
            | {
                "student_path": str(models[case.get("model", "plain")]),
                "teacher_path": str(models["teacher"]),
            }
            for name, case in CASES[ranks].items()
        }
        folders = {device: given.results / f"{device}_{ranks}" for device in ("cpu", "cuda")}
        for device, folder in folders.items():
            run_ranks(device, ranks, cases, folder, given.fake)
        passed &= all(
            [
                check_case(name, case, ranks <= 2 and "backend" not in case, *folders.values())
                for name, case in cases.items()
            ]
        )
        print(f"{ranks} ranks: {time.monotonic() - started:.0f} s", flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
