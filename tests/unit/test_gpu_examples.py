"""The examples for GPUs: their configurations, launch scripts, dry runs on 32 ranks and the tables in their READMEs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sead_megatron.config import check_models, load_config
from sead_megatron.plan.devices import DEVICES
from sead_megatron.plan.memory import Run, plan_memory

ROOT = Path(__file__).parents[2]
PAIRS = {
    "nemotron_8b_49b": ("nemotron_nano_8b", "nemotron_super_49b"),
    "olmo3_7b_32b": ("olmo3_7b", "olmo3_32b"),
    "qwen3_1p7b_8b": ("qwen3_1p7b", "qwen3_8b"),
}


def models(example: str) -> list[str]:
    student, teacher = PAIRS[example]
    return [f"student.path=tests/hf_configs/{student}", f"teacher.path=tests/hf_configs/{teacher}"]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
        env=os.environ | {"PATH": path} | environment,
    )


@pytest.mark.parametrize("example", PAIRS)
def test_the_papers_settings(example: str) -> None:
    """Section 3.1 and Appendix B of arXiv 2606.28562, as `docs` and the schema read them."""
    config = load_config(ROOT / "examples" / example / "config.yaml", models(example))
    check_models(config, 32)
    rollout, objective = config.rollout, config.objective
    assert (config.data.prompts_per_step, rollout.samples_per_prompt, config.steps) == (96, 1, 181)
    assert (rollout.temperature, rollout.max_new_tokens) == (0.7, 16384)
    assert objective.name == "sead"
    assert (objective.zones.a, objective.zones.b, objective.zones.c) == (50, 40, 10)
    assert (objective.alpha_start, objective.alpha_end, objective.temperature) == (0.8, 0.0, 1.0)
    assert (config.curriculum.name, config.curriculum.sigma) == ("sorted_noise", 0.02)


@pytest.mark.parametrize("example", PAIRS)
def test_no_rank_is_above_76_gb(example: str) -> None:
    config = load_config(ROOT / "examples" / example / "config.yaml", models(example))
    checked = check_models(config, 32)
    memory = plan_memory(Run(config, checked.student, tuple(checked.teachers.values()), 32, DEVICES["h100"]))
    assert max(rank.peak for rank in memory) <= 76e9


@pytest.mark.parametrize("example", PAIRS)
def test_dry_run_on_32_ranks(example: str) -> None:
    """Full-size models on the meta device; every parameter is as large as the plan says."""
    ended = run(f"examples/{example}/launch.sh", "--dry-run", *models(example), WORLD_SIZE="32")
    assert ended.returncode == 0, ended.stderr[-3000:]
    rows = [line.split() for line in ended.stdout.splitlines() if re.match(r" *\d+ +\d+ +\d+ \d+ \d+", line)]
    assert [int(row[0]) for row in rows] == list(range(32))
    assert [int(row[1]) for row in rows] == [rank // 8 for rank in range(32)]
    assert "configuration, layouts and models fit each other" in ended.stdout


def test_dry_run_of_uneven_stages_and_a_broken_layout() -> None:
    """A heterogeneous teacher in four stages: one model a stage is built, and a layout that cannot be is refused."""
    command = ["examples/nemotron_8b_49b/launch.sh", "--dry-run", *models("nemotron_8b_49b")]
    stages = ["teacher.parallel.tensor=2", "teacher.parallel.pipeline=4", "student.parallel.pipeline=2"]
    ended = run(*command, *stages, WORLD_SIZE="32")
    assert ended.returncode == 0, ended.stderr[-3000:]
    built = re.findall(r"built on rank (\d+): student ([\d,]+), teacher ([\d,]+)", ended.stdout)
    assert len(built) == 4 and len({teacher for _, _, teacher in built}) > 1
    broken = run(*command, "teacher.parallel.tensor=3", WORLD_SIZE="32")
    assert broken.returncode == 2
    assert broken.stderr.startswith(
        "error: teacher.parallel.tensor = 3: must divide num_attention_heads (64)"
    )


@pytest.mark.parametrize("example", PAIRS)
def test_readme_has_the_plans_table(example: str) -> None:
    ended = run(
        f"examples/{example}/launch.sh", "--plan", *models(example), "--format", "markdown", WORLD_SIZE="32"
    )
    assert ended.returncode == 0, ended.stderr
    readme = (ROOT / "examples" / example / "README.md").read_text()
    assert ended.stdout.strip() in readme, "make the table again: launch.sh --plan --format markdown"


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*/*.s[hb]*")), ids=lambda path: path.name)
def test_scripts_parse(script: Path) -> None:
    assert run("bash", "-n", str(script)).returncode == 0
    assert os.access(script, os.X_OK) or script.suffix == ".sbatch"


@pytest.mark.parametrize("example", PAIRS)
def test_slurm_starts_launch_sh_on_every_node(example: str, tmp_path: Path) -> None:
    """With stand-ins for srun, scontrol and python: the command that node 2 would run."""
    for name, text in {
        "scontrol": "echo node0; echo node1",
        "srun": 'while [ "$1" != bash ]; do shift; done; SLURM_NODEID=2 exec "$@"',
        "python": 'printf "%s\\n" "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    script = ROOT / "examples" / example / "slurm.sbatch"
    environment = {
        "PATH": os.pathsep.join([str(tmp_path), os.environ["PATH"]]),
        **{"CONTAINER": "image", "MODELS": "m", "DATA": "d", "HOME": str(tmp_path)},
        **{"SLURM_JOB_NUM_NODES": "4", "SLURM_JOB_NODELIST": "node[0-3]", "SLURM_JOB_ID": "12"},
        "SLURM_GPUS_ON_NODE": "8",
    }
    ended = run("bash", str(script), "optimizer.lr=5e-7", **environment)
    assert ended.returncode == 0, ended.stderr
    expected = (
        f"-m sead_megatron train examples/{example}/config.yaml optimizer.lr=5e-7 --nproc-per-node 8 --nnodes 4 "
        "--node-rank 2 --master-addr node0 --master-port 20012"
    )
    assert shlex.join(ended.stdout.split()) == expected
    assert "#SBATCH --nodes=4" in script.read_text() and "#SBATCH --gpus-per-node=8" in script.read_text()
    del environment["CONTAINER"]
    assert "CONTAINER: the image" in run("bash", str(script), **environment).stderr
