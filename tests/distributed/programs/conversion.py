"""Hugging Face logits against ours in several layouts, and export back."""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rank
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_models import fixed_rollout


def reference_logits(directory: str, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Transformers' logits [B, S, V], from rank 0; in float64 without its float32 islands (softmax, RMSNorm)."""
    shared: list[torch.Tensor | None] = [None]
    if dist.get_rank() == 0:
        # Seconds to import, on one rank only.
        from transformers import LlamaForCausalLM
        from transformers.models.llama import modeling_llama

        model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
        if dtype == torch.float64:
            model = model.double()
            for module in model.modules():
                if isinstance(module, modeling_llama.LlamaRMSNorm):
                    module.forward = types.MethodType(
                        lambda self, x: F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon),
                        module,
                    )
            model.set_attn_implementation("sdpa")
        with torch.no_grad():
            shared = [model.eval()(tokens).logits]
    dist.broadcast_object_list(shared, src=0)
    assert shared[0] is not None
    return shared[0]


@dataclasses.dataclass(frozen=True)
class ConcatenatedQKV:
    """The wrong layout of `linear_qkv`: all query heads, all key heads, all value heads."""

    partition_dim = 0

    def read_shard(
        self, source: Any, names: Sequence[str], rank: int, size: int, local_shape: Sequence[int]
    ) -> torch.Tensor:
        widths = [source.shape(name)[0] // size for name in names]
        return torch.cat(
            [source.read(name, 0, rank * w, (rank + 1) * w) for name, w in zip(names, widths, strict=True)]
        )


def _faulty_table(table: dict[str, Any], fault: str | None) -> dict[str, Any]:
    changed = dict(table)
    for name, (layout, sources) in table.items():
        if fault == "swapped gate and up" and name.endswith("mlp.linear_fc1.weight"):
            changed[name] = (layout, sources[::-1])
        elif fault == "concatenated q k v" and name.endswith("self_attention.linear_qkv.weight"):
            changed[name] = (ConcatenatedQKV(), sources)
    return changed


@contextmanager
def weight_table_with(fault: str | None) -> Iterator[None]:
    """Puts a wrong weight table into the registry, for negative controls."""
    from sead_megatron.models.registry import FAMILIES

    family = FAMILIES["LlamaForCausalLM"]
    FAMILIES["LlamaForCausalLM"] = dataclasses.replace(
        family, weight_table=lambda config: _faulty_table(family.weight_table(config), fault)
    )
    yield
    FAMILIES["LlamaForCausalLM"] = family


def config_with(directory: str, fault: str | None) -> Any:
    """The model's HFConfig, wrong in one field for negative controls."""
    from sead_megatron.models.hf_config import read_hf_config

    changes: dict[str, Any] = {
        "eps 1e-6": {"rms_norm_eps": 1e-6},
        "no llama3 scaling": {"rope_scaling": None},
    }
    return dataclasses.replace(read_hf_config(directory), **changes.get(fault, {}))


def logits_of_layout(
    directory: str, tokens: torch.Tensor, dtype: torch.dtype, layout: dict[str, Any], fault: str | None
) -> Any:
    """Our logits [B, S, V] on the last stage's ranks (None elsewhere), and the built model."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from sead_megatron.data.packing import build_row
    from sead_megatron.models.build import build_model
    from sead_megatron.models.load import load_weights
    from sead_megatron.parallel.groups import student_groups
    from sead_megatron.parallel.layout import Layout
    from sead_megatron.training.pipeline import forward_row, response_rows, run_rows

    groups = student_groups(Layout(layout["tensor"], layout["pipeline"], dist.get_world_size()))
    model_parallel_cuda_manual_seed(0)
    sequence = layout.get("sequence", False)
    config = config_with(directory, fault)
    with weight_table_with(fault):
        built = build_model(config, groups, dtype, on_cpu=True, trainable=True, sequence_parallel=sequence)
    load_weights(built, directory)
    # One more token makes every position of `tokens` predict a response token.
    rollouts = [fixed_rollout(row[:1].tolist(), [*row[1:].tolist(), 0]) for row in tokens]
    offsets = torch.arange(len(tokens) + 1) * tokens.shape[1]
    row = build_row(list(range(len(tokens))), rollouts, offsets, layout["tensor"])

    def step(rows: Any, model: Any) -> Any:
        row = next(rows)
        hidden = forward_row(model, row, torch.device("cpu"))

        def collect(output: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
            rows = response_rows(output, row, groups, sequence)
            local = rows @ built.module.output_weight().T
            parts = [torch.empty_like(local) for _ in range(groups.layout.tensor)]
            dist.all_gather(parts, local.contiguous(), group=groups.collection.tp)
            return torch.cat(parts, -1)[:, : built.config.vocab_size]

        return hidden, collect

    built.module.eval()
    with torch.no_grad():
        outputs = run_rows(built.module, groups, [row], step, train=False)
    logits = outputs[0].view(*tokens.shape, -1) if groups.is_last_stage else None
    return logits, built


def body(cases: list[dict[str, Any]], target: str) -> list[dict[str, Any]]:
    """For each case (directory, dtype, layout, maybe a fault): the largest difference of logits, and the export."""
    from sead_megatron.models.build import padded_vocab_size
    from sead_megatron.models.export import export_directory
    from sead_megatron.parallel.groups import destroy_groups

    tokens = torch.randint(3, 250, (3, 40), generator=torch.Generator().manual_seed(1))
    references: dict[tuple[str, str], torch.Tensor] = {}
    results = []
    for i, case in enumerate(cases):
        directory, kind = case["directory"], getattr(torch, case["dtype"])
        key = (directory, case["dtype"])
        if key not in references:
            references[key] = reference_logits(directory, tokens, kind)
        logits, built = logits_of_layout(directory, tokens, kind, case["layout"], case.get("fault"))
        worst = torch.zeros(1, dtype=torch.float64)
        if logits is not None:
            worst[0] = (logits - references[key]).abs().max()
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        result = {
            "difference": worst.item(),
            "scale": references[key].abs().max().item(),
            "vocab": (
                built.config.vocab_size,
                padded_vocab_size(built.config.vocab_size, built.groups.layout.tensor),
            ),
        }
        if "fault" not in case:
            path = Path(target) / str(i)
            export_directory(built, directory, path, write=dist.get_rank() == 0, shard_gib=1e-4)
            dist.barrier()
            result |= compare_export(Path(directory), path, kind)
        results.append(result)
        destroy_groups()
    return results


def compare_export(source: Path, exported: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Whether both directories hold the same tensors, bit for bit, and how many files the index names."""
    stored, written = (
        {k: v for f in d.glob("*.safetensors") for k, v in load_file(f).items()} for d in (source, exported)
    )
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    return {
        "equal": stored.keys() == written.keys()
        and all(torch.equal(stored[k].to(dtype), written[k]) for k in stored),
        "files": len(list(exported.glob("*.safetensors"))),
        "indexed": sorted(index["weight_map"]) == sorted(written)
        and all(name in load_file(exported / file) for name, file in index["weight_map"].items()),
    }


if __name__ == "__main__":
    rank.run(body)
