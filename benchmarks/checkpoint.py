"""How long a checkpoint stops training, how long its files take, and the host memory of both.

    python benchmarks/checkpoint.py benchmarks/results/checkpoint.json --before CHECKOUT
    python benchmarks/checkpoint.py --table benchmarks/results/checkpoint.json

Two data-parallel ranks train a random model of SmolLM2-135M's shape, and one with a third of its layers, on the CPU.
CHECKOUT is the repository at a commit that still wrote checkpoints with Megatron's `fully_reshardable`, to compare
with. Files go to a temporary directory (--directory says where).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from record_run import commit, machine

ROOT = Path(__file__).parents[1]
RANKS = 2
LAYERS = (30, 10)
# config.json of HuggingFaceTB/SmolLM2-135M-Instruct, as far as it says what to compute.
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
ROUNDS = 3
QUIET_STEPS = 3
MIB = 1 << 20


def write_model(directory: Path, layers: int) -> None:
    """Random weights with the spread of initialised ones."""
    import torch
    from safetensors.torch import save_file

    from sead_megatron.models.family import WeightMap
    from sead_megatron.models.hf_config import read_hf_config
    from sead_megatron.models.registry import FAMILIES

    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}, indent=2))
    config = read_hf_config(directory)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator) * 0.02
        for name, shape in WeightMap(FAMILIES[config.architecture], config).hf_shapes().items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


class Run:
    """Student and a step on fixed responses, without engine and teacher."""

    def __init__(self, model: str) -> None:
        import numpy as np
        import torch

        from sead_megatron.config import TrainConfig
        from sead_megatron.data.types import Coefficients, Rollout
        from sead_megatron.parallel import megatron_on_cpu
        from sead_megatron.training.job import init_world
        from sead_megatron.training.models import build_models
        from sead_megatron.training.step_plan import plan_step

        device = init_world("cpu")
        megatron_on_cpu.install()
        config = TrainConfig.model_validate(
            {
                "device": "cpu",
                "run_dir": "unused",
                "steps": 100,
                "student": {"path": model},
                "precision": {"student": "float32"},
                "data": {"prompts": "unused", "prompts_per_step": RANKS},
                "rollout": {"max_new_tokens": 32, "max_model_len": 64, "kv_cache_gib": 0.1},
                "objective": {"name": "grpo"},
                "batch": {"max_tokens_per_microbatch": 128},
                "optimizer": {"lr": 1e-6},
            }
        )
        self.student = build_models(config, device).student
        tokens, zeros = np.arange(32, dtype=np.int32), np.zeros(32, dtype=np.float32)
        rollouts = [Rollout(i, tokens[:8], tokens, zeros, zeros, True, 0) for i in range(RANKS)]
        self._plan = plan_step(rollouts, self.student.model.groups.layout)
        weights = torch.zeros(self._plan.num_tokens, 4)
        weights[:, 3] = -1.0
        self._coefficients = Coefficients(weights, float(self._plan.num_tokens))

    def step(self) -> float:
        """Seconds of an update."""
        started = time.perf_counter()
        assert self.student.train_step(self._plan, None, self._coefficients).applied
        return time.perf_counter() - started


STATE: dict[str, Any] = {"skipped_steps": 0, "skipped_in_a_row": 0}
STATE |= {"schedule": {}, "curriculum": {}, "objective": {}}


def memory(name: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def peak_above(call: Any) -> int:
    """By how many bytes a call raises the memory of this process at its peak."""
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    call()
    return memory("VmHWM") - before


def measure_before(run: Run, directory: Path) -> dict[str, Any]:
    """The earlier code: everything is gathered and written while the loop waits."""
    import torch.distributed as dist

    from sead_megatron.training import checkpoint

    def write(step: int) -> None:
        checkpoint.write_checkpoint(directory, step, run.student, STATE | {"step": step})  # type: ignore[attr-defined]
        if dist.get_rank() == 0:
            checkpoint.commit_checkpoint(directory, step, 1)
        dist.barrier()

    peaks = [peak_above(lambda: write(1)), peak_above(lambda: write(2))]
    blocked = []
    for number in range(ROUNDS):
        run.step()
        dist.barrier()
        started = time.perf_counter()
        write(3 + number)
        blocked.append(time.perf_counter() - started)
    return {"peaks": peaks, "blocked": blocked}


def measure_after(run: Run, directory: Path) -> dict[str, Any]:
    """This code: what the loop waits, what the thread takes, and the steps meanwhile."""
    import torch.distributed as dist

    from sead_megatron.training.checkpoint import Checkpointer
    from sead_megatron.training.checkpoint_shards import ModelShards, bytes_of

    checkpoints = Checkpointer(directory, 1, run.student)

    def write(step: int) -> None:
        checkpoints.save(step, STATE | {"step": step})
        checkpoints.finish()
        dist.barrier()

    peaks = [peak_above(lambda: write(1)), peak_above(lambda: write(2))]
    quiet = [run.step() for _ in range(QUIET_STEPS)]
    checkpoints.take_metrics()
    copied, blocked, written, beside = [], [], [], []
    for number in range(ROUNDS):
        dist.barrier()
        started = time.perf_counter()
        checkpoints.save(3 + number, STATE | {"step": 3 + number})
        waited = time.perf_counter() - started
        copied.append(waited)
        while checkpoints._write is not None:
            beside.append(run.step())
            # A rank that is behind holds the others up without a checkpoint too.
            dist.barrier()
            started = time.perf_counter()
            checkpoints.poll()
            waited += time.perf_counter() - started
        checkpoints.finish()
        blocked.append(waited)
        written.append(checkpoints.take_metrics().get("checkpoint/write_seconds", 0.0))
    return {
        "share": bytes_of(ModelShards(run.student, None).share(moments=True)),
        "peaks": peaks,
        "copied": copied,
        "blocked": blocked,
        "written": written,
        "quiet_steps": quiet,
        "steps_beside": beside,
    }


def worker(model: str, directory: str) -> None:
    """One rank; rank 0 prints what it measured as the last line."""
    import torch.distributed as dist

    from sead_megatron.training import checkpoint

    run = Run(model)
    for _ in range(2):
        run.step()
    is_before = hasattr(checkpoint, "write_checkpoint")
    measured = (measure_before if is_before else measure_after)(run, Path(directory))
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, measured)
    if dist.get_rank() == 0:
        print(json.dumps(ranks), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def run_ranks(checkout: Path, model: Path, directory: Path) -> list[dict[str, Any]]:
    """The report of every rank, of the code in a checkout."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    places = os.pathsep.join([str(checkout), os.environ.get("PYTHONPATH", "")])
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared |= {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "PYTHONPATH": places}
    command = [sys.executable, __file__, "--worker", str(model), str(directory)]
    ranks = [
        subprocess.Popen(
            command,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
            cwd=checkout,
        )
        for rank in range(RANKS)
    ]
    outputs = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise RuntimeError("a rank failed")
    found: list[dict[str, Any]] = json.loads(outputs[0].splitlines()[-1])
    return found


def summary(before: list[dict[str, Any]] | None, after: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds, on the slowest or largest rank."""

    def worst(ranks: list[dict[str, Any]], name: str) -> float:
        return round(max(statistics.median(rank[name]) for rank in ranks), 3)

    written = round(statistics.median(after[0]["written"]), 3)
    found: dict[str, Any] = {
        "blocked_seconds": worst(after, "blocked"),
        "of_it_copy_seconds": worst(after, "copied"),
        "write_seconds": written,
        "blocked_share": round(worst(after, "blocked") / written, 3),
        "step_seconds": worst(after, "quiet_steps"),
        "step_seconds_beside_a_write": worst(after, "steps_beside"),
        "share_mib": [rank["share"] // MIB for rank in after],
        "peak_mib_first": [rank["peaks"][0] // MIB for rank in after],
        "peak_mib_second": [rank["peaks"][1] // MIB for rank in after],
    }
    if before is not None:
        found |= {
            "before_blocked_seconds": worst(before, "blocked"),
            "before_peak_mib_first": [rank["peaks"][0] // MIB for rank in before],
            "before_peak_mib_second": [rank["peaks"][1] // MIB for rank in before],
        }
    return found


def table(content: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| parameters | loop waits, before | loop waits | files take | step, quiet | step beside a write | "
        "share a rank | peak memory above, first and later checkpoints | the same, before |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in content["rows"]:
        before = row.get("before_blocked_seconds")
        peaks = [max(row[f"peak_mib_{name}"]) for name in ("first", "second")]
        old = [max(row.get(f"before_peak_mib_{name}", [0])) for name in ("first", "second")]
        lines.append(
            f"| {row['parameters'] / 1e6:.0f}M | {'' if before is None else f'{before:.1f} s'} | "
            f"{row['blocked_seconds']:.2f} s | {row['write_seconds']:.1f} s | {row['step_seconds']:.2f} s | "
            f"{row['step_seconds_beside_a_write']:.2f} s | {max(row['share_mib'])} MiB | "
            f"{peaks[0]}, {peaks[1]} MiB | {'' if before is None else f'{old[0]}, {old[1]} MiB'} |"
        )
    return "\n".join(lines)


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        try:
            worker(*sys.argv[2:4])
        except Exception:
            # The process group's destructor would wait for the other rank.
            traceback.print_exc()
            os._exit(1)
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, metavar="RESULTS")
    parser.add_argument("--table", action="store_true", help="only print the table of a results file")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="an earlier commit to compare with")
    parser.add_argument("--directory", type=Path, help="where checkpoints are written for the time being")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.output.read_text())))
        return 0
    rows = []
    for layers in LAYERS:
        with tempfile.TemporaryDirectory(dir=options.directory) as name:
            directory = Path(name)
            write_model(directory / "model", layers)
            parameters = (directory / "model/model.safetensors").stat().st_size // 4
            before = None
            if options.before is not None:
                before = run_ranks(options.before.absolute(), directory / "model", directory / "before")
            after = run_ranks(ROOT, directory / "model", directory / "after")
        rows.append({"layers": layers, "parameters": parameters, **summary(before, after)})
        print(json.dumps(rows[-1]), file=sys.stderr)
    content = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "command": f"benchmarks/checkpoint.py {options.output}"
        + (" --before CHECKOUT" if options.before else ""),
        "model": "random weights in the shape of SmolLM2-135M, float32, Adam; two data-parallel ranks, one thread each",
        "load_average": os.getloadavg()[0],
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
