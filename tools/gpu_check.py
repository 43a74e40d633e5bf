"""Everything that only a GPU can tell, in less than nine minutes on one H100, as one JSON file.

    python tools/gpu_check.py --output results.json        # about eight minutes; 0: every section passed
    python tools/gpu_check.py --device cpu                 # the same code at tiny sizes, without a GPU
    python tools/gpu_check.py --sections kernels speed     # some of it

HAS NOT RUN ON A GPU YET. Needs no network and no installation: the repository is found by this file's own path. Python
3.11 or 3.12, torch 2.11 or newer, numpy, safetensors and rich; the loss kernels want nvcc or Triton; the sections of
models want megatron-core, pydantic and PyYAML (unpacked wheels on PYTHONPATH are enough), and no Transformer Engine,
apex or vLLM: without Transformer Engine models are built of local layers.

Sections, most valuable first: `kernels` (every backend against the float64 oracle, float32 and bfloat16), `step` (one
training step with NCCL on one rank, number for number as on the CPU), `model` (a 1B pair: seconds by phase, launches,
synchronisations, memory against the plan), `speed` (`bench_gpu.py` in short, memory against naive, Liger and TRL),
`checkpoint` (saved and restored bit for bit), `sanitizer` (CUDA tiles under compute-sanitizer). Each runs in a process
of its own with its share of the time that is left: one that fails or hangs costs the others nothing, and one that is
killed keeps the numbers it had.

`--tiny` takes the sizes of `--device cpu` on a GPU too: for a CUDA that computes on the CPU (tests/fake_gpu), or to see
within a minute whether everything is there.

The result: `{date, commit, machine, versions, device, tiny, minutes, sections: {name: {status, seconds, limit,
numbers, failures}}}`; `status` is passed, failed, skipped or timed out. Exit code 1: a section failed or timed out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from gpu_checks.sections import NAMES, SECTIONS, Section, seconds_for
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
# Beyond the last section: the machine's description, and the end of processes.
RESERVE = 10.0
PACKAGES = (
    "torch",
    "triton",
    "megatron-core",
    "transformer-engine",
    "apex",
    "vllm",
    "liger-kernel",
    "trl",
    "numpy",
)
_SKIPPED = 3
_COLOURS = {"passed": "green", "failed": "red", "timed out": "red", "skipped": "yellow"}


def environment_of(directory: Path, given: Mapping[str, str]) -> dict[str, str]:
    """The environment of a section: this repository comes first on its path, whatever is installed.

    `kernels/` has no `__init__.py` and is a package only by pyproject.toml's `package-dir`: a link of that name, in
    `directory`, does for a process what an installation does.
    """
    link = directory / "packages" / "sead_kernels" / "split_kl"
    if not link.is_symlink():
        link.parent.mkdir(parents=True)
        link.symlink_to(ROOT / "kernels" / "split_kl")
    paths = [str(ROOT), str(ROOT / "tools"), str(directory / "packages"), given.get("PYTHONPATH", "")]
    return dict(given) | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
    }


def run_section(
    section: Section, limit: float, directory: Path, device: str, tiny: bool, environment: dict[str, str]
) -> dict[str, Any]:
    """The section's entry in the result. Its process and all that it started are killed after `limit` seconds."""
    command = [sys.executable, "-m", "gpu_checks.worker", section.name, str(directory), device]
    command += [str(int(tiny)), f"{limit:.1f}"]
    started = time.monotonic()
    log = directory / f"{section.name}.log"
    with (
        log.open("w") as output,
        subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True
        ) as process,
    ):
        try:
            code = process.wait(limit)
            status = {0: "passed", _SKIPPED: "skipped"}.get(code, "failed")
        except subprocess.TimeoutExpired:
            status = "timed out"
        finally:
            # What it started is of its session, and may outlive it.
            _kill(process)
    entry: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - started, 1)}
    entry |= {"limit": round(limit, 1), "numbers": {}, "failures": []}
    found = directory / f"{section.name}.json"
    if found.is_file():
        entry |= json.loads(found.read_text())
    if status == "failed" and not entry["failures"]:
        entry["failures"] = [f"exit code {process.returncode}: {last_words(log)}"]
    elif status == "timed out":
        entry["failures"].append(f"after {limit:.0f} s: {last_words(log)}")
    return entry


def _kill(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def last_words(log: Path) -> str:
    """The innermost lines of Python's own traceback of a process that crashed or hangs, or the last lines it wrote."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    innermost = [i for i, line in enumerate(lines) if line.endswith("(most recent call first):")]
    shown = lines[innermost[-1] :][1:5] if innermost else lines[-3:]
    return " | ".join(shown)[:1000]


def run_all(
    sections: Sequence[Section], device: str, tiny: bool, minutes: float, console: Console
) -> dict[str, dict[str, Any]]:
    """All sections in order, within `minutes`; one line each."""
    deadline = time.monotonic() + 60 * minutes - RESERVE
    results = {}
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as name:
        directory = Path(name)
        environment = environment_of(directory, os.environ)
        for number, section in enumerate(sections):
            limit = seconds_for(section, sections[number + 1 :], deadline - time.monotonic())
            entry = run_section(section, limit, directory, device, tiny, environment)
            results[section.name] = entry
            console.print(line_of(section, entry), highlight=False, soft_wrap=True)
    return results


def line_of(section: Section, entry: dict[str, Any]) -> str:
    """The console's line of a section."""
    status = entry["status"]
    why = entry["numbers"].get("skipped") or "; ".join(entry["failures"][:2])
    missing = [key for key in entry["numbers"] if key.endswith(" unavailable")]
    tail = (f": {why}" if why else "") + (f" ({', '.join(missing)})" if missing else "")
    # Brackets of an error message are no markup.
    tail = tail.replace("[", r"\[")
    return f"[{_COLOURS[status]}]{status:<9}[/] {section.name:<10} {entry['seconds']:6.1f} s  {section.answers}{tail}"


def describe(device: str) -> dict[str, Any]:
    """Date, commit, machine and versions; the GPU as nvidia-smi names it."""
    versions = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    git = _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git,
        "machine": {"device": device, "gpu": _gpu() if device == "cuda" else None, "cpus": os.cpu_count()},
        "versions": versions,
    }


def _gpu() -> str | None:
    return _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 60 * value > RESERVE:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above {RESERVE / 60:.2f}")
    return value


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options.add_argument("--minutes", type=_minutes, default=9.0, help="for everything; default: %(default)g")
    options.add_argument("--output", type=Path, default=Path("gpu_check.json"), help="default: %(default)s")
    options.add_argument("--sections", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    options.add_argument("--tiny", action="store_true", help="on a GPU, the sizes of --device cpu")
    return options


def main(arguments: Sequence[str]) -> int:
    """The exit code: 1 if a section failed or timed out."""
    options = parser().parse_args(arguments)
    sections = [section for section in SECTIONS if section.name in options.sections]
    result = describe(options.device)
    result |= {"device": options.device, "tiny": options.tiny, "minutes": options.minutes}
    result["sections"] = run_all(sections, options.device, options.tiny, options.minutes, Console())
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    statuses = {entry["status"] for entry in result["sections"].values()}
    return int(bool(statuses & {"failed", "timed out"}))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
