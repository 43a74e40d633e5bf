"""Starts a program of this folder on fake GPUs, as torchrun does, and returns what it reports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from tests.fake_gpu.environment import ROOT, Environment

HERE = Path(__file__).parent
# Every process computes with the CPU's operators (`computing_site/`), Triton's kernels in its interpreter.
COMPUTING = {"FAKE_COMPUTE": "1", "TRITON_INTERPRET": "1"}
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sead_megatron_rehearsal"


def fake_environment(environment: Environment, settings: dict[str, str]) -> dict[str, str]:
    """Variables of a program in an environment; `settings` are added (FAKE_*, VLLM_*)."""
    programs = ROOT / "tests" / "distributed" / "programs"
    paths = (ROOT, ROOT / "tests", programs, HERE, HERE / "computing_site", environment.packages)
    return {
        name: value for name, value in os.environ.items() if not name.startswith(("LD_", "PYTEST", "FAKE_"))
    } | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "OMP_NUM_THREADS": "1",
        "FAKE_GPU": "1",
        # Compiled functions would be Triton kernels.
        "TORCHDYNAMO_DISABLE": "1",
        "SEAD_KERNELS_CACHE": str(CACHE / "sead_kernels"),
        "TRITON_CACHE_DIR": str(CACHE / "triton"),
        "VLLM_CACHE_ROOT": str(CACHE / "vllm"),
        "FLASHINFER_WORKSPACE_BASE": str(CACHE / "flashinfer"),
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_CUDART_SO_PATH": str(next((environment.cuda / "lib").glob("libcudart.so.*"))),
        **settings,
    }


def run_command(
    environment: Environment,
    arguments: list[str],
    settings: dict[str, str],
    timeout: int,
    *,
    on_gpu: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGUMENTS`, with the fake CUDA preloaded if `on_gpu`; everything it started is ended with it."""
    command = [str(environment.python), *arguments]
    if on_gpu:
        command = ["bash", "-c", 'source "$0/env.sh" && exec "$@"', str(environment.cuda), *command]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=fake_environment(environment, settings),
        cwd=ROOT,
        start_new_session=True,
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException:
            # torchrun ends its ranks, which are sessions of their own, when it is asked to end, not when it is killed.
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)
            raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def torchrun(program: str, ranks: int) -> list[str]:
    """Arguments of Python that start a program of this folder on so many ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*launcher, str(HERE / f"{program}.py")]


def run_program(
    environment: Environment,
    program: str,
    tmp_path: Path,
    *,
    ranks: int = 1,
    timeout: int = 420,
    settings: dict[str, str] | None = None,
    on_gpu: bool = True,
    **arguments: Any,
) -> Any:
    """`torchrun --nproc-per-node RANKS PROGRAM.py ARGUMENTS.json REPORT.json`; the report's content.

    The arguments hold `on_gpu`. A rank that fails fails the test with the end of what the ranks said.
    """
    given, report = tmp_path / "arguments.json", tmp_path / "report.json"
    given.write_text(json.dumps(arguments | {"on_gpu": on_gpu}))
    ended = run_command(
        environment,
        [*torchrun(program, ranks), str(given), str(report)],
        settings or {},
        timeout,
        on_gpu=on_gpu,
    )
    said = "\n".join(line for line in ended.stderr.splitlines() if line.startswith("[rank"))
    assert ended.returncode == 0, ended.stdout[-3000:] + (said or ended.stderr)[-9000:]
    return json.loads(report.read_text())
