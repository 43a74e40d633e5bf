"""The worker that grades: what no answer can do to it, and what it never does to a run."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import ModuleType

import pytest

from sead_megatron.evaluation.grader import Grader
from sead_megatron.evaluation.grading import grade

ROOT = Path(__file__).parents[2]
# Gold answers of the six benchmarks, one of a kind.
GOLDS = [
    *(
        "204",
        r"\boxed{540}",
        "-0.25",
        "1,234",
        r"\frac{14}{3}",
        r"\frac12",
        r"11\sqrt{2}",
        r"90^\circ",
        r"12.5\%",
    ),
    *(
        r"\left( 3, \frac{\pi}{2} \right)",
        r"\{1,2\}",
        "1,-2",
        r"\left[ 0, \frac{3 \pi}{4} \right)",
        r"x^3 + 3x - 6",
    ),
    *(
        r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}",
        r"\text{Friday}",
        r"\text{(C)}",
        r"15\mbox{ cm}^2",
        r"\$36",
    ),
    *(r"3 \sqrt{13}", r"2516_8", r"p - q", r"x \in [-2,7]", r"$(1,2,3),(3,2,1)$", r"$n=2^k$", "1.27e9"),
    *(
        r"E_{1},E_{2}",
        "-3./2",
        r"\frac{v_{0}}{r_{0}} \frac{1}{1+r / r_{0}}",
        r"m_{p} c^{2}",
        r"$\frac{n(n+1)}{2}$",
    ),
]


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(cpu_seconds=1.0, memory_mib=512) as started:
        yield started


@pytest.fixture(scope="module")
def rates() -> ModuleType:
    """benchmarks/grader_rates.py, which is no package; it imports its neighbour."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("grader_rates", ROOT / "benchmarks/grader_rates.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.pop(0)
    return module


def is_alive(process: int) -> bool:
    """Neither gone nor a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for_end(process: int) -> bool:
    deadline = time.monotonic() + 20
    while is_alive(process) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_alive(process)


def test_verdicts_are_those_of_grade(grader: Grader) -> None:
    pairs = [(f"\\boxed{{{other}}}", gold) for gold in ("204", r"\text{Friday}") for other in GOLDS]
    assert grader.grade_many(pairs) == [grade(*pair) for pair in pairs]
    assert grader.grade_many([]) == []
    assert grader.take_counts() == (0, 0)


def test_a_request_larger_than_a_pipe(grader: Grader) -> None:
    filler = "Let $x=3$, so we have 4 apples. \ud800 " * 30_000
    assert grader.grade_many([(filler + r"\boxed{7}", "7"), (filler, "7")]) == [True, False]


def test_gold_answers(grader: Grader, rates: ModuleType) -> None:
    row = rates.measure_golds(grader, [rates.unboxed(gold) for gold in GOLDS])
    assert row["gold"] == {"boxed": len(GOLDS), "plain": len(GOLDS)}
    assert row["accepted"] == []
    assert row["pairs"] >= len(GOLDS) - 1
    assert grader.take_counts() == (0, 0)


def test_same_value(rates: ModuleType) -> None:
    """The judge of the shuffled pairs; it must not call different answers equal."""
    for first, second in (
        ("0.5", r"\frac{1}{2}"),
        ("-3/4", "-.75"),
        ("$7$", "7."),
        (r"90^\circ", "90"),
        ("x=5", "5"),
    ):
        assert rates.same_value(first, second)
    for first, second in (
        ("1", "2"),
        (r"\frac{1}{2}", r"\frac{2}{1}"),
        ("(1,2)", "[1,2]"),
        ("x", "y"),
        ("12", "1 2 3"),
    ):
        assert not rates.same_value(first, second)


def test_hostile_strings(grader: Grader, rates: ModuleType) -> None:
    """Rounds of every light kind: each is graded, whatever happens to the worker, and hardly any of it is right."""
    row = rates.measure_hostile(grader, GOLDS, 40, seed=3)
    assert row["strings"] == 40
    assert row["accepted"] <= 4
    assert grader.grade_many([(r"\boxed{7}", "7")]) == [True]
    assert not (Path.cwd() / "INJECTED").exists()


def test_hostile_strings_depend_on_the_seed_only(rates: ModuleType) -> None:
    def first(seed: int) -> list[tuple[str, str]]:
        strings = rates.hostile_strings(seed, GOLDS)
        return [next(strings) for _ in range(40)]

    assert first(1) == first(1) != first(2)
    assert {kind for kind, _ in first(1)} == set(rates.LIGHT | rates.HEAVY)


def test_endless_work_is_stopped_counted_and_wrong() -> None:
    """A product in C, which no signal handler of Python interrupts, and an expansion without end in sympy."""
    with Grader(cpu_seconds=0.5) as grader:
        answers = ("7", "100000000!", "7", "(x+y+z+1)^{9999}", "7")
        graded = grader.grade_many([(f"\\boxed{{{answer}}}", "7") for answer in answers])
        assert graded == [True, False, True, False, True]
        assert grader.take_counts() == (2, 0)
        assert grader.take_counts() == (0, 0)


def test_a_stopped_worker_is_replaced() -> None:
    """What uses no processor time: only the clock of this process ends it."""
    with Grader(wall_seconds=1.0) as grader:
        grader.grade_many([("1", "1")])
        stopped = grader.worker_id
        assert stopped is not None
        os.kill(stopped, signal.SIGSTOP)
        assert grader.grade_many([("1" * 200_000, "1"), ("1", "1")]) == [False, True]
        assert grader.take_counts() == (1, 0)
        assert not is_alive(stopped)


def test_a_worker_that_dies_while_it_is_idle_is_nobodys_fault(grader: Grader) -> None:
    grader.grade_many([("1", "1")])
    assert grader.worker_id is not None
    os.kill(grader.worker_id, signal.SIGKILL)
    assert wait_for_end(grader.worker_id)
    assert grader.grade_many([("1", "1")]) == [True]
    assert grader.take_counts() == (0, 0)


def test_memory_is_limited(grader: Grader) -> None:
    """Of the worker; what cannot be allocated makes the answer wrong."""
    grader.grade_many([("1", "1")])
    limits = Path(f"/proc/{grader.worker_id}/limits").read_text().splitlines()
    soft = {line[:26].strip(): line[26:].split()[0] for line in limits}
    assert soft["Max address space"] == str(512 << 20)
    assert soft["Max file size"] == soft["Max core file size"] == "0"


def test_a_worker_that_has_grown_is_replaced() -> None:
    """With a limit that the imports alone fill by half, there is a new one after every answer."""
    with Grader(memory_mib=100) as grader:
        grader.grade_many([("1", "1")])
        first = grader.worker_id
        assert first is not None and wait_for_end(first)
        assert grader.grade_many([("1", "1")]) == [True]
        assert grader.worker_id != first
        assert grader.take_counts() == (0, 0)


def test_the_worker_knows_nothing_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("KEPT", "y")
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    with Grader() as grader:
        assert grader.grade_many([("1", "1")]) == [True]
        process = Path(f"/proc/{grader.worker_id}")
        names = {entry.partition("=")[0] for entry in (process / "environ").read_text().split("\0")}
        assert "KEPT" in names and not names & {"RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID"}
        maps = (process / "maps").read_text()
        assert "libtorch" not in maps and "libvllm" not in maps
        # Its two pipes, and /dev/null.
        targets = {os.readlink(entry) for entry in (process / "fd").iterdir()}
        assert os.readlink(f"/proc/self/fd/{write_end}") not in targets
        assert len(targets) == 3
        worker = grader.worker_id
    os.close(read_end)
    os.close(write_end)
    assert worker is not None and not is_alive(worker)


@pytest.mark.parametrize("busy", [False, True])
def test_the_worker_dies_with_its_parent(busy: bool) -> None:
    """kill -9, with the pipe held open by a child of the parent, as one that writes a checkpoint would be."""
    program = f"""
import os, sys, time
from sead_megatron.evaluation.grader import Grader
grader = Grader(cpu_seconds=1000.0).__enter__()
grader.grade_many([("1", "1")])
if os.fork() == 0:
    time.sleep(60)
    os._exit(0)
print(grader.worker_id, flush=True)
if {busy}:
    grader.grade_many([(r"\\\\boxed{{100000000!!}}", "1")])
time.sleep(60)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", program.replace("\\\\\\\\", "\\\\")],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        time.sleep(1.0 if busy else 0.0)
        assert is_alive(worker)
        parent.kill()
        assert wait_for_end(worker)
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()


def test_a_worker_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Grader() as grader, pytest.raises(RuntimeError, match=r"did not start \(exit code 1\)"):
        grader.grade_many([("1", "1")])


def test_random_bytes(grader: Grader) -> None:
    """No exception of the library reaches the caller, and none of it is the answer."""
    rng = Random(11)
    texts = ["".join(chr(rng.randrange(1, 0xFFFF)) for _ in range(rng.randint(1, 30))) for _ in range(20)]
    assert not any(grader.grade_many([(f"\\boxed{{{text}}}", "204") for text in texts]))
