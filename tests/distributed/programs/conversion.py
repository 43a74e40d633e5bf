"""Hugging Face logits against ours in several layouts, and export back."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import rank
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import LlamaForCausalLM
from tiny_models import fixed_rollout
from transformers.models.llama import modeling_llama


def reference_logits(directory: str, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Transformers' logits [B, S, V]; in float64 without its float32 islands (softmax, RMSNorm)."""
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    if dtype == torch.float64:
        model = model.double()
        for module in model.modules():
            if isinstance(module, modeling_llama.LlamaRMSNorm):
                module.forward = types.MethodType(
                    lambda self, x: F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon), module
                )
        model.set_attn_implementation("sdpa")
    with torch.no_grad():
        return model.eval()(tokens).logits


def logits_of_layout(directory: str, tokens: torch.Tensor, dtype: torch.dtype, layout: dict[str, Any]) -> Any:
    """Our logits [B, S, V] on the last stage's ranks (None elsewhere), and the built model."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from sead_megatron.data.packing import build_row
    from sead_megatron.models.build import build_model
    from sead_megatron.models.hf_config import read_hf_config
    from sead_megatron.models.load import load_weights
    from sead_megatron.parallel.groups import student_groups
    from sead_megatron.parallel.layout import Layout
    from sead_megatron.training.pipeline import forward_row, response_rows, run_rows

    groups = student_groups(Layout(layout["tensor"], layout["pipeline"], dist.get_world_size()))
    model_parallel_cuda_manual_seed(0)
    sequence = layout.get("sequence", False)
    built = build_model(
        read_hf_config(directory), groups, dtype, on_cpu=True, trainable=True, sequence_parallel=sequence
    )
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


def body(directory: str, layouts: list[dict[str, Any]], dtype: str, target: str) -> dict[str, Any]:
    """Largest difference of logits for each layout, and whether exports are bit-equal."""
    from sead_megatron.models.export import export_directory
    from sead_megatron.parallel.groups import destroy_groups

    kind = getattr(torch, dtype)
    tokens = torch.randint(3, 250, (3, 40), generator=torch.Generator().manual_seed(1))
    reference = reference_logits(directory, tokens, kind)
    differences, equal = [], []
    for i, layout in enumerate(layouts):
        logits, built = logits_of_layout(directory, tokens, kind, layout)
        worst = torch.zeros(1, dtype=torch.float64)
        if logits is not None:
            worst[0] = (logits - reference).abs().max()
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        differences.append(worst.item())
        path = Path(target) / str(i)
        export_directory(built, directory, path, write=dist.get_rank() == 0, shard_gib=1e-4)
        dist.barrier()
        equal.append(same_tensors(Path(directory), path, kind))
        destroy_groups()
    return {"differences": differences, "export_equal": equal, "scale": reference.abs().max().item()}


def same_tensors(source: Path, exported: Path, dtype: torch.dtype) -> bool:
    """Whether both directories hold the same tensors, bit for bit."""
    stored, written = ({k: v for f in d.glob("*.safetensors") for k, v in load_file(f).items()} for d in (source, exported))
    return stored.keys() == written.keys() and all(torch.equal(stored[k].to(dtype), written[k]) for k in stored)


if __name__ == "__main__":
    rank.run(body)
