"""A converted directory in the place of a Hugging Face directory: the same parameters in every layout, the names that
Megatron itself would give, and the same training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from sead_megatron.errors import UserError
from sead_megatron.metrics import deterministic_keys
from sead_megatron.models.convert import Options, convert, plan_conversion
from sead_megatron.models.convert_verify import verify
from sead_megatron.models.hf_config import read_hf_config
from sead_megatron.models.stored_tensors import read_metadata
from sead_megatron.records import read_records
from tests.distributed.launch import run_ranks
from tests.integration.jobs import run_job, write_job
from tests.tiny_families import SAVE_TINY, YARN, save_tiny_olmo3, save_tiny_qwen3
from tests.tiny_models import save_tiny_llama

LAYOUTS = {"TP2 PP2": (2, 2), "TP4": (4, 1), "PP4": (1, 4)}


def to_distributed(source: Path, target: Path) -> Path:
    """In several files and with several chunks a parameter, of rows and of columns."""
    convert(
        plan_conversion(source, target, Options(shard_bytes=200_000, chunk_bytes=8192)), lambda size: None
    )
    return target


def _models(path: Path) -> dict[str, Path]:
    """Every family, two with tied embeddings, and an OLMo-3 whose layers Megatron stacks."""
    models = {name: save(path / name) for name, save in SAVE_TINY.items()}
    models["tied llama"] = save_tiny_llama(
        path / "tied_llama", tie_word_embeddings=True, num_key_value_heads=8
    )
    models["tied qwen3"] = save_tiny_qwen3(path / "tied_qwen3", tie_word_embeddings=True)
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},
        "full_attention": YARN | {"attention_factor": 1.0},
    }
    models["stacked olmo3"] = save_tiny_olmo3(path / "stacked_olmo3", rope_parameters=rope)
    return models


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """model -> (Hugging Face directory, converted one)."""
    path = tmp_path_factory.mktemp("models")
    return {
        name: (directory, to_distributed(directory, path / f"{directory.name}_converted"))
        for name, directory in _models(path).items()
    }


@pytest.fixture(scope="module")
def reports(
    directories: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], dict[str, Any]]:
    path = tmp_path_factory.mktemp("four_ranks")
    keys = [
        (name, layout)
        for name in directories
        for layout in LAYOUTS
        if (name, layout) != ("nemotron_nas", "TP4")  # it has two KV heads
    ]
    cases = [
        {
            "directory": str(directories[name][0]),
            "converted": str(directories[name][1]),
            "saved": str(path / f"{name} {layout}"),
            "exported": str(path / f"{name} {layout} exported"),
            "tensor": LAYOUTS[layout][0],
            "pipeline": LAYOUTS[layout][1],
        }
        for name, layout in keys
    ]
    results = run_ranks("converted", 4, path, cases=cases)
    return {
        key: result | {"saved": case["saved"]} for key, case, result in zip(keys, cases, results, strict=True)
    }


def test_parameters_are_those_of_the_hugging_face_directory(reports: dict[Any, dict[str, Any]]) -> None:
    """Bit for bit on every rank: through our loader (student, frozen teacher, output layer) and through Megatron's,
    which finds every tensor and object that it asks for and nothing else."""
    assert len(reports) == 7 * len(LAYOUTS) - 1
    for key, report in reports.items():
        assert report["parameters"] > 3, key
        for way, names in report["unequal"].items():
            assert names == [], (key, way)


def test_names_and_shapes_are_megatrons(
    reports: dict[tuple[str, str], dict[str, Any]], directories: dict[str, tuple[Path, Path]]
) -> None:
    for (name, layout), report in reports.items():
        entries = read_metadata(directories[name][1]).state_dict_metadata
        ours = {key: list(getattr(entry, "size", [])) for key, entry in entries.items()}
        assert ours == report["stored"], (name, layout)


def test_an_export_takes_config_and_tokenizer_only(
    reports: dict[tuple[str, str], dict[str, Any]], directories: dict[str, tuple[Path, Path]]
) -> None:
    """What a run exports is a Hugging Face directory, whatever its model came from."""
    for (name, layout), report in reports.items():
        exported = Path(report["saved"] + " exported")
        others = {path.name for path in exported.iterdir() if path.suffix != ".safetensors"}
        kept = {path.name for path in directories[name][0].iterdir() if path.suffix != ".safetensors"}
        assert others - {"model.safetensors.index.json"} == kept, (name, layout)
        assert _same_tensors(directories[name][0], exported), (name, layout)


def test_loading_refuses_a_directory_that_is_not_whole(
    directories: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """Also where no preflight has run."""
    from sead_megatron.models.load import open_checkpoint

    damaged = tmp_path / "damaged"
    shutil.copytree(directories["llama"][1], damaged)
    (damaged / "conversion.json").unlink()
    with (
        pytest.raises(UserError, match=r"without conversion\.json"),
        open_checkpoint(damaged, read_hf_config(damaged)),
    ):
        pass


def test_what_megatron_saves_converts_back(
    reports: dict[tuple[str, str], dict[str, Any]], directories: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """Chunks of another making: those of four ranks. No config.json lies beside them."""
    for number, ((name, layout), report) in enumerate(reports.items()):
        model = directories[name][0]
        _convert_and_compare(Path(report["saved"]), tmp_path / str(number), model)
        assert _same_tensors(model, tmp_path / str(number)), (name, layout)


def _convert_and_compare(source: Path, target: Path, model: Path) -> None:
    plan = plan_conversion(source, target, Options(model=model, shard_bytes=200_000))
    convert(plan, lambda size: None, lambda directory: verify(plan, directory, lambda size: None))


def _same_tensors(one: Path, other: Path) -> bool:
    from safetensors.torch import load_file

    a, b = ({k: v for f in d.glob("*.safetensors") for k, v in load_file(f).items()} for d in (one, other))
    return a.keys() == b.keys() and all(bool((a[name] == b[name]).all()) for name in a)


def test_training_is_the_same(tmp_path: Path) -> None:
    """A run with converted student and teacher, whose engine gets its weights from the first sync, repeats the run
    with the Hugging Face directories number by number."""
    config = write_job(
        tmp_path,
        steps=2,
        student={"parallel": {"tensor": 2}},
        rollout={"tensor_parallel": 2},
        evaluation={"every": 2},
        checkpoint={"every": 2},
    )
    ended = run_job(config, 2, f"run_dir={tmp_path / 'wanted'}")
    assert ended.returncode == 0, ended.output[-4000:]
    for model in ("student", "teacher"):
        to_distributed(tmp_path / model, tmp_path / f"{model}_converted")
    content = yaml.safe_load(config.read_text())
    for model in ("student", "teacher"):
        content[model]["path"] = str(tmp_path / f"{model}_converted")
    config.write_text(yaml.safe_dump(content))
    ended = run_job(config, 2, f"run_dir={tmp_path / 'converted'}")
    assert ended.returncode == 0, ended.output[-4000:]
    wanted, found = (read_records(tmp_path / run / "metrics.jsonl") for run in ("wanted", "converted"))
    assert [record["step"] for record in found] == [1, 2]
    for ours, theirs in zip(found, wanted, strict=True):
        assert {k: ours.get(k) for k in deterministic_keys()} == {
            k: theirs.get(k) for k in deterministic_keys()
        }
    for name in ("evaluations.jsonl", "rollouts/step_2.jsonl"):
        assert (tmp_path / "converted" / name).read_text() == (tmp_path / "wanted" / name).read_text()
    assert json.loads((tmp_path / "student_converted/conversion.json").read_text())["layout"] == "torch_dist"

    # The run's own checkpoint is a distributed checkpoint too.
    step = tmp_path / "converted/checkpoints/step_00000002"
    for number, checkpoint in enumerate((step, tmp_path / "wanted/checkpoints/step_00000002")):
        plan = plan_conversion(
            checkpoint, tmp_path / f"trained_{number}", Options(model=tmp_path / "student")
        )
        convert(plan, lambda size: None)
    assert _same_tensors(tmp_path / "trained_0", tmp_path / "trained_1")
    assert not _same_tensors(tmp_path / "trained_0", tmp_path / "student")
    assert (tmp_path / "trained_0/tokenizer.json").is_file()
