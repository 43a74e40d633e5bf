"""Headers only: offsets against the safetensors library, and each way a download can be broken."""

import json
import struct
from pathlib import Path

import pytest

from sead_megatron.errors import UserError
from sead_megatron.models.safetensors_index import check_tensors, read_header, read_index
from tests.tiny_inputs import write_safetensors


def mistake(directory: Path) -> str:
    with pytest.raises(UserError) as error:
        read_index(directory)
    return str(error.value).replace(str(directory), "DIR")


def write_index(directory: Path, weight_map: object) -> None:
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def test_offsets_address_the_very_bytes(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    from safetensors.numpy import save_file

    arrays = {"a": numpy.arange(6, dtype="float32").reshape(2, 3), "b": numpy.arange(4, dtype="float16") + 7}
    save_file(arrays, str(tmp_path / "model.safetensors"))
    index = read_index(tmp_path)
    assert index.directory == tmp_path and set(index.tensors) == {"a", "b"}
    for name, array in arrays.items():
        entry = index.tensors[name]
        assert (entry.shape, entry.dtype) == (array.shape, {"a": "F32", "b": "F16"}[name])
        assert entry.file.read_bytes()[entry.start : entry.end] == array.tobytes()


def test_shards(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "one.safetensors", {"a": [2, 3]})
    write_safetensors(tmp_path / "two.safetensors", {"b": [4], "unlisted": [1]})
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    index = read_index(tmp_path)
    assert {name: (entry.file.name, entry.shape) for name, entry in index.tensors.items()} == {
        "a": ("one.safetensors", (2, 3)),
        "b": ("two.safetensors", (4,)),
    }


def test_missing_shard(tmp_path: Path) -> None:
    write_index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors"})
    assert mistake(tmp_path) == "DIR/one.safetensors: missing; it holds a and 1 more; complete the download"


def test_shard_lacks_a_tensor_of_the_index(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "one.safetensors", {"a": [2]})
    write_index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors"})
    assert mistake(tmp_path) == (
        "DIR/one.safetensors: lacks b, which model.safetensors.index.json places in it; complete the download"
    )


def test_no_weights_and_bad_index(tmp_path: Path) -> None:
    assert mistake(tmp_path) == (
        "DIR: holds neither model.safetensors nor model.safetensors.index.json; save the model as safetensors"
    )
    write_index(tmp_path, ["a"])
    assert mistake(tmp_path) == (
        "DIR/model.safetensors.index.json: weight_map: must map tensor names to files; restore the file"
    )


def test_truncated_data(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write_safetensors(file, {"a": [2, 3], "b": [4]})
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-3])
    assert mistake(tmp_path) == (
        f"DIR/model.safetensors: b: ends at byte {size}, but the file has {size - 3}; complete the download"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes, too short for its header length; complete the download"),
        (b"\x05\0\0", "3 bytes, too short for its header length; complete the download"),
        (
            struct.pack("<Q", 100) + b"{}",
            "10 bytes, too short for a header of 100 bytes; complete the download",
        ),
        (struct.pack("<Q", 2) + b"{,", "its header is not JSON; download the file again"),
        (struct.pack("<Q", 2) + b"\xff\xfe", "its header is not JSON; download the file again"),
        (struct.pack("<Q", 2) + b"[]", "its header is not a JSON object; download the file again"),
        (struct.pack("<Q", 8) + b'{"a": 1}', "a: its header entry is not readable; download the file again"),
    ],
)
def test_corrupt_headers(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert mistake(tmp_path) == f"DIR/model.safetensors: {message}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data_offsets": [0, 20]},
            " = [0, 20]: offsets must span 24 bytes (F32 [2, 3]); download the file again",
        ),
        (
            {"data_offsets": [-24, 0]},
            " = [-24, 0]: offsets must span 24 bytes (F32 [2, 3]); download the file again",
        ),
        ({"data_offsets": ["x", "y"]}, ": its header entry is not readable; download the file again"),
        ({"dtype": "F12"}, ": its header entry is not readable; download the file again"),
    ],
)
def test_corrupt_entries(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"a": [2, 3]}, **changes)
    assert mistake(tmp_path) == f"DIR/model.safetensors: a{message}"


def test_expected_tensors(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"a": [2, 3], "extra": [1], "more": [1]})
    index = read_index(tmp_path)
    check_tensors(index, {"a": (2, 3)}, {"extra", "more"}.__contains__)
    with pytest.raises(UserError) as error:
        check_tensors(index, {"a": (2, 3)}, {"more"}.__contains__)
    assert str(error.value) == (
        f"{tmp_path}: holds extra, which the architecture of config.json does not have; make config.json and the "
        "weights belong together"
    )
    with pytest.raises(UserError) as error:
        check_tensors(index, {"a": (2, 3), "b": (1,), "c": (1,)}, {"more"}.__contains__)
    assert str(error.value) == f"{tmp_path}: lacks b and 1 more; use a complete checkpoint"
    with pytest.raises(UserError) as error:
        check_tensors(index, {"a": (3, 2)}, {"more"}.__contains__)
    assert str(error.value) == (
        f"{tmp_path}/model.safetensors: a = [2, 3]: must have shape [3, 2] by config.json; make "
        f"config.json and the "
        "weights belong together"
    )


def test_quantized_tensors_are_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"a": [4]}, dtype="I8", data_offsets=[0, 4])
    with pytest.raises(UserError) as error:
        check_tensors(read_index(tmp_path), {"a": (4,)}, lambda name: False)
    assert str(error.value) == (
        f'{tmp_path}/model.safetensors: a = "I8": must be BF16, F16, F32 or F64; use an unquantized '
        f"checkpoint"
    )


def test_metadata_is_no_tensor(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"a": [1]})
    assert list(read_header(tmp_path / "model.safetensors")) == ["a"]
