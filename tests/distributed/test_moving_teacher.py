"""A teacher that follows the student is the average of its weights, at TP2 and PP2, and arrives in a checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sead_megatron.config import TrainConfig
from sead_megatron.models.hf_config import read_hf_config
from sead_megatron.plan.memory import Run, plan_memory
from tests.distributed.launch import run_ranks
from tests.tiny_models import save_tiny_llama

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8, "initializer_range": 0.1}
TP, PP, DP = [2, 1, True], [1, 2], [1, 1]


def case(name: str, layout: list[Any], dtype: str = "float32", *, resumes: bool = False) -> dict[str, Any]:
    return {"name": name, "student": layout, "teacher": layout, "dtype": dtype, "resumes": resumes}


CASES = [
    case("float32", TP),
    case("float32", TP, resumes=True),
    case("float32", PP, resumes=True),
    case("float32", DP, resumes=True),
    case("bfloat16", PP, "bfloat16"),
    case("bfloat16", TP, "bfloat16", resumes=True),
]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def reports(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    path = tmp_path_factory.mktemp("moving")
    student, teacher = (
        str(save_tiny_llama(path / name, seed=seed, tie_word_embeddings=request.param, **SMALL))
        for seed, name in enumerate(("student", "teacher"))
    )
    cases = [given | {"average": str(path / f"{given['name']}.safetensors")} for given in CASES]
    found = run_ranks("moving", 2, path, student=student, teacher=teacher, cases=cases, directory=str(path))
    return path, found


def test_the_closed_form(reports: tuple[Path, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Logprobs by transformers with the average of the exported weights of each step, computed in float64."""
    from transformers import AutoModelForCausalLM

    from tests.distributed.launch import PROGRAMS

    path, found = reports
    monkeypatch.syspath_prepend(str(PROGRAMS))
    monkeypatch.syspath_prepend(str(PROGRAMS.parents[1]))
    import moving
    import update

    for name, tolerance in (("float32", 1e-4), ("bfloat16", 0.15)):
        directory = path / f"average_{name}"
        shutil.copytree(path / "teacher", directory)
        shutil.copy(path / f"{name}.safetensors", directory / "model.safetensors")
        models = [
            AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32).eval()
            for d in (directory, path / "teacher")
        ]
        wanted: list[list[float]] = [[], []]
        for rollout in update.fixed_rollouts(moving.STEPS):
            ids = torch.tensor([*rollout.prompt_ids, *rollout.response_ids])[None]
            for values, model in zip(wanted, models, strict=True):
                with torch.no_grad():
                    logprobs = model(ids).logits[0].log_softmax(-1)
                places = range(len(rollout.prompt_ids) - 1, ids.shape[1] - 1)
                values += [float(logprobs[i, ids[0, i + 1]]) for i in places]
        # The teacher has moved by far more than what is allowed.
        assert max(abs(a - b) for a, b in zip(*wanted, strict=True)) > 5 * tolerance
        for given, report in zip(CASES, found, strict=True):
            if given["name"] == name:
                assert report["logprobs"] == pytest.approx(wanted[0], abs=tolerance), given


def test_a_checkpoint_in_another_layout(reports: tuple[Path, list[dict[str, Any]]]) -> None:
    """Bit for bit in the layout that saved it."""
    _, found = reports
    assert found[1]["logprobs"] == found[0]["logprobs"]
    for resumed in found[2:4]:
        assert resumed["logprobs"] == pytest.approx(found[0]["logprobs"], abs=1e-5)


def test_averages_are_float32(reports: tuple[Path, list[dict[str, Any]]]) -> None:
    """Bits that the teacher's own bfloat16 weights do not have, also after a checkpoint; the plan counts them."""
    path, found = reports
    for given, report in zip(CASES, found, strict=True):
        assert report["rounded"] and report["kept"] > 1000, given
    config = TrainConfig.model_validate(
        {
            "device": "cpu",
            "run_dir": "unused",
            "steps": 3,
            "student": {"path": str(path / "student"), "parallel": {"pipeline": 2}},
            "teacher": {"path": str(path / "teacher"), "parallel": {"pipeline": 2}, "ema": 0.75},
            "data": {"prompts": "unused", "prompts_per_step": 12},
            "rollout": {"max_new_tokens": 40, "max_model_len": 64, "kv_cache_gib": 0.1},
            "batch": {"max_tokens_per_microbatch": 128},
        }
    )
    models = [read_hf_config(path / name) for name in ("student", "teacher")]
    memory = plan_memory(Run(config, models[0], (models[1],), 2, None))
    assert memory[0].always["teacher averages"] == found[4]["held"]  # the report is rank 0's
