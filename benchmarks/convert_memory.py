"""Memory and time of tools/convert_checkpoint.py on a random model of several GB, both ways.

    python benchmarks/convert_memory.py benchmarks/results/convert_memory.json
    python benchmarks/convert_memory.py --table benchmarks/results/convert_memory.json   # as docs/conversion.md has it

Each step runs in a process of its own, whose peak memory (ru_maxrss) counts from when everything is imported. The
models are written to a temporary directory (--directory says where) and removed; three times their size must be free.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from record_run import commit, machine

TOOLS = Path(__file__).parents[1] / "tools"
# Llama 3.1 8B with fewer layers, in bfloat16: its largest tensors are those of the real model.
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
STEPS = {
    "Hugging Face to Megatron": ["model", "megatron"],
    "comparing these": ["model", "megatron", "--verify-only"],
    "Megatron to Hugging Face": ["megatron", "back"],
    "comparing those": ["megatron", "back", "--verify-only"],
    "comparing the result with the original": ["megatron", "model", "--verify-only"],
}
ROOM = 3.1


def write_model(directory: Path, layers: int) -> None:
    """A Hugging Face directory with random bits in every tensor, infinities and NaNs included."""
    import torch

    from sead_megatron.models.family import WeightMap
    from sead_megatron.models.hf_config import read_hf_config
    from sead_megatron.models.hf_tensors import HFTensor, row_blocks, write_safetensors
    from sead_megatron.models.registry import FAMILIES

    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}, indent=2))
    config = read_hf_config(directory)
    shapes = WeightMap(FAMILIES[config.architecture], config).hf_shapes()
    tensors = [HFTensor(name, shape, torch.bfloat16) for name, shape in shapes.items()]
    generator = torch.Generator().manual_seed(0)
    blocks = (
        torch.randint(
            -(2**15), 2**15, (stop - start, *shape[1:]), dtype=torch.int16, generator=generator
        ).view(torch.bfloat16)
        for shape in shapes.values()
        for start, stop in row_blocks(shape, 2, 32 << 20)
    )
    write_safetensors(directory / "model.safetensors", tensors, blocks, metadata={"format": "pt"})
    print(json.dumps({"bytes": sum(t.bytes for t in tensors), "largest": max(t.bytes for t in tensors)}))


def convert_here(arguments: list[str]) -> None:
    """One conversion in this process, and what it took."""
    sys.path.insert(0, str(TOOLS))
    from convert_checkpoint import main as convert

    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    if code := convert(arguments):
        sys.exit(code)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": round(seconds, 1), "base_mib": base // 1024, "peak_mib": peak // 1024}))


def in_process_of_its_own(*arguments: str) -> dict[str, Any]:
    """The last line that this script prints when it is given `arguments`.

    A child's ru_maxrss begins at the memory of its parent, which therefore imports nothing large.
    """
    ended = subprocess.run(
        [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def measure(directory: Path, layers: int) -> dict[str, Any]:
    """The content of the results file."""
    model = in_process_of_its_own("--write", str(directory / "model"), str(layers))
    rows = []
    for name, (source, target, *options) in STEPS.items():
        paths = [str(directory / source), str(directory / target)]
        row = in_process_of_its_own("--convert", *paths, *options)
        over = row["peak_mib"] - row["base_mib"]
        rate = round(model["bytes"] / 1e6 / row["seconds"])
        rows.append({"step": name, **row, "over_base_mib": over, "mb_per_second": rate})
        print(f"{name}: {row['seconds']} s, {over} MiB over the base", file=sys.stderr)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "command": "benchmarks/convert_memory.py " + " ".join(sys.argv[1:]),
        "model": f"Llama 3.1 8B with {layers} of its 32 layers, random bits, bfloat16",
        "tensor_gb": round(model["bytes"] / 1e9, 2),
        "largest_tensor_mib": model["largest"] >> 20,
        "rows": rows,
    }


def table(content: dict[str, Any]) -> str:
    """The results in words and as a Markdown table."""
    lines = [
        f"{content['model']}: {content['tensor_gb']} GB, largest tensor {content['largest_tensor_mib']:,} MiB, on "
        f"{content['machine']['cores']} CPU cores.",
        "",
        "| step | peak memory above the base of {base} MiB | seconds | MB/s |".format(
            base=content["rows"][0]["base_mib"]
        ),
        "| --- | ---: | ---: | ---: |",
    ]
    for row in content["rows"]:
        lines.append(
            f"| {row['step']} | {row['over_base_mib']} MiB | {row['seconds']} | {row['mb_per_second']} |"
        )
    return "\n".join(lines)


def main() -> int:
    if sys.argv[1:2] == ["--write"]:
        write_model(Path(sys.argv[2]), int(sys.argv[3]))
        return 0
    if sys.argv[1:2] == ["--convert"]:
        convert_here(sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, metavar="RESULTS")
    parser.add_argument("--table", action="store_true", help="only print the table of a results file")
    parser.add_argument("--layers", type=int, default=6, help="6 are 4.7 GB")
    parser.add_argument("--directory", type=Path, help="where the models are written for the time being")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.output.read_text())))
        return 0
    needed = int(ROOM * (2.1e9 + options.layers * 0.44e9))
    if (free := shutil.disk_usage(options.directory or tempfile.gettempdir()).free) < needed:
        print(
            f"error: --directory: {free / 1e9:.1f} GB free; {needed / 1e9:.1f} GB are needed", file=sys.stderr
        )
        return 2
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        content = measure(Path(directory), options.layers)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
