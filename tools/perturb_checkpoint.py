"""Copy a Hugging Face checkpoint with noise on its weight matrices: a student that its original can teach.

    python tools/perturb_checkpoint.py MODEL_DIR OUT_DIR --relative 0.05 --seed 1

Each matrix W becomes W + relative * rms(W) * N(0, 1), so that |change| / |W| is `relative` in the Frobenius
norm. Vectors (norms, biases) stay. The same seed gives the same student, in whatever order or file the
tensors are stored.
"""

import argparse
import shutil
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sead_megatron.errors import UserError


def perturb(weight: torch.Tensor, name: str, relative: float, seed: int) -> torch.Tensor:
    """`weight` plus noise of `relative` times its rms, same dtype; `name` and `seed` choose the noise."""
    if weight.ndim < 2:
        return weight
    # Hashed together: the CPU generator reads only the low 32 bits of a seed.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    exact = weight.float()
    noise = torch.randn(weight.shape, generator=generator)
    return (exact + relative * exact.square().mean().sqrt() * noise).to(weight.dtype)


def perturb_checkpoint(model_dir: Path, out_dir: Path, relative: float, seed: int) -> None:
    """Write the perturbed copy, all other files included. Raises UserError."""
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise UserError(str(model_dir), None, "holds no *.safetensors", "give the directory of a checkpoint")
    if out_dir.resolve() == model_dir.resolve():
        raise UserError(str(out_dir), None, "is the original", "give another directory")
    if not relative > 0:
        raise UserError("--relative", relative, "must be positive", "use for example 0.05")
    out_dir.mkdir(parents=True, exist_ok=True)
    for path in model_dir.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copy2(path, out_dir / path.name)
    for path in files:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            tensors = {name: perturb(file.get_tensor(name), name, relative, seed) for name in names}
            save_file(tensors, out_dir / path.name, metadata=file.metadata())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument(
        "--relative", type=float, required=True, help="size of the noise, as a share of each matrix's rms"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    try:
        perturb_checkpoint(arguments.model_dir, arguments.out_dir, arguments.relative, arguments.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
