"""Hugging Face logits and gradients against ours in several layouts, and export back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import rank
import torch
import torch.distributed as dist
from faults import faulty_code, faulty_config
from reference import reference
from safetensors.torch import load_file
from tiny_models import fixed_rollout


class Model:
    """Our model of a directory in one layout, its inputs as one packed row."""

    def __init__(self, case: dict[str, Any], tokens: torch.Tensor) -> None:
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        from sead_megatron.data.packing import build_row
        from sead_megatron.models.build import build_model
        from sead_megatron.models.hf_config import read_hf_config
        from sead_megatron.models.load import load_weights
        from sead_megatron.models.precision import Precision
        from sead_megatron.parallel.groups import student_groups
        from sead_megatron.parallel.layout import Layout

        layout, self.tokens = case["layout"], tokens
        self.sequence_parallel = layout.get("sequence", False)
        self.groups = student_groups(Layout(layout["tensor"], layout["pipeline"], dist.get_world_size()))
        model_parallel_cuda_manual_seed(0)
        config = faulty_config(read_hf_config(case["directory"]), case.get("fault"))
        self.built = build_model(
            config,
            self.groups,
            Precision(getattr(torch, case["dtype"])),
            on_cpu=True,
            trainable=True,
            sequence_parallel=self.sequence_parallel,
            stages=layout.get("stages"),
        )
        load_weights(self.built, case["directory"])
        # One more token makes every position of `tokens` predict a response token.
        rollouts = [fixed_rollout(row[:1].tolist(), [*row[1:].tolist(), 0]) for row in tokens]
        offsets = torch.arange(len(tokens) + 1) * tokens.shape[1]
        self.row = build_row(list(range(len(tokens))), rollouts, offsets, layout["tensor"])

    def logits(self) -> torch.Tensor | None:
        """[B, S, V] on the last stage's ranks, None elsewhere."""
        from sead_megatron.training.pipeline import forward_row, run_rows

        def step(rows: Any, model: Any) -> Any:
            row = next(rows)
            hidden = forward_row(model, row)

            def collect(output: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
                local = self._local_logits(output)
                parts = [torch.empty_like(local) for _ in range(self.groups.layout.tensor)]
                dist.all_gather(parts, local.contiguous(), group=self.groups.collection.tp)
                return torch.cat(parts, -1)[:, : self.built.config.vocab_size]

            return hidden, collect

        self.built.module.eval()
        with torch.no_grad():
            outputs = run_rows(self.built.module, self.groups, [self.row], step, train=False)
        return outputs[0].view(*self.tokens.shape, -1) if self.groups.is_last_stage else None

    def gradients(self, weights: torch.Tensor, fault: str | None) -> dict[str, torch.Tensor]:
        """Gradients of sum(logits * weights) by Hugging Face name, through Megatron's buffers and reductions."""
        from megatron.core.distributed import finalize_model_grads

        from sead_megatron.models.export import HFStream
        from sead_megatron.training.optimizer import wrap_for_training
        from sead_megatron.training.pipeline import forward_row, run_rows

        ddp = wrap_for_training(self.built, distributed_optimizer=False)
        megatron = self.built.module.config
        if fault == "QK norm gradients not summed over TP":
            megatron.qk_layernorm = False
        megatron.finalize_model_grads_func = lambda models, tokens, **kwargs: finalize_model_grads(
            models, None, **kwargs
        )
        flat = weights.flatten(0, 1)
        mine = torch.nn.functional.pad(flat, (0, self._padded() - flat.shape[1]))
        width = self._padded() // self.groups.layout.tensor
        mine = mine[:, self.built.vocab_start : self.built.vocab_start + width]

        def step(rows: Any, model: Any) -> Any:
            hidden = forward_row(model, next(rows))

            def loss(output: torch.Tensor) -> Any:
                total = (self._local_logits(output) * mine).sum()
                return total, torch.zeros((), dtype=torch.int), total.detach()

            return hidden, loss

        self.built.module.train()
        ddp.zero_grad_buffer()
        run_rows(ddp, self.groups, [self.row], step, train=True)
        for parameter in self.built.module.parameters():
            # Every replica saw the same row, and gradients are summed over replicas.
            parameter.data = parameter.main_grad / self.groups.layout.data
        return dict(HFStream(self.built))

    def _local_logits(self, output: torch.Tensor) -> torch.Tensor:
        from sead_megatron.training.pipeline import response_rows

        rows = response_rows(output, self.row, self.groups, self.sequence_parallel)
        return rows @ self.built.module.output_weight().T

    def _padded(self) -> int:
        from sead_megatron.models.build import padded_vocab_size

        return padded_vocab_size(self.built.config.vocab_size, self.groups.layout.tensor)


def run_case(case: dict[str, Any], tokens: torch.Tensor, target: Path) -> dict[str, Any]:
    """The largest difference of logits; the export; with `"gradients": True` their largest relative difference."""
    from sead_megatron.models.export import export_directory

    dtype = getattr(torch, case["dtype"])
    fault = case.get("fault")
    architecture = json.loads((Path(case["directory"]) / "config.json").read_text())["architectures"][0]
    weights = None
    if case.get("gradients"):
        weights = torch.randn(*tokens.shape, 250, generator=torch.Generator().manual_seed(5), dtype=dtype)
    expected, expected_gradients = reference(case["directory"], tokens, dtype, weights)
    with faulty_code(architecture, fault):
        model = Model(case, tokens)
        logits = model.logits()
        worst = torch.zeros(1, dtype=torch.float64)
        if logits is not None:
            worst[0] = (logits - expected).abs().max()
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        result: dict[str, Any] = {
            "difference": worst.item(),
            "scale": expected.abs().max().item(),
            "vocab": (model.built.config.vocab_size, model._padded()),
            "layers": len(model.built.module.decoder.layers),
        }
        if fault is None:
            export_directory(
                model.built, case["directory"], target, write=dist.get_rank() == 0, shard_gib=1e-4
            )
            dist.barrier()
            result |= compare_export(Path(case["directory"]), target, dtype)
        if weights is not None:
            result["gradients"] = largest_relative_difference(
                model.gradients(weights, fault), expected_gradients
            )
    return result


def largest_relative_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Over all tensors, the largest difference relative to the tensor's largest element."""
    assert ours.keys() == theirs.keys()
    return max(((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()).item() for name in ours)


def body(cases: list[dict[str, Any]], target: str) -> list[dict[str, Any]]:
    """The report of each case: directory, dtype, layout, and maybe a fault or gradients."""
    from sead_megatron.parallel.groups import destroy_groups

    tokens = torch.randint(3, 250, (3, 40), generator=torch.Generator().manual_seed(1))
    results = []
    for i, case in enumerate(cases):
        results.append(run_case(case, tokens, Path(target) / str(i)))
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
