"""The CUDA tile kernels, once as they are and once under each tool of compute-sanitizer.

Sanitizer runs launch nothing but our kernels and copies, so that whatever is reported is ours.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from gpu_checks import device_tiles
from gpu_checks.report import Context, SkippedError

TOOLS = ("memcheck", "racecheck", "synccheck")
# Of the sanitizer's own making: the program's exit codes are 0 and 1.
FOUND = 86
_SUMMARY = re.compile(r"={9} ((?:ERROR|RACECHECK) SUMMARY: .*)")


def run(context: Context) -> None:
    """Agreement with the oracle first, then the tools."""
    report = context.report
    reason = device_tiles.DeviceTiles(context.device).unavailable()
    if reason is not None:
        raise SkippedError(reason)
    problems = device_tiles.check(context.device)
    report.number("tiles that disagree", problems)
    if problems:
        report.fail(f"tiles disagree with the oracle: {', '.join(problems)[:400]}")
    program = find_sanitizer()
    if program is None:
        report.number("compute-sanitizer", "not found on PATH or in /usr/local/cuda/bin")
        return
    if context.device.type == "cpu" or context.tiny:
        report.number("compute-sanitizer", "not run: there is no device for it to watch")
        return
    for tool in TOOLS:
        with report.part(tool):
            _watch(context, program, tool)


def find_sanitizer() -> str | None:
    """compute-sanitizer, on PATH or beside nvcc."""
    return shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


def _watch(context: Context, program: str, tool: str) -> None:
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20"]
    command += [sys.executable, "-m", "gpu_checks.device_tiles", context.device.type]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    summary = summary_of(output)
    context.report.number(tool, summary or "no summary")
    log = Path(context.directory) / f"{tool}.log"
    log.write_text(output)
    # 1: the kernels disagree with the oracle, which has been said once already.
    if done.returncode not in (0, 1) or summary is None or not is_clean(summary):
        first = [line for line in output.splitlines() if line.startswith("=========")][:12]
        context.report.fail(f"{tool}: exit code {done.returncode}: {' | '.join(first)[:600]}")


def summary_of(output: str) -> str | None:
    """The sanitizer's last word."""
    found = _SUMMARY.findall(output)
    return found[-1].strip() if found else None


def is_clean(summary: str) -> bool:
    """Whether it counts no error and no hazard."""
    return re.match(r"\w+ SUMMARY: 0 (errors|hazards)", summary) is not None
