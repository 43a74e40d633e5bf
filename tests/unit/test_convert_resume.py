"""A conversion that is killed goes on where it was."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from sead_megatron.models.convert import Options, plan_conversion
from sead_megatron.models.partial_directory import PartialDirectory
from tests.conversions import (
    ROOT,
    SMALL,
    change_tensors,
    cut,
    mistake,
    run,
    same_bits,
    tensors,
)


def _killed(source: Path, target: Path, module: str, attribute: str, call: int) -> None:
    """A conversion that kills its process before the given call."""
    code = (
        "import os, sys; from pathlib import Path; "
        f"from sead_megatron.models import {module} as module; owner = module\n"
        f"*path, name = '{attribute}'.split('.')\n"
        "for part in path: owner = getattr(owner, part)\n"
        "real, calls = getattr(owner, name), []\n"
        "def counted(*a, **k):\n"
        "    calls.append(0)\n"
        f"    if len(calls) == {call}: os.kill(os.getpid(), 9)\n"
        "    return real(*a, **k)\n"
        "setattr(owner, name, counted)\n"
        "from sead_megatron.models.convert import *\n"
        f"options = Options(shard_bytes={SMALL.shard_bytes}, chunk_bytes={SMALL.chunk_bytes})\n"
        f"convert(plan_conversion(Path({str(source)!r}), Path({str(target)!r}), options), lambda size: None)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr


def _stats(directory: Path, names: Sequence[str]) -> dict[str, tuple[int, int]]:
    return {name: ((s := (directory / name).stat()).st_ino, s.st_mtime_ns) for name in names}


def test_a_killed_conversion_goes_on(families: dict[str, Path], tmp_path: Path) -> None:
    """Killed in a chunk of the fourth file and again before the index; the files that were whole are not touched."""
    out = tmp_path / "out"
    reference = tmp_path / "reference"
    steps = run(families["qwen3"], reference)
    _killed(families["qwen3"], out, "distributed_writer", "make_chunk", 60)
    partial = tmp_path / "out.partial"
    whole = [p.name for p in (partial / ".unfinished").iterdir() if p.name.endswith(".distcp")]
    begun = [p.name for p in partial.glob("*.distcp")]
    assert len(whole) >= 2 and len(begun) == len(whole) + 1 and not out.exists()
    before = _stats(partial, whole)
    _killed(families["qwen3"], out, "distributed_writer", "DistributedWriter.finish", 1)
    assert not out.exists() and _stats(partial, whole) == before
    names = [path.name for path in partial.glob("*.distcp")]
    before = _stats(partial, names)
    assert len(run(families["qwen3"], out)) < len(steps) / 2
    assert _stats(out, names) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "reference"]
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in reference.iterdir())
    for name in names:
        assert (out / name).read_bytes() == (reference / name).read_bytes()


def test_a_killed_export_goes_on(converted: Path, families: dict[str, Path], tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    _killed(converted, out, "convert", "write_safetensors", 4)
    names = [path.name for path in partial.glob("*.safetensors")]
    assert len(names) == 3
    before = _stats(partial, names)
    run(converted, out)
    assert _stats(out, names) == before and same_bits(tensors(out), tensors(families["llama"]))


def test_a_kill_before_the_end_leaves_no_marker(families: dict[str, Path], tmp_path: Path) -> None:
    """The marker is the last thing that is written; with it the directory is whole, and gets its name at once."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    _killed(families["llama"], out, "convert", "Marker", 1)
    assert (partial / ".metadata").exists() and not (partial / "conversion.json").exists()
    assert "so not whole" in mistake(partial, tmp_path / "back")
    _killed(families["llama"], out, "convert", "PartialDirectory.commit", 1)
    assert (partial / "conversion.json").exists() and not out.exists()
    run(families["llama"], out)


def test_a_whole_file_that_was_cut_is_written_again(families: dict[str, Path], tmp_path: Path) -> None:
    out, reference = tmp_path / "out", tmp_path / "reference"
    run(families["llama"], reference)
    _killed(families["llama"], out, "convert", "DistributedWriter.finish", 1)
    cut("__2_0.distcp", 1)(tmp_path / "out.partial")
    run(families["llama"], out)
    assert (out / "__2_0.distcp").read_bytes() == (reference / "__2_0.distcp").read_bytes()


def test_two_at_once(families: dict[str, Path], tmp_path: Path) -> None:
    plan = plan_conversion(families["llama"], tmp_path / "out", SMALL)
    first = PartialDirectory(tmp_path / "out")
    first.open(plan.identity())
    assert mistake(families["llama"], tmp_path / "out") == (
        "DIR/out.partial: is being written by another process; wait for it, or end it"
    )
    first.close()
    run(families["llama"], tmp_path / "out")


def test_what_another_conversion_left(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _killed(llama, out, "convert", "DistributedWriter.finish", 1)
    change_tensors(lambda t: t.update({"model.norm.weight": torch.zeros(64)}))(llama)
    assert mistake(llama, out) == (
        "DIR/out.partial: is left of another conversion (other source files); remove it, or give --overwrite to start "
        "over"
    )
    assert "(other source files, dtype)" in mistake(
        llama, out, Options(**(vars(SMALL) | {"dtype": torch.float16}))
    )
    run(llama, out, Options(**(vars(SMALL) | {"overwrite": True})))
    assert not (tmp_path / "out.partial").exists()
