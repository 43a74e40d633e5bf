"""What a conversion refuses, and that a comparison finds a single flipped byte."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as distributed_checkpoint

from sead_megatron.errors import UserError
from sead_megatron.models import distributed_writer, partial_directory
from sead_megatron.models.convert import Options, plan_conversion
from sead_megatron.models.convert_verify import verify
from sead_megatron.models.hf_config import read_hf_config
from sead_megatron.models.hf_tensors import HFTensor, HFTensors, write_safetensors
from sead_megatron.models.safetensors_index import read_index
from sead_megatron.models.stored_tensors import StoredTensors, read_metadata
from tests.conversions import (
    SMALL,
    change_tensors,
    cut,
    edit_config,
    flip,
    mistake,
    run,
    same_bits,
    tensors,
)


def test_outputs_that_are_refused(families: dict[str, Path], llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert (
        mistake(llama, tmp_path / "out") == 'OUT = "DIR/out": exists; give another directory, or --overwrite'
    )
    (tmp_path / "out/thesis.tex").touch()
    overwriting = Options(overwrite=True)
    assert mistake(llama, tmp_path / "out", overwriting).startswith(
        'OUT = "DIR/out": is no model that could be overwritten'
    )
    (tmp_path / "link").symlink_to(families["tied"])
    assert "is no model that could be overwritten" in mistake(llama, tmp_path / "link", overwriting)
    assert "is the source or holds it" in mistake(llama, llama, overwriting)
    assert "is the source or holds it" in mistake(llama, tmp_path, overwriting)
    assert same_bits(tensors(llama), tensors(families["llama"])) and (tmp_path / "out/thesis.tex").exists()


def test_disk_space(families: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_500_000)
    monkeypatch.setattr(partial_directory.shutil, "disk_usage", lambda path: usage)
    message = mistake(families["llama"], tmp_path / "new/out")
    assert "needs 6.0 MB, and" in message and "has 1.5 MB free; free some space" in message
    assert list(tmp_path.iterdir()) == []


BROKEN_SOURCES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a tensor is missing": (
        change_tensors(lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        "SRC: lacks model.layers.1.mlp.up_proj.weight; use a complete checkpoint",
    ),
    "a tensor too many": (
        change_tensors(lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.zeros(1)})),
        "SRC: holds model.layers.0.mlp.up_proj.bias, which the architecture of config.json does not have",
    ),
    "another shape": (
        change_tensors(lambda t: t.update({"model.norm.weight": torch.zeros(63)})),
        "SRC/model.safetensors: model.norm.weight = [63]: must have shape [64] by config.json",
    ),
    "quantized": (
        change_tensors(lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)})),
        'SRC/model.safetensors: model.norm.weight = "I8": must be BF16, F16, F32 or F64',
    ),
    "cut short": (cut("model.safetensors", 1), "SRC/model.safetensors: "),
    "architecture": (
        lambda directory: edit_config(directory, architectures=["MixtralForCausalLM"]),
        'SRC/config.json: architectures = ["MixtralForCausalLM"]: not a supported architecture; use a model of',
    ),
}


@pytest.mark.parametrize("case", BROKEN_SOURCES)
def test_sources_that_are_refused(llama: Path, tmp_path: Path, case: str) -> None:
    damage, message = BROKEN_SOURCES[case]
    damage(llama)
    assert mistake(llama, tmp_path / "out").startswith(message)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def _edit_marker(**changes: Any) -> Callable[[Path], object]:
    def damage(directory: Path) -> None:
        content = json.loads((directory / "conversion.json").read_text()) | changes
        (directory / "conversion.json").write_text(json.dumps(content))

    return damage


BROKEN_CONVERTED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no completion marker": (
        lambda directory: (directory / "conversion.json").unlink(),
        "SRC: is a distributed checkpoint without conversion.json, so not whole; convert the model again",
    ),
    "another format": (
        _edit_marker(format_version=2),
        "SRC/conversion.json: format_version = 2: must be 1; convert the model again",
    ),
    "a marker without files": (_edit_marker(files=None), "SRC/conversion.json: lacks a part or has too much"),
    "a missing file": (
        lambda directory: (directory / "__2_0.distcp").unlink(),
        "SRC/__2_0.distcp: missing; conversion.json names it; copy the directory again",
    ),
    "a short file": (cut("__2_0.distcp", 1), "SRC/__2_0.distcp: "),
    "a short index": (cut(".metadata", 1), "SRC/.metadata: "),
    "another model": (
        lambda directory: edit_config(directory, intermediate_size=96),
        "SRC/.metadata: decoder.layers.mlp.linear_fc1.weight = [4, 320, 64]: must have shape [4, 192, 64]",
    ),
    "more layers": (
        lambda directory: edit_config(directory, num_hidden_layers=5),
        "SRC/.metadata: decoder.layers.self_attention.linear_qkv.weight = [4, 256, 64]: must have shape [5, 256",
    ),
    "tied": (
        lambda directory: edit_config(directory, tie_word_embeddings=True),
        "SRC/.metadata: holds output_layer.weight, which the architecture of config.json does not have",
    ),
}


@pytest.mark.parametrize("case", BROKEN_CONVERTED)
def test_converted_directories_that_are_refused(converted: Path, tmp_path: Path, case: str) -> None:
    damage, message = BROKEN_CONVERTED[case]
    damage(converted)
    assert mistake(converted, tmp_path / "out").startswith(message)
    assert not (tmp_path / "out").exists()


def test_checkpoints_of_a_run(converted: Path, families: dict[str, Path], tmp_path: Path) -> None:
    """They have neither config.json nor marker: another directory gives the config, torch's index the sizes. The
    optimizer's state stays behind."""

    def add_moment(metadata: Any) -> None:
        metadata.state_dict_metadata[f"optimizer.state.exp_avg.{NORM}"] = metadata.state_dict_metadata[NORM]

    _edit_metadata(add_moment)(converted)
    bare = tmp_path / "step_00000004"
    shutil.copytree(converted, bare)
    for name in ("config.json", "conversion.json"):
        (bare / name).unlink()
    assert mistake(bare, tmp_path / "out") == (
        "SRC: is a distributed checkpoint without config.json; give --model DIR, the directory of the model that the "
        "run trained"
    )
    given = Options(model=families["llama"])
    run(bare, tmp_path / "out", given)
    assert same_bits(tensors(tmp_path / "out"), tensors(families["llama"]))
    assert "has a config.json of its own" in mistake(converted, tmp_path / "again", given)
    cut("__3_0.distcp", 1)(bare)
    message = mistake(bare, tmp_path / "again", given)
    assert message.startswith("SRC/__3_0.distcp: ") and "bytes, must have" in message
    (bare / "__3_0.distcp").unlink()
    assert mistake(bare, tmp_path / "again", given).startswith(
        "SRC/__3_0.distcp: missing; .metadata names it"
    )


def _edit_metadata(change: Callable[[Any], object]) -> Callable[[Path], object]:
    """Torch's index, and the marker with its new size."""

    def damage(directory: Path) -> None:
        metadata = pickle.loads((directory / ".metadata").read_bytes())
        change(metadata)
        (directory / ".metadata").write_bytes(pickle.dumps(metadata))
        files = json.loads((directory / "conversion.json").read_text())["files"]
        _edit_marker(files=files | {".metadata": (directory / ".metadata").stat().st_size})(directory)

    return damage


NORM = "decoder.final_layernorm.weight"
BROKEN_INDEX: dict[str, tuple[Callable[[Any], object], str]] = {
    "a lacking name": (
        lambda metadata: metadata.state_dict_metadata.pop(NORM),
        f"SRC/.metadata: lacks {NORM}; use a complete checkpoint",
    ),
    "a lacking chunk": (
        lambda metadata: metadata.state_dict_metadata["output_layer.weight"].chunks.pop(),
        "SRC/.metadata: output_layer.weight: its chunks hold 15360 of 16384 elements; use a complete checkpoint",
    ),
    "integers": (
        lambda metadata: setattr(metadata.state_dict_metadata[NORM].properties, "dtype", torch.int8),
        'SRC: model.norm.weight = "int8": must be bfloat16, float16, float32 or float64; use an unquantized',
    ),
}


@pytest.mark.parametrize("case", BROKEN_INDEX)
def test_indices_that_are_refused(converted: Path, tmp_path: Path, case: str) -> None:
    change, message = BROKEN_INDEX[case]
    _edit_metadata(change)(converted)
    assert mistake(converted, tmp_path / "out").startswith(message)


def test_overwritten_files(converted: Path, llama: Path, tmp_path: Path) -> None:
    """Of the right size, and not what they should be."""
    size = (converted / "__1_0.distcp").stat().st_size
    (converted / "__1_0.distcp").write_bytes(bytes(size))
    message = mistake(converted, tmp_path / "out")
    assert message.startswith(
        "SRC/__1_0.distcp: decoder.layers.self_attention.linear_qkv.weight: cannot be read ("
    )
    with HFTensors(read_index(llama)) as opened:
        os.truncate(llama / "model.safetensors", 9000)
        with pytest.raises(UserError, match=r"model\.safetensors: ended while it was read"):
            opened.read("model.layers.3.mlp.up_proj.weight")


def test_a_writer_counts_its_bytes(tmp_path: Path) -> None:
    wanted = HFTensor("a", (4, 2), torch.float32)
    with pytest.raises(RuntimeError, match="instead of"):
        write_safetensors(tmp_path / "file", [wanted], iter([torch.zeros(3, 2)]), metadata={})


def test_torch_reads_and_writes_it_too(converted: Path, families: dict[str, Path], tmp_path: Path) -> None:
    """Plain torch.distributed.checkpoint takes the tensors by name, whole; what it writes in its own way converts."""
    entries = read_metadata(converted).state_dict_metadata
    assert "decoder.layers.mlp.linear_fc1._extra_state/shard_3_4" in entries
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if hasattr(entry, "size")
    }
    distributed_checkpoint.load(state, checkpoint_id=converted, no_dist=True)
    stored = tensors(families["llama"])
    gate = state["decoder.layers.mlp.linear_fc1.weight"][2, :160]
    assert torch.equal(gate, stored["model.layers.2.mlp.gate_proj.weight"])
    distributed_checkpoint.save(state, checkpoint_id=tmp_path / "plain", no_dist=True)
    run(tmp_path / "plain", tmp_path / "back", Options(model=families["llama"]))
    assert same_bits(tensors(tmp_path / "back"), stored)


# --- one flipped byte


def _difference(source: Path, target: Path) -> str:
    with pytest.raises(UserError) as caught:
        verify(plan_conversion(source, target, SMALL, writes=False), target, lambda size: None)
    return str(caught.value)


def _position(directory: Path, file: str, wanted: torch.Tensor) -> int:
    """Where the first bytes of `wanted` lie."""
    at = (directory / file).read_bytes().find(wanted.flatten()[:16].numpy().tobytes())
    assert at > 0
    return at


def test_one_flipped_byte_in_a_distributed_checkpoint(converted: Path, families: dict[str, Path]) -> None:
    name = "model.norm.weight"
    file = max(converted.glob("*.distcp"), key=lambda path: int(path.name.split("_")[2])).name
    at = _position(converted, file, tensors(families["llama"])[name])
    verify(plan_conversion(families["llama"], converted, SMALL, writes=False), converted, lambda size: None)
    flip(converted / file, at + 17)
    assert f"{name}: 1 of its bytes in rows 0 to 63 differ from the source's" in _difference(
        families["llama"], converted
    )


def test_padding_is_compared_too(converted: Path, families: dict[str, Path]) -> None:
    """Rows 250 to 255 of the embedding belong to no token, yet they are trained on and added up."""
    with StoredTensors(converted, read_hf_config(converted)) as stored:
        assert stored.padding(stored.parameters[0]).shape == (6, 64)
    index = next(
        index
        for index in read_metadata(converted).storage_data
        if index.fqn == "embedding.word_embeddings.weight" and index.offset[0] >= 240
    )
    place = read_metadata(converted).storage_data[index]
    last_row = tensors(families["llama"])["model.embed_tokens.weight"][249]
    at = _position(converted, place.relative_path, last_row)
    flip(converted / place.relative_path, at + 64 * 4 + 3)
    assert "embedding.word_embeddings.weight: its padding is not zero" in _difference(
        families["llama"], converted
    )


def test_one_flipped_byte_in_safetensors(converted: Path, tmp_path: Path) -> None:
    run(converted, tmp_path / "back")
    file = sorted((tmp_path / "back").glob("*.safetensors"))[2]
    flip(file, file.stat().st_size - 1)
    name = "model.layers."
    message = _difference(converted, tmp_path / "back")
    assert name in message and "1 of its bytes in rows" in message


def test_a_conversion_that_differs_gets_no_name(
    families: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong between reading and writing: here the last row of every chunk."""
    make = distributed_writer.make_chunk

    def wrong(*arguments: Any) -> tuple[torch.Tensor, int]:
        chunk, filled = make(*arguments)
        chunk[-1] += 1
        return chunk, filled

    monkeypatch.setattr(distributed_writer, "make_chunk", wrong)
    assert "differ from the source's; check the disk" in mistake(families["olmo3"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
