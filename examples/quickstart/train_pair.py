"""Train the quick start's teacher and student from scratch, and write every generated file of this folder.

    python examples/quickstart/train_pair.py [--out DIR] [--only teacher|student|data]

Both models learn by supervised next-token prediction on solutions whose order of reductions is random, so both
are unsure where several orders are legal. The teacher also learns to go on from miswritten steps, because it will
score the student's. The student learns from a careless source that often adds where it should multiply: it writes
well-formed solutions and guesses at some products, which is what distillation then repairs.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
from chat_tokenizer import build_tokenizer
from task import (
    EVAL_PROMPTS,
    MAX_OPERANDS,
    MIN_OPERANDS,
    TRAIN_PROMPTS,
    expression_of,
    fork_positions,
    is_valid_solution,
    prompt_records,
    prompt_text,
    sample_expression,
    solve,
    solve_carelessly,
    solve_with_slips,
    write_jsonl,
)
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MAX_LENGTH = 256
MAX_NEW_TOKENS = 40
ROLLOUT_TEMPERATURE = 0.7
ROLLOUTS_PER_PROMPT = 8


@dataclass(frozen=True)
class Recipe:
    """One model: its architecture and its supervised training."""

    seed: int
    steps: int
    sequences_per_step: int
    lr: float
    warmup_steps: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_key_value_heads: int
    tie_word_embeddings: bool
    slip_probability: float = 0.0
    carelessness: float = 0.0


# Four heads of 32 (the smallest size that vLLM's CPU attention knows): the teacher splits over 2 or 4
# tensor-parallel ranks, the student, with two key/value heads, over 2.
NUM_HEADS, HEAD_DIM = 4, 32
RECIPES = {
    "teacher": Recipe(
        11, 2000, 64, 2e-3, 100, 128, 320, 4, 4, tie_word_embeddings=False, slip_probability=0.2
    ),
    "student": Recipe(12, 1600, 64, 2e-3, 100, 96, 256, 4, 2, tie_word_embeddings=True, carelessness=0.6),
}


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=recipe.num_key_value_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=recipe.tie_word_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def encode_prompt(tokenizer: PreTrainedTokenizerFast, content: str) -> list[int]:
    messages = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def training_batch(
    tokenizer: PreTrainedTokenizerFast, rng: Random, recipe: Recipe
) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and labels, int64 `[sequences, length]`.

    Labels are -100 outside the responses and at slips: what follows a slip is learnt, the slip is not.
    """
    rows, label_rows = [], []
    for index in range(recipe.sequences_per_step):
        expression = sample_expression(rng, MIN_OPERANDS + index % (MAX_OPERANDS - MIN_OPERANDS + 1))
        prompt_ids = encode_prompt(tokenizer, prompt_text(expression))
        slips: list[int] = []
        if recipe.carelessness:
            response = solve_carelessly(expression, rng, recipe.carelessness)
        else:
            response, slips = solve_with_slips(expression, rng, recipe.slip_probability)
        response_ids = [*tokenizer(response).input_ids, tokenizer.eos_token_id]
        rows.append(prompt_ids + response_ids)
        for position in slips:  # before the box, characters and tokens are the same thing
            response_ids[position] = -100
        label_rows.append([-100] * len(prompt_ids) + response_ids)
    return pad(rows, label_rows, tokenizer.pad_token_id)


def pad(rows: list[list[int]], label_rows: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels as int64 `[len(rows), length]`, padded on the right with `pad_id` and -100."""
    shape = len(rows), max(map(len, rows))
    input_ids, labels = torch.full(shape, pad_id), torch.full(shape, -100)
    for index, (row, label_row) in enumerate(zip(rows, label_rows, strict=True)):
        input_ids[index, : len(row)] = torch.tensor(row)
        labels[index, : len(row)] = torch.tensor(label_row)
    return input_ids, labels


def train(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, name: str) -> LlamaForCausalLM:
    """A new model, fitted to the recipe's source."""
    model = build_model(recipe, tokenizer)
    rng = Random(recipe.seed)
    fit(
        model,
        lambda: training_batch(tokenizer, rng, recipe),
        steps=recipe.steps,
        lr=recipe.lr,
        warmup_steps=recipe.warmup_steps,
        name=name,
    )
    return model.eval()


def fit(
    model: LlamaForCausalLM,
    next_batch: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    *,
    steps: int,
    lr: float,
    warmup_steps: int,
    name: str,
) -> None:
    """Cross entropy on response tokens, AdamW, linear warm-up and cosine decay to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / warmup_steps) * cosine
        input_ids, labels = next_batch()
        loss = model(input_ids=input_ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"{name} step {step + 1}/{steps} loss {loss.item():.4f}", flush=True)


@torch.no_grad()
def generate(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    *,
    temperature: float = 0.0,
    batch: int = 512,
) -> list[str]:
    """One response text per prompt, without the end token; greedy when the temperature is 0."""
    sampling = {"temperature": temperature, "top_k": 0} if temperature else {}
    responses: list[str] = []
    for start in range(0, len(prompts), batch):
        rows = [encode_prompt(tokenizer, content) for content in prompts[start : start + batch]]
        inputs = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        output = model.generate(
            **inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=temperature > 0, **sampling
        )
        generated = output[:, inputs["input_ids"].shape[1] :]
        responses += tokenizer.batch_decode(generated, skip_special_tokens=True)
    return responses


def boxed_answer(response: str) -> str | None:
    """What the last complete box holds. Enough for digits; a real task needs math-verify."""
    _, box, tail = response.rpartition("\\boxed{")
    answer, brace, _ = tail.partition("}")
    return answer if box and brace else None


def accuracy_by_operands(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[dict]
) -> dict[str, float]:
    """Greedy accuracy in percent: in total ("all"), per number of operands, and of fully valid solutions."""
    prompts = [record["messages"][0]["content"] for record in records]
    responses = generate(model, tokenizer, prompts)
    hits: dict[str, list[bool]] = defaultdict(list)
    for record, prompt, response in zip(records, prompts, responses, strict=True):
        expression = expression_of(prompt)
        correct = boxed_answer(response) == record["answer"]
        hits["all"].append(correct)
        hits[f"{len(expression.digits)} operands"].append(correct)
        hits["every step valid"].append(is_valid_solution(expression, response))
    return {name: round(100 * sum(values) / len(values), 1) for name, values in sorted(hits.items())}


@torch.no_grad()
def entropy_at_forks(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[dict]
) -> dict[str, float]:
    """Mean full-vocabulary entropy (nats, temperature 1) of correct solutions, at forks and elsewhere."""
    rng = Random(0)
    at_fork: list[float] = []
    elsewhere: list[float] = []
    for record in records:
        prompt = record["messages"][0]["content"]
        expression = expression_of(prompt)
        response = solve(expression, rng)
        prompt_ids = encode_prompt(tokenizer, prompt)
        encoded = tokenizer(response, return_offsets_mapping=True)
        logits = model(torch.tensor([prompt_ids + encoded.input_ids])).logits[0, len(prompt_ids) - 1 :]
        entropies = torch.distributions.Categorical(logits=logits.float()).entropy().tolist()
        forks = set(fork_positions(expression, response))
        is_fork = [start in forks for start, _ in encoded.offset_mapping] + [False]  # the end token
        for entropy, fork in zip(entropies, is_fork, strict=True):
            (at_fork if fork else elsewhere).append(entropy)
    return {
        "fork_share_percent": round(100 * len(at_fork) / (len(at_fork) + len(elsewhere)), 2),
        "entropy_at_forks": round(sum(at_fork) / len(at_fork), 4),
        "entropy_elsewhere": round(sum(elsewhere) / len(elsewhere), 4),
    }


def estimate_difficulty(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[dict], seed: int
) -> list[dict[str, object]]:
    """1 - pass rate of `ROLLOUTS_PER_PROMPT` samples of the initial student; first row: provenance."""
    torch.manual_seed(seed)
    prompts = [record["messages"][0]["content"] for record in records]
    passes = [0] * len(records)
    for _ in range(ROLLOUTS_PER_PROMPT):
        responses = generate(model, tokenizer, prompts, temperature=ROLLOUT_TEMPERATURE)
        for index, response in enumerate(responses):
            passes[index] += boxed_answer(response) == records[index]["answer"]
    provenance = {
        "model": "student",
        "rollouts_per_prompt": ROLLOUTS_PER_PROMPT,
        "temperature": ROLLOUT_TEMPERATURE,
        "max_new_tokens": MAX_NEW_TOKENS,
        "seed": seed,
        "grader": "boxed digit equals answer",
    }
    rows: list[dict[str, object]] = [{"provenance": provenance}]
    for record, count in zip(records, passes, strict=True):
        rows.append({"id": record["id"], "difficulty": 1 - count / ROLLOUTS_PER_PROMPT})
    return rows


def make_model(name: str, out: Path, eval_records: list[dict]) -> dict[str, object]:
    """Train, measure and save one model with its tokenizer; returns what recipe.json says about it."""
    tokenizer = build_tokenizer(MAX_LENGTH)
    started = time.monotonic()
    model = train(RECIPES[name], tokenizer, name)
    seconds = round(time.monotonic() - started)
    model.save_pretrained(out / name)
    tokenizer.save_pretrained(out / name)
    return {
        **asdict(RECIPES[name]),
        "parameters": model.num_parameters(),
        "seconds": seconds,
        "greedy_accuracy_percent": accuracy_by_operands(model, tokenizer, eval_records),
        **entropy_at_forks(model, tokenizer, eval_records),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the quick start's teacher and student.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    parser.add_argument(
        "--only", choices=("teacher", "student", "data"), help="one part; the rest must exist"
    )
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(
        1
    )  # the committed weights come from one thread: sums depend on the number of threads

    train_records, eval_records = prompt_records("train", TRAIN_PROMPTS), prompt_records("eval", EVAL_PROMPTS)
    recipe_path = out / "recipe.json"
    report = json.loads(recipe_path.read_text()) if recipe_path.exists() else {}
    for name in RECIPES:
        if arguments.only in (None, name):
            report[name] = make_model(name, out, eval_records)
            recipe_path.write_text(json.dumps(report, indent=2) + "\n")
    if arguments.only in (None, "data"):
        build_tokenizer(MAX_LENGTH).save_pretrained(out)
        student = LlamaForCausalLM.from_pretrained(out / "student").eval()
        write_jsonl(out / "prompts_train.jsonl", train_records)
        write_jsonl(out / "prompts_eval.jsonl", eval_records)
        seed = RECIPES["student"].seed
        rows = estimate_difficulty(student, build_tokenizer(MAX_LENGTH), train_records, seed)
        write_jsonl(out / "difficulty.jsonl", rows)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
