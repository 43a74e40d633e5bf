"""`python -m sead_megatron evaluate` with real engines: killed and continued, and greedy text against a reference."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, LlamaForCausalLM

from sead_megatron.models.tokenizer import load_tokenizer
from sead_megatron.records import read_records
from sead_megatron.rollout.checkpoint_weights import CheckpointWeights
from tests.integration.jobs import Finished, run_command
from tests.tiny_inputs import write_jsonl, write_tokenizer_json
from tests.tiny_models import save_tiny_llama

# A response of digits is now and then the answer.
WORDS = ["<unk>", "<s>", "</s>", "is", "plus", "times", *map(str, range(10))]
APPEND = {"module": "sead_megatron.evaluation.output", "attribute": "Output.append"}


def evaluate(log: Path, *arguments: object, fault: dict[str, Any] | None = None) -> Finished:
    fixed = ["--device", "cpu", "--max-new-tokens", "16", "--kv-cache-gib", "0.0625", "--save-text"]
    ended = run_command(["evaluate", *map(str, arguments), *fixed], log, fault)
    assert ended.leftover == []
    return ended


def greedy_texts(
    model: LlamaForCausalLM, prompts: Iterable[list[dict[str, str]]], tokenizer_directory: Path
) -> list[str]:
    """transformers' greedy continuations of at most 16 tokens up to </s>."""
    tokenizer = load_tokenizer(tokenizer_directory)
    texts = []
    for messages in prompts:
        ids = tokenizer.encode_messages(messages)
        tokens = list(ids)
        with torch.no_grad():
            while len(tokens) < len(ids) + 16 and (len(tokens) == len(ids) or tokens[-1] != 2):
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        texts.append(tokenizer.decode(tokens[len(ids) :]))
    return texts


def reference(directory: Path, weights: Iterable[tuple[str, Tensor]] | None = None) -> LlamaForCausalLM:
    """The model of a Hugging Face directory, with other weights when they are given."""
    if weights is None:
        return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model = LlamaForCausalLM(AutoConfig.from_pretrained(directory)).float().eval()
    _, unexpected = model.load_state_dict(dict(weights), strict=False)
    assert not unexpected
    model.tie_weights()
    return model


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model of untied embeddings and two benchmarks of ten problems."""
    directory = tmp_path_factory.mktemp("evaluate")
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    save_tiny_llama(
        directory / "model", seed=1, vocab_size=len(WORDS), head_dim=32, initializer_range=0.08, **shape
    )
    write_tokenizer_json(directory / "model", WORDS)
    for name, word in (("sums", "plus"), ("products", "times")):
        problems = [
            {"id": f"p{i}", "prompt": f"{i} {word} {i * 7 % 10}", "answer": str(i)} for i in range(10)
        ]
        write_jsonl(directory / f"{name}.jsonl", problems)
    return directory


@pytest.mark.slow
def test_killed_and_continued_on_other_ranks(untied: Path, tmp_path: Path) -> None:
    """Two ranks are killed after six of ten problems; the same command goes on there, to the files of one rank that
    nobody killed. A second benchmark goes to the same directory.
    """
    sums, products = untied / "sums.jsonl", untied / "products.jsonl"
    sampled = ["--benchmarks", sums, "--samples", 4, "--temperature", 1.0, "--batch", 3]
    wanted, killed = tmp_path / "wanted" / "out", tmp_path / "killed" / "out"
    whole = evaluate(tmp_path / "whole.log", untied / "model", "--output", wanted, *sampled)
    assert whole.returncode == 0, whole.output[-3000:]
    command = [untied / "model", "--output", killed, *sampled, "--nproc-per-node", 2]
    ended = evaluate(tmp_path / "killed.log", *command, fault=APPEND | {"call": 3})
    assert ended.returncode == -9, ended.output[-3000:]
    assert len(entries(killed / "sums.jsonl")) == 6 and not (killed / "results.json").exists()
    continued = evaluate(tmp_path / "continued.log", *command)
    assert continued.returncode == 0, continued.output[-3000:]
    assert "sums: 9/10 problems" in continued.output and "sums: 6/10 problems" not in continued.output
    names = ["evaluation.json", "results.json", "results.md", "sums.jsonl"]
    assert sorted(path.name for path in killed.iterdir()) == [".lock", *names]
    for name in names:
        assert (killed / name).read_text() == (wanted / name).read_text(), name
    texts = [text for entry in entries(killed / "sums.jsonl") for text in entry["responses"]]
    assert len(set(texts)) > 30
    assert 0 < json.loads((killed / "results.json").read_text())["benchmarks"]["sums"]["correct"] < 40

    greedy = evaluate(tmp_path / "greedy.log", untied / "model", "--output", wanted, "--benchmarks", products)
    assert greedy.returncode == 0, greedy.output[-3000:]
    results = json.loads((wanted / "results.json").read_text())["benchmarks"]
    assert {name: result["metric"] for name, result in results.items()} == {
        "sums": "avg@4",
        "products": "greedy",
    }


def test_greedy_responses_are_the_references(untied: Path, tmp_path: Path) -> None:
    products, out = untied / "products.jsonl", tmp_path / "out"
    ended = evaluate(tmp_path / "log", untied / "model", "--output", out, "--benchmarks", products)
    assert ended.returncode == 0, ended.output[-3000:]
    prompts = [[{"role": "user", "content": entry["prompt"]}] for entry in entries(products)]
    assert [entry["responses"] for entry in entries(out / "products.jsonl")] == [
        [text] for text in greedy_texts(reference(untied / "model"), prompts, untied / "model")
    ]


@pytest.mark.slow
def test_checkpoint_of_a_run_on_one_engine_of_two_ranks(baseline: tuple[Path, Path], tmp_path: Path) -> None:
    """Tied embeddings, TP2: the run's own evaluation of its last step, and the reference's text."""
    config, run = baseline
    student = config.parent / "student"
    benchmark = config.parent / "eval.jsonl"
    checkpoint = run / "checkpoints" / "step_00000006"
    ended = evaluate(
        tmp_path / "log", checkpoint, "--model", student, "--output", tmp_path / "out",
        "--benchmarks", benchmark, "--nproc-per-node", 2, "--tensor-parallel", 2,
    )  # fmt: skip
    assert ended.returncode == 0, ended.output[-3000:]
    result = json.loads((tmp_path / "out" / "results.json").read_text())["benchmarks"]["eval"]
    last = read_records(run / "evaluations.jsonl")[-1]
    assert (last["step"], last["total"]) == (6, result["problems"])
    assert (last["correct"], last["truncated"], last["length_mean"]) == (
        result["correct"],
        result["truncated"],
        result["length_mean"],
    )
    prompts = [[{"role": "user", "content": entry["prompt"]}] for entry in entries(benchmark)]
    model = reference(student, CheckpointWeights(checkpoint, student))
    texts = greedy_texts(model, prompts, student)
    assert [entry["responses"] for entry in entries(tmp_path / "out" / "eval.jsonl")] == [
        [text] for text in texts
    ]
    assert texts != greedy_texts(reference(student), prompts, student)
