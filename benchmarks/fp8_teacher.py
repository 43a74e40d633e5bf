"""What a teacher quantised to FP8 does to the method: its zones, entropies and divergences beside bfloat16's.

    python benchmarks/fp8_teacher.py --prompts math.jsonl --source "what these are" \\
        --output benchmarks/results/fp8_teacher.json
    python benchmarks/fp8_teacher.py --table benchmarks/results/fp8_teacher.json    # as docs/precision.md has it

The student samples one response to each prompt; the teacher scores these in bfloat16 (the reference), in float32 (how
far bfloat16 itself is off: the noise floor) and quantised by ModelOpt, on the CPU with FP8's rounding simulated. The
student, its sampled tokens and its entropies are the same throughout, in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from record_run import commit, machine

from sead_megatron.config import TrainConfig, load_config
from sead_megatron.errors import UserError
from sead_megatron.rollout.environment import prepare_environment

VARIANTS = {
    "bfloat16": ["precision.teacher=bfloat16"],
    "float32": ["precision.teacher=float32"],
    "fp8, ends in bfloat16": ["precision.teacher=modelopt_fp8"],
    "fp8, all layers": ["precision.teacher=modelopt_fp8", "precision.first_last_bfloat16=false"],
}
REFERENCE = "bfloat16"


def world_of_one() -> None:
    """The environment in which `init_world` makes a world of this process alone."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}


def sample(config: TrainConfig) -> tuple[list[Any], list[Any]]:
    """(prompts, rollouts) of the untrained student, in a process of its own: its engine ends with it."""
    import torch

    from sead_megatron.data.tokenised import training_prompts
    from sead_megatron.models.export import HFStream
    from sead_megatron.models.tokenizer import load_tokenizer
    from sead_megatron.parallel import megatron_on_cpu
    from sead_megatron.rollout.collect import as_rollout, generate_everywhere, request_seed
    from sead_megatron.rollout.engine import Sampling
    from sead_megatron.training.job import build_engine, init_world
    from sead_megatron.training.models import build_models

    world_of_one()
    tokenizer = load_tokenizer(config.tokenizer_path)
    prompts = training_prompts(config, tokenizer)
    device = init_world(config.device)
    engine = build_engine(config)
    if device.type == "cpu":
        megatron_on_cpu.install()
    models = build_models(config, torch.device(config.device), prompts)
    engine.load_weights(HFStream(models.student.model, config.rollout.sync_bucket_mib), 0)
    ids = [list(prompt.token_ids) for prompt in prompts]
    sampling = Sampling(config.rollout.temperature, config.rollout.max_new_tokens, tuple(tokenizer.eos_ids))
    seeds = [request_seed(config.seed, i) for i in range(len(ids))]
    generations = generate_everywhere(engine, ids, seeds, sampling)
    rollouts = [as_rollout(i, ids[i], generation, 0) for i, generation in enumerate(generations)]
    return prompts, rollouts


def score(config: TrainConfig, prompts: Sequence[Any], rollouts: Sequence[Any]) -> dict[str, Any]:
    """Per-token statistics under one teacher, its hidden states and output layer, and the seconds it took."""
    import torch

    from sead_megatron.parallel.groups import destroy_groups
    from sead_megatron.training.models import build_models
    from sead_megatron.training.step_plan import plan_step

    models = build_models(config, torch.device(config.device), prompts)
    plan = plan_step(rollouts, models.student.model.groups.layout)
    started = time.perf_counter()
    scores = models.teachers.score(plan)
    seconds = time.perf_counter() - started
    stats = models.student.token_stats(plan, scores)
    destroy_groups()
    if scores is None:
        raise RuntimeError("the benchmark runs on one process, which holds the last stage")
    found = {name: stats[name].double() for name in ("forward_kl", "reverse_kl", "teacher_entropy")}
    (part,) = scores.parts
    return found | {"hidden": part.hidden, "output": part.output, "seconds": seconds}


def teacher_divergence(reference: dict[str, Any], other: dict[str, Any], vocab_size: int) -> float:
    """Mean KL(reference teacher || other teacher) over all response tokens, nats."""
    import torch
    from sead_kernels.split_kl import TileOptions, VocabShard, finalize, linear_stats

    labels = torch.zeros(len(reference["hidden"]), dtype=torch.int64)
    student, teacher = other, reference
    state = linear_stats(
        student["hidden"].float(),
        student["output"].float(),
        teacher["hidden"].float(),
        teacher["output"].float(),
        labels,
        shard=VocabShard(0, vocab_size),
        temperature=1.0,
        options=TileOptions(),
    )
    return float(finalize(state).forward_kl.mean())


def compare(
    name: str, runs: dict[str, dict[str, Any]], student_entropy: Any, owner: Any, vocab_size: int
) -> dict[str, Any]:
    """A row of the table: one teacher against the reference."""
    import torch

    from sead_megatron.data.terms import Zone
    from sead_megatron.objectives.zones import assign_by_rank

    run, reference = runs[name], runs[REFERENCE]
    zones = assign_by_rank(run["teacher_entropy"], student_entropy, 50, 10)
    expected = assign_by_rank(reference["teacher_entropy"], student_entropy, 50, 10)
    same = (zones == expected).double()
    row: dict[str, Any] = {
        "teacher": name,
        "zone_agreement": float(same.mean()),
        "zone_agreement_interval": interval(same, owner),
        "jaccard": {
            zone.name: float(
                ((zones == zone) & (expected == zone)).sum() / ((zones == zone) | (expected == zone)).sum()
            )
            for zone in Zone
        },
        "teacher_divergence": teacher_divergence(reference, run, vocab_size),
        "seconds": round(run["seconds"], 2),
    }
    for key in ("teacher_entropy", "forward_kl", "reverse_kl"):
        shift = run[key] - reference[key]
        row[key] = {
            "mean": float(run[key].mean()),
            "mean_shift": float(shift.mean()),
            "mean_absolute_shift": float(shift.abs().mean()),
            "p99_absolute_shift": float(torch.quantile(shift.abs(), 0.99)),
        }
    return row


def interval(values: Any, owner: Any, draws: int = 2000) -> list[float]:
    """95 % bootstrap interval of a token mean, whole prompts resampled."""
    import torch

    generator = torch.Generator().manual_seed(0)
    count = int(owner.max()) + 1
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, owner, values)
    sizes = torch.bincount(owner, minlength=count).double()
    drawn = torch.randint(count, (draws, count), generator=generator)
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    return [float(torch.quantile(means, q)) for q in (0.025, 0.975)]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The content of the results file."""
    import torch

    from sead_megatron.data.types import TokenTable
    from sead_megatron.models.hf_config import read_hf_config
    from sead_megatron.parallel import megatron_on_cpu
    from sead_megatron.training.job import init_world

    overrides = [
        *(f"data.prompts={options.prompts}", f"rollout.max_new_tokens={options.tokens}"),
        *("precision.student=float32", "rollout.max_model_len=768", "batch.max_tokens_per_microbatch=1024"),
    ]
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        prompts, rollouts = executor.submit(sample, load_config(options.config, overrides)).result()
    world_of_one()
    device = init_world(load_config(options.config, overrides).device)
    if device.type == "cpu":
        megatron_on_cpu.install()
    table = TokenTable.from_rollouts(rollouts, "cpu")
    owner = torch.repeat_interleave(
        torch.arange(len(rollouts)), torch.tensor([len(rollout.response_ids) for rollout in rollouts])
    )
    runs = {}
    for name, changes in VARIANTS.items():
        runs[name] = score(load_config(options.config, [*overrides, *changes]), prompts, rollouts)
        print(f"{name}: scored {table.num_tokens} tokens in {runs[name]['seconds']:.1f} s", flush=True)
    torch.distributed.destroy_process_group()
    vocab_size = read_hf_config(load_config(options.config).teacher.path).vocab_size
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "command": "benchmarks/fp8_teacher.py " + " ".join(sys.argv[1:]),
        "prompts": options.source,
        "responses": len(rollouts),
        "tokens": table.num_tokens,
        "reference": REFERENCE,
        "rows": [compare(name, runs, table.student_entropy, owner, vocab_size) for name in VARIANTS],
    }


def table(content: dict[str, Any]) -> str:
    """The results as a Markdown table; shifts are against the reference's row."""
    columns = [
        "teacher",
        "zones as with bf16",
        "Jaccard A / B / C",
        "KL(bf16 teacher, this one)",
        "entropy, mean (shift)",
    ]
    columns += ["forward KL, mean (shift)", "reverse KL, mean (shift)", "99 % of entropy shifts below"]
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1)]
    for row in content["rows"]:
        low, high = row["zone_agreement_interval"]
        means = [
            f"{row[k]['mean']:.3f} ({row[k]['mean_shift']:+.3f})"
            for k in ("teacher_entropy", "forward_kl", "reverse_kl")
        ]
        lines.append(
            [
                row["teacher"],
                f"{row['zone_agreement']:.1%} ({low:.1%} to {high:.1%})",
                " / ".join(f"{row['jaccard'][zone]:.3f}" for zone in "ABC"),
                f"{row['teacher_divergence']:.4f}",
                *means,
                f"{row['teacher_entropy']['p99_absolute_shift']:.3f}",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="examples/smollm2/config.yaml")
    parser.add_argument(
        "--table", type=Path, metavar="RESULTS", help="only print the table of a results file"
    )
    parser.add_argument("--prompts", help="JSONL, as data.prompts")
    parser.add_argument("--source", help="what these prompts are, for the results file")
    parser.add_argument("--tokens", type=int, default=160, help="longest response")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.table is not None:
        print(table(json.loads(options.table.read_text())))
        return 0
    if None in (options.prompts, options.source, options.output):
        parser.error("--prompts, --source and --output are needed to measure")
    prepare_environment(on_cpu=True)
    try:
        content = measure(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
