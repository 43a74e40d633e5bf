"""tools/convert_checkpoint.py: round trips, types, memory, the command line, and runs that take its output."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sead_megatron.config import check_config, load_config
from sead_megatron.errors import UserError
from sead_megatron.models import convert as library
from sead_megatron.models import distributed_writer
from sead_megatron.models.convert import Options, convert, plan_conversion
from sead_megatron.models.hf_config import read_hf_config
from sead_megatron.models.stored_layout import chunks, layers_are_stacked, stored_parameters
from sead_megatron.models.stored_tensors import StoredTensors
from sead_megatron.preflight import preflight
from tests.conversions import (
    ROOT,
    cut,
    edit_config,
    mistake,
    run,
    same_bits,
    tensors,
)
from tests.tiny_families import SAVE_TINY, YARN, save_tiny_olmo3
from tests.tiny_inputs import write_inputs


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("convert_checkpoint", ROOT / "tools/convert_checkpoint.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- round trips


@pytest.mark.parametrize("family", [*SAVE_TINY, "tied"])
def test_round_trip(families: dict[str, Path], tmp_path: Path, family: str) -> None:
    """Every family comes back bit for bit, in shards whose index transformers could follow; nothing else is lost."""
    source = families[family]
    run(source, tmp_path / "there")
    run(tmp_path / "there", tmp_path / "back")
    assert same_bits(tensors(source), tensors(tmp_path / "back"))
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(source).values())
    assert {
        name: load_file(tmp_path / "back" / file)[name].shape for name, file in index["weight_map"].items()
    }
    for directory in (tmp_path / "there", tmp_path / "back"):
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            assert (directory / name).read_bytes() == (source / name).read_bytes()
        marker = json.loads((directory / "conversion.json").read_text())
        assert marker["tensors"] == len(tensors(source)) and marker["dtype"] == "float32"
        assert marker["bytes"] == index["metadata"]["total_size"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "there"]


def test_chunks_fill_every_parameter_once(families: dict[str, Path]) -> None:
    """Rows and columns are cut, and each element lies in one chunk of at most the given size (a query group is
    larger)."""
    for family, directory in families.items():
        for parameter in stored_parameters(read_hf_config(directory)):
            boxes = chunks(parameter, 4, 4096)
            seen = torch.zeros(parameter.shape[0], parameter.width)
            for box in boxes:
                seen[box.row_start : box.row_stop, box.column_start : box.column_stop] += 1
            assert bool((seen == 1).all()), (family, parameter.name)
            if parameter.shape[0] > 200:
                assert len(boxes) >= 4, (family, parameter.name)


def test_names(families: dict[str, Path], tmp_path: Path) -> None:
    """Megatron stacks layers that are alike; its linear layers have a second entry (compared with Megatron's own names
    in tests/distributed/test_converted.py)."""

    def extra_states(directory: Path) -> list[str | None]:
        return [parameter.extra_state_key for parameter in stored_parameters(read_hf_config(directory))]

    assert layers_are_stacked(read_hf_config(families["llama"]))
    assert not layers_are_stacked(read_hf_config(families["nemotron_nas"]))
    assert not layers_are_stacked(read_hf_config(families["olmo3"]))
    rope = {"full_attention": YARN | {"attention_factor": 1.0}}
    rope["sliding_attention"] = {"rope_type": "default", "rope_theta": 500000.0}
    assert layers_are_stacked(read_hf_config(save_tiny_olmo3(tmp_path / "olmo3", rope_parameters=rope)))
    assert "decoder.layers.mlp.linear_fc1._extra_state/shard_3_4" in extra_states(families["llama"])
    key = "decoder.layers.2.self_attention.linear._extra_state/shard_0_1"
    assert key in extra_states(families["nemotron_nas"])
    assert sum(key is not None for key in extra_states(families["llama"])) == 4 * 4


def test_types_are_kept_or_cast(llama: Path, tmp_path: Path) -> None:
    """Norms in float32 beside bfloat16 matrices come back as they were; NaNs, infinities and -0 too."""
    stored = tensors(llama)
    mixed = {name: t if "norm" in name else t.bfloat16() for name, t in stored.items()}
    mixed["model.embed_tokens.weight"][0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40])
    save_file(mixed, llama / "model.safetensors")
    run(llama, tmp_path / "there")
    assert json.loads((tmp_path / "there/conversion.json").read_text())["dtype"] == "mixed"
    run(tmp_path / "there", tmp_path / "back")
    as_bytes = [
        {name: t.view(torch.uint8) for name, t in of.items()} for of in (mixed, tensors(tmp_path / "back"))
    ]
    assert same_bits(*as_bytes)
    run(tmp_path / "there", tmp_path / "half", Options(dtype=torch.float16))
    assert {t.dtype for t in tensors(tmp_path / "half").values()} == {torch.float16}
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "float16"


def test_a_name_holds_one_type(llama: Path, tmp_path: Path) -> None:
    name = "model.layers.2.self_attn.k_proj.weight"
    stored = tensors(llama)
    save_file(stored | {name: stored[name].bfloat16()}, llama / "model.safetensors")
    assert mistake(llama, tmp_path / "out") == (
        f'SRC: {name} = "bfloat16": must be float32 like model.layers.0.self_attn.q_proj.weight: '
        "decoder.layers.self_attention.linear_qkv.weight holds both; give --dtype"
    )
    run(llama, tmp_path / "out", Options(dtype=torch.bfloat16))


def test_memory_is_that_of_a_chunk(
    families: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's writer keeps references to what it wrote; their memory is given back all the same."""
    made: list[torch.Tensor] = []
    make = distributed_writer.make_chunk

    def recorded(*arguments: Any) -> tuple[torch.Tensor, int]:
        chunk, filled = make(*arguments)
        made.append(chunk)
        return chunk, filled

    monkeypatch.setattr(distributed_writer, "make_chunk", recorded)
    plan = plan_conversion(families["nemotron_nas"], tmp_path / "out", Options(chunk_bytes=16384))
    held: list[int] = []
    convert(plan, lambda size: held.append(sum(chunk.untyped_storage().nbytes() for chunk in made)))
    assert len(plan.files) == 1 and plan.tensor_bytes > 1_500_000
    assert max(held) <= 16384 * 2


def test_a_reader_of_some_columns_reads_little_else(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank of TP2 needs half the columns of a row-parallel weight, and half the rows of the others."""
    with StoredTensors(converted, read_hf_config(converted)) as stored:
        read: list[int] = []
        load = StoredTensors._load
        monkeypatch.setattr(
            StoredTensors, "_load", lambda self, chunk: (t := load(self, chunk), read.append(t.numel()))[0]
        )
        for name, dim in (
            ("model.layers.1.mlp.down_proj.weight", 1),
            ("model.layers.1.mlp.up_proj.weight", 0),
        ):
            read.clear()
            half = stored.shape(name)[dim] // 2
            part = stored.read(name, dim, half, 2 * half)
            assert sum(read) == part.numel(), name


# --- the command line


def test_dry_run(
    tool: ModuleType, families: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main([str(families["nemotron_nas"]), str(tmp_path / "out"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "model.layers.0.self_attn.q_proj.weight",
        "decoder.layers.0.self_attention.linear_qkv.weight",
        "GroupedQKV",
        "250 × 64",
        "256 × 64",
        "float32",
        "38 tensors, 1.9 MB in 1 files, the largest tensor 196.6 kB",
    ):
        assert part in shown, part
    assert list(tmp_path.iterdir()) == []


def test_command_line(
    tool: ModuleType, families: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out, back = str(families["tied"]), str(tmp_path / "out"), str(tmp_path / "back")
    assert tool.main([source, out, "--verify", "--shard-gb", "0.0002", "--dtype", "bfloat16"]) == 0
    assert tool.main([out, back]) == 0
    assert {t.dtype for t in tensors(tmp_path / "back").values()} == {torch.bfloat16}
    assert tool.main([source, out, "--verify-only", "--dtype", "bfloat16"]) == 0
    assert tool.main([out, back, "--verify-only"]) == 0
    assert f"{back} equals {out} bit by bit" in capsys.readouterr().out
    assert tool.main([source, out, "--verify-only"]) == 2
    assert "must be [250, 64" in capsys.readouterr().err
    assert tool.main([source, out]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1] == f'error: OUT = "{out}": exists; give another directory, or --overwrite'
    assert tool.main([source, out, "--overwrite"]) == 0
    assert json.loads((tmp_path / "out/conversion.json").read_text())["dtype"] == "float32"
    capsys.readouterr()
    for arguments, message in (
        ([source, out, "--overwrite", "--shard-gb", "0"], "--shard-gb = 0.0: must be positive"),
        ([source, str(tmp_path / "none"), "--verify-only"], "no such directory; convert first"),
        ([source, back, "--verify-only"], "does not hold torch_dist; give what SOURCE was converted to"),
        ([str(tmp_path / "none"), out], "no such directory; give the directory of a checkpoint"),
    ):
        assert tool.main(arguments) == 2
        assert message in capsys.readouterr().err


# --- as the model of a run


def test_a_run_accepts_converted_models(tmp_path: Path) -> None:
    """Configuration checks and preflight, and what they refuse."""
    config = write_inputs(tmp_path)
    for name in ("student", "teacher"):
        run(tmp_path / name, tmp_path / f"{name}_converted")
        shutil.rmtree(tmp_path / name)
        (tmp_path / f"{name}_converted").rename(tmp_path / name)
    loaded = load_config(config, ["device=cpu", "rollout.kv_cache_gib=0.1"])
    check_config(loaded, 2)
    preflight(loaded)
    student = tmp_path / "student"
    edit_config(student, intermediate_size=48)
    with pytest.raises(UserError, match=r"\.metadata: decoder\.layers\.mlp\.linear_fc1\.weight"):
        preflight(loaded)
    edit_config(student, intermediate_size=96)
    cut("__0_0.distcp", 1)(student)
    for stage in (lambda: check_config(loaded, 2), lambda: preflight(loaded)):
        with pytest.raises(UserError, match=r"__0_0\.distcp: \d+ bytes, must have \d+ by conversion\.json"):
            stage()


def test_recognising_needs_no_torch(converted: Path) -> None:
    """`sead_megatron check` reads configurations before anything heavy is imported."""
    code = (
        "import sys; from sead_megatron.models.converted import check_converted, is_distributed\n"
        f"assert is_distributed({str(converted)!r}) and check_converted({str(converted)!r}).tensors == 39\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_unknown_layouts_are_not_guessed(families: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sead_megatron.models.stored_layout.GateUp", type("Other", (), {}))
    with pytest.raises(TypeError, match="no stored form of GateUp"):
        stored_parameters(read_hf_config(families["llama"]))
    assert library.GB == 10**9
