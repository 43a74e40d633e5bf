"""Libraries are built once, whoever asks; without a compiler the package works, and says what is missing."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sead_kernels.split_kl.native_build import BuildError, build_library, find_program

COMPILER = find_program("CXX", "g++", "c++")
FLAGS = ("-shared", "-fPIC")
MISSING = "there is no compiler"
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler; install g++")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEAD_KERNELS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "answer.cpp"
    path.write_text('extern "C" int answer() { return 42; }\n')
    return path


def counting_compiler(tmp_path: Path) -> Path:
    """The compiler, leaving a line in ``calls`` every time it compiles."""
    script = tmp_path / "compiler"
    script.write_text(
        f'#!/bin/sh\ncase "$1" in --version) ;; *) echo >> {tmp_path}/calls; sleep 0.3;; esac\n'
    )
    script.write_text(script.read_text() + f'exec {shlex.join(COMPILER or [])} "$@"\n')
    script.chmod(0o755)
    return script


@needs_compiler
def test_one_build_for_all_who_ask_and_another_for_another_source(source: Path, tmp_path: Path) -> None:
    compiler = [str(counting_compiler(tmp_path))]
    with ThreadPoolExecutor(4) as pool:
        libraries = set(
            pool.map(lambda _: build_library(compiler, FLAGS, [source], missing=MISSING), range(4))
        )
    assert len(libraries) == 1
    assert ctypes.CDLL(str(libraries.pop())).answer() == 42
    assert len((tmp_path / "calls").read_text().splitlines()) == 1
    first = build_library(compiler, FLAGS, [source], missing=MISSING)
    assert build_library(compiler, FLAGS, [source], missing=MISSING, key="another processor") != first
    source.write_text('extern "C" int answer() { return 43; }\n')
    assert ctypes.CDLL(str(build_library(compiler, FLAGS, [source], missing=MISSING))).answer() == 43
    assert not list((tmp_path / "cache").glob("*.partial"))


@needs_compiler
def test_a_failed_build_says_the_first_error_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    source.write_text("int f() { return undeclared; }\n")
    with pytest.raises(BuildError, match=r"failed: .*error: .*undeclared"):
        build_library(COMPILER, FLAGS, [source], missing=MISSING)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


@needs_compiler
def test_a_cache_that_cannot_be_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SEAD_KERNELS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(BuildError, match="set SEAD_KERNELS_CACHE to a writable directory"):
        build_library(COMPILER, FLAGS, [source], missing=MISSING)


@needs_compiler
def test_a_library_that_is_there_needs_no_compiler(source: Path) -> None:
    with pytest.raises(BuildError, match=MISSING):
        build_library(None, FLAGS, [source], missing=MISSING)
    built = build_library(COMPILER, FLAGS, [source], missing=MISSING)
    assert build_library(None, FLAGS, [source], missing=MISSING) == built


def test_a_compiler_is_named_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_COMPILER", "sh -e")
    assert find_program("SOME_COMPILER", "no-such-program") == [shutil.which("sh"), "-e"]
    monkeypatch.setenv("SOME_COMPILER", "no-such-program")
    assert find_program("SOME_COMPILER", "sh") is None


@pytest.mark.parametrize(
    "compiler, reason",
    [
        ("no-such-compiler", "no C++ compiler found; install g++ or clang++, or let CXX name one"),
        ("false", "the C++ tile kernels could not be built: "),
    ],
)
def test_without_a_compiler_auto_is_torch(compiler: str, reason: str, tmp_path: Path) -> None:
    program = (
        "import torch\n"
        "from sead_kernels.split_kl import backend_name, describe_backend\n"
        "print(backend_name('auto', torch.device('cpu')))\n"
        "print(describe_backend('auto', torch.device('cpu')))\n"
        "backend_name('cpu', torch.device('cpu'))\n"
    )
    environment = os.environ | {"CXX": compiler, "SEAD_KERNELS_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment
    )
    chosen, described = done.stdout.splitlines()
    assert chosen == "torch"
    assert described.startswith("torch (cpu is unavailable: ") and reason in described
    message = done.stderr.splitlines()[-1]
    assert message.startswith("ValueError: options.backend 'cpu' is unavailable for torch.float32 on cpu: ")
    assert reason in message and message.endswith("usable here: ['torch']")
