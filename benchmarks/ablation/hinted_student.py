"""The ablation's student: the quick start's, taught to read a hint, and prompts that carry one.

OPSD and EGRSD have no larger teacher: the student itself, shown a correct solution, is theirs. The quick start's
student never saw a solution in a prompt, so it goes on learning from two halves: a source without hints that nearly
always adds where it should multiply two factors of 3 or more, and prompts with a hint, answered with the hint. The
products that the source spoils are no targets there either: the student learns to copy, and not to multiply. (Where it
could learn the products, five steps of any method brought them out.) Every method of the comparison starts from it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
sys.path.insert(0, str(QUICKSTART))

from chat_tokenizer import build_tokenizer  # noqa: E402
from task import (  # noqa: E402
    MAX_OPERANDS,
    MIN_OPERANDS,
    Expression,
    expression_of,
    prompt_records,
    prompt_text,
    sample_expression,
    solve,
    solve_carelessly,
)
from train_pair import MAX_LENGTH, encode_prompt, fit, pad  # noqa: E402

HINT = "{problem}\nhint: {solution}"
"""`teacher.context` of the methods that show a solution."""
SEED, STEPS, SEQUENCES, LR, WARMUP_STEPS = 13, 600, 64, 1e-3, 30
CARELESSNESS = 0.9
SMALLEST_SPOILT_FACTOR = 3  # as in solve_carelessly


def with_solutions(records: list[dict[str, object]], seed: int) -> list[dict[str, object]]:
    """The quick start's prompt records with a `solution` each, in a random order of reductions."""
    rng = Random(seed)
    return [
        {**record, "solution": solve(expression_of(record["messages"][0]["content"]), rng)}
        for record in records
    ]


def spoilt_products(expression: Expression, solution: str) -> list[int]:
    """Character positions of the results, in a correct solution, of products that the careless source may spoil."""
    found, start = [], 0
    for step in solution.partition(" ")[0].split("="):
        index = next(i for i in expression.legal_reductions() if str(expression.reduce(i)) == step)
        factors = expression.digits[index : index + 2]
        if expression.operators[index] == "*" and min(factors) >= SMALLEST_SPOILT_FACTOR:
            found.append(start + 2 * index)
        expression = expression.reduce(index)
        start += len(step) + 1
    return found


def training_example(rng: Random, expression: Expression, *, hinted: bool) -> tuple[str, str, list[int]]:
    """Content of the user's message, the response, and its characters that are no targets."""
    problem = prompt_text(expression)
    if not hinted:
        return problem, solve_carelessly(expression, rng, CARELESSNESS), []
    solution = solve(expression, rng)
    return HINT.format(problem=problem, solution=solution), solution, spoilt_products(expression, solution)


def training_batch(tokenizer: PreTrainedTokenizerFast, rng: Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and labels (-100 outside the responses), int64 `[SEQUENCES, length]`."""
    rows, label_rows = [], []
    for index in range(SEQUENCES):
        operands = MIN_OPERANDS + index // 2 % (MAX_OPERANDS - MIN_OPERANDS + 1)
        expression = sample_expression(rng, operands)
        content, response, no_targets = training_example(rng, expression, hinted=index % 2 == 1)
        prompt_ids = encode_prompt(tokenizer, content)
        response_ids = [*tokenizer(response).input_ids, tokenizer.eos_token_id]
        rows.append(prompt_ids + response_ids)
        for position in no_targets:  # before the box, characters and tokens are the same thing
            response_ids[position] = -100
        label_rows.append([-100] * len(prompt_ids) + response_ids)
    return pad(rows, label_rows, tokenizer.pad_token_id)


def make_hinted_student(directory: Path) -> None:
    """Train on from the quick start's student (one thread, fixed seed: the same weights every time) and save."""
    tokenizer = build_tokenizer(MAX_LENGTH)
    model = LlamaForCausalLM.from_pretrained(QUICKSTART / "student")
    rng = Random(SEED)
    torch.set_num_threads(1)
    fit(
        model,
        lambda: training_batch(tokenizer, rng),
        steps=STEPS,
        lr=LR,
        warmup_steps=WARMUP_STEPS,
        name="hinted student",
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def evaluation_records(count: int, seed: int) -> list[dict[str, object]]:
    """Distinct held-out prompts that are not among the quick start's: id, messages, answer."""
    seen = {str(record["messages"]) for record in prompt_records("eval", 256)}
    rng = Random(seed)
    records: list[dict[str, object]] = []
    while len(records) < count:
        operands = MIN_OPERANDS + len(records) % (MAX_OPERANDS - MIN_OPERANDS + 1)
        expression = sample_expression(rng, operands, held_out=True)
        messages = [{"role": "user", "content": prompt_text(expression)}]
        if str(messages) not in seen:
            seen.add(str(messages))
            identifier = f"held-out-{seed}-{len(records):05d}"
            records.append({"id": identifier, "messages": messages, "answer": str(expression.value())})
    return records
