"""A model's parameters from its Hugging Face directory, from the converted one, and through Megatron's own loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rank
import torch
import torch.distributed as dist

METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}  # what training/checkpoint.py passes


def build(config: Any, groups: Any, *, trainable: bool) -> Any:
    """A model whose parameters are NaN: what is not loaded shows."""
    from sead_megatron.models.build import build_model
    from sead_megatron.models.precision import Precision

    model = build_model(config, groups, Precision(torch.float32), on_cpu=True, trainable=trainable)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.fill_(float("nan"))
    return model


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.module.named_parameters()}


def unequal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


def through_megatron(model: Any, directory: str) -> None:
    """Megatron's loader with the model's own names, nothing left out."""
    from megatron.core import dist_checkpointing

    state = model.module.sharded_state_dict(metadata=dict(METADATA))
    loaded, missing, unexpected = dist_checkpointing.load(
        state, directory, strict=dist_checkpointing.validation.StrictHandling.RETURN_ALL
    )
    assert not missing and not unexpected, (missing, unexpected)
    model.module.load_state_dict(loaded)


def described(model: Any) -> dict[str, list[int]]:
    """Every stored tensor and object by name, with its global shape."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factories

    state = model.module.sharded_state_dict(metadata=dict(METADATA))
    apply_factories(state)
    return {
        value.unique_key if isinstance(value, ShardedObject) else value.key: []
        if isinstance(value, ShardedObject)
        else list(value.global_shape)
        for value in nested_values(state)
    }


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Names of unequal parameters on any rank, for each way to load; what Megatron stores."""
    from megatron.core import dist_checkpointing
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from sead_megatron.models.export import export_directory
    from sead_megatron.models.hf_config import read_hf_config
    from sead_megatron.models.load import load_output_shard, load_weights
    from sead_megatron.parallel.groups import destroy_groups, student_groups
    from sead_megatron.parallel.layout import Layout

    groups = student_groups(Layout(case["tensor"], case["pipeline"], dist.get_world_size()))
    model_parallel_cuda_manual_seed(0)
    config = read_hf_config(case["converted"])
    found: dict[str, list[str]] = {}
    for trainable in (True, False):
        loaded = []
        for source in ("directory", "converted"):
            model = build(config, groups, trainable=trainable)
            load_weights(model, case[source])
            loaded.append(weights(model))
        found[f"trainable {trainable}"] = unequal(*loaded)
        if trainable:
            wanted, names = loaded[0], described(model)
            dist_checkpointing.save(
                model.module.sharded_state_dict(metadata=dict(METADATA)), _made(case["saved"])
            )
            model = build(config, groups, trainable=True)
            through_megatron(model, case["converted"])
            found["Megatron's loader"] = unequal(weights(model), wanted)
            export_directory(
                model, case["converted"], case["exported"], write=dist.get_rank() == 0, shard_gib=1e-4
            )
    cpu = torch.device("cpu")
    outputs = [
        load_output_shard(config, case[source], groups, torch.float32, cpu)
        for source in ("directory", "converted")
    ]
    found["output layer"] = [] if torch.equal(*outputs) else ["output layer"]
    destroy_groups()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (found, names))
    return {
        "unequal": {way: [name for of, _ in everyone for name in of[way]] for way in found},
        "stored": {name: shape for _, of in everyone for name, shape in of.items()},
        "parameters": sum(len(of) for of in [wanted]),
    }


def _made(directory: str) -> str:
    if dist.get_rank() == 0:
        Path(directory).mkdir()
    dist.barrier()
    return directory


def body(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [run_case(case) for case in cases]


if __name__ == "__main__":
    rank.run(body)
