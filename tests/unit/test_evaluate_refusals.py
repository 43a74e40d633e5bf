"""`evaluate` with bad input: exit code 2 and one line, before processes start."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sead_megatron import __main__ as cli
from sead_megatron.evaluation.checks import check
from sead_megatron.evaluation.settings import add_arguments, settings_of
from tests.tiny_inputs import llama_shapes, write_jsonl, write_model, write_safetensors


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A model and a benchmark of two problems, with 7 and 8 tokens as prompts."""
    write_model(tmp_path / "model")
    entries = [
        {"id": f"p{i}", "prompt": "one plus two plus one" + " one" * i, "answer": "3"} for i in range(2)
    ]
    write_jsonl(tmp_path / "b.jsonl", entries)
    return tmp_path


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake that is not found would turn this very process into torchrun."""

    def started(path: str, words: list[str]) -> None:
        raise AssertionError(f"not refused: {words}")

    monkeypatch.setattr(cli.os, "execv", started)


def command(inputs: Path, *more: str) -> list[str]:
    """An evaluation that would start, with further options."""
    given = ["evaluate", "DIR/model", "--benchmarks", "DIR/b.jsonl", "--output", "DIR/out", "--device", "cpu"]
    options = [*given, "--max-new-tokens", "16", *more]
    return [word.replace("DIR", str(inputs)) for word in options]


def refused(inputs: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    return printed.err.strip().removeprefix("error: ").replace(str(inputs), "DIR")


HELP = "run `python -m sead_megatron evaluate --help`"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--samples", "8"],
         "--samples = 8: needs --temperature above 0: greedy responses to a problem are all the same; add for "
         "example --temperature 0.6, or leave --samples out"),
        (["--samples", "0"], "--samples = 0: must be at least 1; use 1 or more"),
        (["--limit", "0"], "--limit = 0: must be at least 1; use 1 or more"),
        (["--seed", "-1"], "--seed = -1: must be at least 0; use 0 or more"),
        (["--temperature", "-1"], "--temperature = -1.0: must be 0 (greedy) or positive; use for example 0.6"),
        (["--temperature", "nan"],
         "--temperature = NaN: must be 0 (greedy) or positive; use for example 0.6"),
        (["--top-p", "0"], "--top-p = 0.0: must be above 0 and at most 1; use for example 0.95"),
        (["--top-p", "0.9"],
         "--top-p = 0.9: changes nothing at temperature 0; leave it out, or give --temperature"),
        (["--max-model-len", "16"],
         "--max-new-tokens = 16: must be less than --max-model-len (16): it holds the prompt too; shorten it, or "
         "leave --max-model-len out"),
        (["--max-model-len", "23"],
         "--max-new-tokens = 16: leaves 7 tokens of --max-model-len (23) for a prompt, but 1 of 2 in b are longer, "
         "the longest 'p1' with 8; use at most 15"),
        (["--max-new-tokens", "121"],
         "--max-new-tokens = 121: leaves 7 tokens of the model's max_position_embeddings (128) for a prompt, but 1 "
         "of 2 in b are longer, the longest 'p1' with 8; use at most 120"),
        (["--max-new-tokens", "128"],
         "--max-new-tokens = 128: must be less than the model's max_position_embeddings (128); shorten it"),
        (["--max-model-len", "129"],
         "--max-model-len = 129: must be at most the model's max_position_embeddings (128); shorten it"),
        (["--tensor-parallel", "3", "--nproc-per-node", "3"],
         "--tensor-parallel = 3: must divide the model's num_attention_heads (8); use 1"),
        (["--tensor-parallel", "2"], "--tensor-parallel = 2: must divide the world size (1); use 1"),
        (["--kv-cache-gib", "0"], "--kv-cache-gib = 0.0: must be positive; use for example 1"),
        # 2 x 4 layers x 4 KV heads of 8 x 4 bytes x (8 + 16) tokens.
        (["--kv-cache-gib", "0.00002"],
         "--kv-cache-gib = 2e-05: a sequence of 24 tokens (prompt and --max-new-tokens) takes 2.29e-05 GiB; use at "
         "least 0.001, better 0.002 for all --max-num-seqs"),
        (["--gpu-memory-utilization", "1.5"],
         "--gpu-memory-utilization = 1.5: must be above 0 and at most 1; use for example 0.9"),
        (["--instruction", " "], '--instruction = " ": must not be blank; leave it out'),
        (["--dtype", "float8"],
         "command line: argument --dtype: invalid choice: 'float8' (choose from 'bfloat16', 'float32'); " + HELP),
        (["--benchmarks", "DIR/none.parquet"],
         '--benchmarks = "DIR/none.parquet": no such file; give the path of a JSONL or parquet file'),
        (["--benchmarks", "DIR/model/config.json"],
         '--benchmarks = "DIR/model/config.json": must end in .jsonl or .parquet; convert the file to one of them'),
        (["--output", "DIR/b.jsonl"],
         '--output = "DIR/b.jsonl": DIR/b.jsonl is not a directory; choose another'),
        (["--model", "DIR/model"],
         '--model = "DIR/model": MODEL is no checkpoint of a run, which alone has no config.json; leave the option '
         "out"),
        (["--device", "cuda"], '--device = "cuda": no GPU is visible to torch; use --device cpu'),
    ],
)  # fmt: skip
def test_options(inputs: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(inputs, command(inputs, *more), capsys) == message
    assert not (inputs / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate"],
         f"command line: the following arguments are required: MODEL, --benchmarks, --output; {HELP}"),
        (["evaluate", "DIR/model", "--output", "DIR/out"],
         f"command line: the following arguments are required: --benchmarks; {HELP}"),
        (["evaluate", "DIR/model", "--compare", "DIR/out"],
         f"command line: --compare takes output directories and no MODEL or --benchmarks; {HELP}"),
        (["evaluate", "--compare", "DIR/out"],
         "DIR/out: holds no evaluation.json; give the --output directory of an evaluation"),
        (["evaluate", "DIR/none", "--benchmarks", "DIR/b.jsonl", "--output", "DIR/out"],
         'MODEL = "DIR/none": no such directory; give the directory of a model or checkpoint'),
    ],
)  # fmt: skip
def test_arguments(
    inputs: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word.replace("DIR", str(inputs)) for word in arguments]
    assert refused(inputs, given, capsys) == message


def no_config(inputs: Path) -> str:
    (inputs / "model/config.json").unlink()
    return 'MODEL = "DIR/model": holds no config.json; give a local Hugging Face directory'


def no_tokenizer(inputs: Path) -> str:
    (inputs / "model/tokenizer.json").unlink()
    return (
        'MODEL = "DIR/model": holds neither tokenizer.json nor tokenizer.model; copy the tokenizer files of the model '
        "into it"
    )


def another_architecture(inputs: Path) -> str:
    path = inputs / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["GPT2LMHeadModel"]}))
    return (
        'DIR/model/config.json: architectures = ["GPT2LMHeadModel"]: not a supported architecture; use a model of '
        "LlamaForCausalLM, DeciLMForCausalLM, Olmo3ForCausalLM or Qwen3ForCausalLM"
    )


def lacks_a_tensor(inputs: Path) -> str:
    shapes = llama_shapes()
    del shapes["lm_head.weight"]
    write_safetensors(inputs / "model/model.safetensors", shapes)
    return "DIR/model: lacks lm_head.weight; use a complete checkpoint"


def has_another_tokenizer(inputs: Path) -> str:
    path = inputs / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 6}))
    write_safetensors(inputs / "model/model.safetensors", llama_shapes(vocab_size=6))
    return (
        "DIR/b.jsonl: problem p0: has the token id 6, but the model's vocab_size is 6; use the tokenizer that belongs "
        "to the model"
    )


def is_a_checkpoint_of_a_run(inputs: Path) -> str:
    shutil.rmtree(inputs / "model")
    (inputs / "model").mkdir()
    (inputs / "model/.metadata").write_bytes(b"")
    return (
        'MODEL = "DIR/model": is a distributed checkpoint without config.json; give --model DIR, the directory of the '
        "model that the run trained"
    )


def was_evaluated_otherwise(inputs: Path) -> str:
    options = command(inputs, "--temperature", "0.6", "--samples", "2")[1:]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    evaluation = check(settings_of(parser.parse_args(options)), 1)
    evaluation.output.open(evaluation.asked())
    return (
        '--output = "DIR/out": holds an evaluation of another configuration: benchmarks.b.samples 2 -> 1, '
        "benchmarks.b.temperature 0.6 -> 0.0; choose another --output, or give the options as before"
    )


@pytest.mark.parametrize(
    "damage",
    [
        no_config,
        no_tokenizer,
        another_architecture,
        lacks_a_tensor,
        has_another_tokenizer,
        is_a_checkpoint_of_a_run,
        was_evaluated_otherwise,
    ],
)
def test_files(inputs: Path, damage: Callable[[Path], str], capsys: pytest.CaptureFixture[str]) -> None:
    message = damage(inputs)
    assert refused(inputs, command(inputs), capsys) == message


def test_what_is_not_wrong_starts_torchrun(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks get the arguments as they were given."""
    started: list[list[str]] = []
    monkeypatch.setattr(cli.os, "execv", lambda path, words: started.append(words))
    given = command(inputs, "--tensor-parallel", "2", "--nproc-per-node", "4")
    cli.main(given)
    assert started[0][2:6] == ["torch.distributed.run", "--standalone", "--nproc-per-node=4", "-m"]
    assert started[0][6:] == ["sead_megatron", *given]
    assert not (inputs / "out").exists()
