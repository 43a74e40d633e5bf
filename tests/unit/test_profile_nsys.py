"""tools/profile_nsys.sh with an nsys and an interpreter that only write down how they were called."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools/profile_nsys.sh"
LAUNCH = [
    "--steps",
    "10:12",
    "--output",
    "OUT",
    "--",
    "--nnodes=2",
    "--node-rank=1",
    "--",
    "c.yaml",
    "seed=3",
]
DEFAULTS = ["--trace=cuda,nvtx,osrt,cublas,cudnn", "--sample=none", "--cpuctxsw=none"]
CAPTURE = ["--capture-range=cudaProfilerApi", "--capture-range-end=stop"]


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A PATH with the two, and what the script itself needs."""
    path = tmp_path / "bin"
    path.mkdir()
    for name in ("nsys", "python"):
        program = path / name
        program.write_text(f'#!/bin/bash\nprintf "%s\\n" {name} "$@"\n')
        program.chmod(0o755)
    for name in ("bash", "env", "mkdir", "dirname", "basename", "cat"):
        real = next(Path(folder) / name for folder in os.get_exec_path() if (Path(folder) / name).exists())
        (path / name).symlink_to(real)
    return path


def call(programs: Path, *arguments: str, rank: int | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(programs)} | ({} if rank is None else {"RANK": str(rank)})
    return subprocess.run(
        [SCRIPT, *arguments],
        cwd=programs.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def launched(programs: Path, *arguments: str) -> list[str]:
    ended = call(programs, *arguments)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


def test_every_rank_is_started_through_the_script(programs: Path) -> None:
    """torchrun gets its options, and the run the steps and ranks that nsys is told."""
    command = launched(programs, "--ranks", "0,8", *LAUNCH)
    split = command.index("--as-rank")
    assert command[:split] == [
        *("python", "-m", "torch.distributed.run", "--nnodes=2", "--node-rank=1", "--no-python", str(SCRIPT)),
    ]
    assert command[-9:] == [
        *("python", "-m", "sead_megatron", "train", "c.yaml", "seed=3"),
        *("profile.start_step=10", "profile.stop_step=12", "profile.ranks=[0,8]"),
    ]
    assert (programs.parent / "OUT").is_dir()


def test_asked_ranks_run_under_nsys_and_the_others_do_not(programs: Path) -> None:
    """What torchrun would start on three ranks of the world; two of them have a report."""
    command = launched(
        programs, "--ranks", "0,18", "--nsys", "--cuda-graph-trace=node", "--nsys", "--stats=true", *LAUNCH
    )
    inner = command[command.index("--as-rank") :]
    run = inner[inner.index("python") :]
    for rank in (0, 18):
        assert call(programs, *inner, rank=rank).stdout.splitlines() == [
            *("nsys", "profile", *DEFAULTS, *CAPTURE),
            *(f"--output=OUT/rank_{rank}_steps_10_12", "--force-overwrite=true"),
            *("--cuda-graph-trace=node", "--stats=true", *run),
        ]
    for rank in (1, 8, 180):
        assert call(programs, *inner, rank=rank).stdout.splitlines() == run


def test_options(programs: Path) -> None:
    """Rank 0 and the interpreter on PATH are the defaults."""
    inner = launched(programs, "--trace", "cuda,nvtx", *LAUNCH)
    command = call(programs, *inner[inner.index("--as-rank") :], rank=0).stdout.splitlines()
    assert "--trace=cuda,nvtx" in command
    assert inner[-1] == "profile.ranks=[0]"
    (programs / "other").symlink_to(programs / "python")
    assert launched(programs, "--python", "other", *LAUNCH)[-9:-6] == ["other", "-m", "sead_megatron"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], '--steps = "": must be A:B; use for example 10:12'),
        (["--steps"], "--steps: needs a value; see --help"),
        (["--steps", "--", "c.yaml"], "--steps: needs a value; see --help"),
        (["--steps", "0:2"], '--steps = "0:2": must be A:B; use for example 10:12'),
        (["--steps", "9:9"], '--steps = "9:9": must end after it begins; use 9:10 for one step'),
        (["--steps", "1:2", "--ranks", "0 1"], '--ranks = "0 1": must be numbers and commas; use for example 0,8'),
        (["--steps", "1:2"], "--output: missing; give the directory of the reports"),
        (["--step", "1:2"], "--step: unknown option; see --help"),
        (["--steps", "1:2", "--output", "o"],
         "torchrun's options: missing; add them, and the configuration, each after --"),
        (["--steps", "1:2", "--output", "o", "--", "--standalone", "--"],
         "configuration: missing; add -- CONFIG [key=value ...] after torchrun's options"),
        (["--steps", "1:2", "--output", "bin/nsys/o", "--", "--", "c.yaml"],
         '--output = "bin/nsys/o": cannot be made; choose another directory'),
    ],
)  # fmt: skip
def test_each_mistake_is_said(programs: Path, arguments: list[str], message: str) -> None:
    ended = call(programs, *arguments)
    assert (ended.returncode, ended.stderr.splitlines()[-1], ended.stdout) == (2, f"error: {message}", "")


def test_nsys_is_missing(programs: Path) -> None:
    """Said by the launcher, and by a rank whose node has another PATH; a rank that is not asked for needs none."""
    inner = launched(programs, *LAUNCH)
    inner = inner[inner.index("--as-rank") :]
    (programs / "nsys").unlink()
    for ended in (call(programs, *LAUNCH), call(programs, *inner, rank=0)):
        assert (ended.returncode, ended.stdout) == (2, "")
        assert ended.stderr.startswith("error: nsys: not found in PATH; install NVIDIA Nsight Systems")
    assert call(programs, *inner, rank=1).stdout.splitlines()[:2] == ["python", "-m"]


def test_help(programs: Path) -> None:
    ended = call(programs, "--help")
    assert ended.returncode == 0
    assert ended.stdout.startswith("Profile steps of a run with NVIDIA Nsight Systems.")
