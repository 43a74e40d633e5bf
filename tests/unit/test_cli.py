"""The command line as a user meets it: exit codes, one line on stderr, and what a dying rank does."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import sead_megatron
from sead_megatron import __main__ as cli
from sead_megatron.config import load_config
from sead_megatron.training.checkpoint_files import checkpoint_path
from tests.tiny_inputs import llama_shapes, write_inputs, write_jsonl, write_safetensors
from tests.tiny_run import write_run

ROOT = Path(sead_megatron.__file__).parents[1]
ON_CPU = ["device=cpu", "rollout.kv_cache_gib=0.1"]


@pytest.fixture(scope="module")
def config_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("cli"))


def run(
    arguments: Sequence[str | Path], rank: int | None = None, local_rank: int = 0, timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTHONUNBUFFERED")
    environment = {key: value for key, value in os.environ.items() if key not in dropped}
    environment["PYTHONPATH"] = str(ROOT)
    if rank is not None:
        environment |= {"RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_RANK": str(local_rank)}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def in_rank(body: str, config: Path, rank: int = 0, *overrides: str) -> subprocess.CompletedProcess[str]:
    """`train` as one rank of a torchrun world whose trainer is `body`, with the process's own exit."""
    script = f"""
import sys, threading, time, types
from sead_megatron.errors import UserError
def main(config):
{body}
train = types.ModuleType("sead_megatron.train"); train.main = main
sys.modules["sead_megatron.train"] = train
from sead_megatron import __main__ as cli
sys.exit(cli.main(["train", *sys.argv[1:]]))
"""
    return run(["-c", script, config, *overrides], rank=rank, local_rank=rank)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "CONFIG", "--world-size", "4", "student.parallel.tensor=3"],
         "error: student.parallel.tensor = 3: must divide num_attention_heads (8); use 1, 2 or 4"),
        (["check", "CONFIG", "steps=1.5", "--world-size", "4"],
         "error: steps = 1.5: must be an integer; use for example 181"),
        (["check", "none.yaml", "--world-size", "4"],
         "error: none.yaml: no such file; give the path of a YAML configuration"),
        (["train", "CONFIG", "--nproc-per-node", "8", "data.prompts_per_step=7"],
         "error: data.prompts_per_step = 7: times rollout.samples_per_prompt (1) must be at least the "
         "student's "
         "data-parallel size (8), or replicas have no sequence; use at least 8"),
        (["check", "CONFIG"],
         "error: command line: the following arguments are required: --world-size; "
         "run `python -m sead_megatron check --help`"),
        (["train", "CONFIG", "--nproc-per-node", "two"],
         "error: command line: argument --nproc-per-node: 'two' is not a positive integer; "
         "run `python -m sead_megatron train --help`"),
        (["tain"],
         'error: command = "tain": must be train, check, dry-run, cache, report or evaluate; '
         "run `python -m sead_megatron --help`"),
    ],
)  # fmt: skip
def test_user_errors_are_one_line_and_exit_code_2(
    config_yaml: Path, arguments: list[str], message: str
) -> None:
    done = run(
        ["-m", "sead_megatron", *[str(config_yaml) if word == "CONFIG" else word for word in arguments]]
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == message + "\n"
    assert "Traceback" not in done.stderr


def test_check_passes_and_says_so(config_yaml: Path) -> None:
    done = run(
        [
            "-m",
            "sead_megatron",
            "check",
            config_yaml,
            "student.parallel.tensor=2",
            "--world-size",
            "4",
            "steps=2",
            *ON_CPU,
        ]
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "world size 4: student TP2 PP1 DP2, teacher TP1 PP1 DP4, 4 engines of TP1\n"
        "8 prompts, 1.00 epochs, curriculum sorted_noise\n"
    )


def lacks_a_tensor(inputs: Path) -> str:
    shapes = llama_shapes()
    del shapes["model.layers.1.mlp.gate_proj.weight"]
    write_safetensors(inputs / "teacher" / "model.safetensors", shapes)
    return "DIR/teacher: lacks model.layers.1.mlp.gate_proj.weight; use a complete checkpoint"


def is_cut_off(inputs: Path) -> str:
    file = inputs / "student" / "model.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-10])
    return (
        f"DIR/student/model.safetensors: model.layers.3.mlp.down_proj.weight: ends at byte {size}, but the file "
        f"has {size - 10}; complete the download"
    )


def has_a_long_prompt(inputs: Path) -> str:
    """Longer than the tokenizer's own limit too, of which transformers would warn on stderr."""
    settings = inputs / "student" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": 16}))
    entries = [{"id": f"p{number}", "prompt": "one " * (46 + number)} for number in range(8)]
    write_jsonl(inputs / "prompts.jsonl", entries)
    return (
        "rollout.max_model_len = 64: leaves 48 tokens for a prompt beside max_new_tokens (16), but 7 of 8 prompts "
        "are longer, the longest 'p7' with 55; use at least 71, or shorten or remove these prompts"
    )


def holds_another_run(inputs: Path) -> str:
    write_run(load_config(inputs / "config.yaml", [*ON_CPU, "seed=7"]))
    return (
        'run_dir = "DIR/run": holds a run with another configuration: seed 7 -> 1234; choose another run_dir, or '
        "restore these fields"
    )


def has_a_damaged_checkpoint(inputs: Path) -> str:
    run = write_run(load_config(inputs / "config.yaml", ON_CPU), 1, 2)
    shard = checkpoint_path(run.checkpoints_path, 2) / "__0_0.distcp"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[: size // 2])
    return (
        f"DIR/run/checkpoints/step_00000002/__0_0.distcp: {size // 2} bytes, must have {size} by .metadata; "
        "remove this checkpoint directory to continue from the previous one"
    )


@pytest.mark.parametrize(
    "damage", [lacks_a_tensor, is_cut_off, has_a_long_prompt, holds_another_run, has_a_damaged_checkpoint]
)
def test_train_refuses_before_torchrun(tmp_path: Path, damage: Callable[[Path], str]) -> None:
    config = write_inputs(tmp_path)
    message = damage(tmp_path).replace("DIR", str(tmp_path))
    done = run(["-m", "sead_megatron", "train", config, *ON_CPU])
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {message}\n")


def test_check_refuses_what_train_would(tmp_path: Path) -> None:
    config = write_inputs(tmp_path)
    message = lacks_a_tensor(tmp_path).replace("DIR", str(tmp_path))
    done = run(["-m", "sead_megatron", "check", config, "--world-size", "1", *ON_CPU])
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {message}\n")


def test_the_first_stage_imports_nothing_heavy(config_yaml: Path) -> None:
    script = (
        "import sys; from sead_megatron import __main__; "
        "from sead_megatron.config import check_config, load_config; "
        f"check_config(load_config({str(config_yaml)!r}), 4); "
        "heavy = {'torch', 'transformers', 'megatron', 'vllm', 'safetensors', 'numpy'} & set(sys.modules); "
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = run(["-c", script])
    assert (done.returncode, done.stderr) == (0, "")


def test_the_second_stage_imports_neither_megatron_nor_vllm(config_yaml: Path) -> None:
    script = (
        "import sys; from sead_megatron import __main__ as cli; "
        f"code = cli.main(['check', {str(config_yaml)!r}, '--world-size', '4', *{ON_CPU!r}]); "
        "heavy = {'megatron', 'vllm'} & set(sys.modules); "
        "sys.exit(f'imported: {heavy}' if heavy else code)"
    )
    done = run(["-c", script])
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ["--standalone", "--nproc-per-node=1"]),
        (["--nproc-per-node", "4"], ["--standalone", "--nproc-per-node=4"]),
        (["--nproc-per-node=2", "--nnodes", "2", "--node-rank=1", "--master-addr=h0",
          "--master-port=29500"],
         ["--nnodes=2", "--node-rank=1", "--master-addr=h0", "--master-port=29500", "--nproc-per-node=2"]),
    ],
)  # fmt: skip
def test_train_becomes_torchrun(
    config_yaml: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], expected: list[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    called: list[list[str]] = []

    def execv(program: str, command: list[str]) -> None:
        called.append([program, *command])
        raise SystemExit(0)  # the real one does not return

    monkeypatch.setattr(os, "execv", execv)
    with pytest.raises(SystemExit):
        cli.main(["train", str(config_yaml), "steps=2", *options, "seed=5", *ON_CPU])
    assert called == [
        [
            *(sys.executable, sys.executable, "-m", "torch.distributed.run", *expected),
            *("-m", "sead_megatron", "train", str(config_yaml), "steps=2", "seed=5", *ON_CPU),
        ]
    ]


def test_rank_gets_the_config_and_exits_0(config_yaml: Path) -> None:
    done = in_rank("    print('steps', config.steps)", config_yaml, 0, "steps=3")
    assert (done.returncode, done.stdout, done.stderr) == (0, "steps 3\n", "")


@pytest.mark.parametrize(
    ("rank", "stderr"), [(0, "error: steps = 0: must be greater than 0; use for example 181\n"), (1, "")]
)
def test_only_local_rank_0_reports_a_failed_check(config_yaml: Path, rank: int, stderr: str) -> None:
    done = in_rank("    pass", config_yaml, rank, "steps=0")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", stderr)


@pytest.mark.parametrize(("rank", "prefix"), [(0, "error: "), (3, "error: rank 3: ")])
def test_every_rank_reports_its_own_user_error(config_yaml: Path, rank: int, prefix: str) -> None:
    done = in_rank("    raise UserError('a', 1, 'b', 'c')", config_yaml, rank)
    assert (done.returncode, done.stderr) == (2, f"{prefix}a = 1: b; c\n")


def test_dying_rank_leaves_at_once_with_its_traceback(config_yaml: Path) -> None:
    """A thread that never ends stands for a process group whose destructor waits for its peers."""
    body = """
    print("before", flush=False)
    threading.Thread(target=time.sleep, args=(600,)).start()
    raise ValueError("the loss exploded")
"""
    done = in_rank(body, config_yaml, rank=2)  # 60 s at most
    assert (done.returncode, done.stdout) == (1, "before\n")
    assert "Traceback" in done.stderr and done.stderr.endswith("ValueError: the loss exploded\n")


def test_spawned_processes_do_not_train_again(config_yaml: Path) -> None:
    """Megatron's checkpoint writer starts processes by spawn, which run the main file once more."""
    body = """
    import multiprocessing
    sys.modules["__main__"].__file__ = cli.__file__  # as when the file itself was started
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print("child", pool.apply(len, ("abc",)))
"""
    done = in_rank(body, config_yaml)
    assert (done.returncode, done.stdout, done.stderr) == (0, "child 3\n", "")
