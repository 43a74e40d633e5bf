"""What OPSD's teacher, the initial student that was shown a solution, says where the student adds two factors.

A rollout need not take the shown solution's reductions. Its products are of three kinds: `same step`, the solution
takes this product from this expression; `other step`, it has this expression and goes on otherwise; `elsewhere`, it
does not have this expression.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from hinted_student import HINT, SMALLEST_SPOILT_FACTOR
from task import MODULUS, Expression, expression_of
from torch import Tensor
from train_pair import encode_prompt
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from sead_megatron.data.prompts import read_prompts

KINDS = ("same step", "other step", "elsewhere")
STEPS = (1, 2, 3)
"""Whose rollouts are looked at: those of the initial student, nearly."""


@dataclass(frozen=True)
class Product:
    """A product that a rollout reduced, of factors that the student likes to add.

    `position` is the character of its result in the response, `right` and `added` are that of the product and of the
    sum, `shown` what the solution has at this place when it goes on otherwise from the same expression.
    """

    position: int
    kind: str
    right: str
    added: str
    shown: str | None


def products(expression: Expression, response: str, solution: str) -> Iterator[Product]:
    """Those of a response, up to its first step that is no reduction, where product and sum are different digits."""
    shown_chain = [str(expression), *solution.partition(" ")[0].split("=")]
    start = 0
    for step in response.partition(" ")[0].split("="):
        index = _reduced(expression, step)
        if index is None:
            return
        left, right = expression.digits[index : index + 2]
        product, added = left * right % MODULUS, (left + right) % MODULUS
        spoilt = expression.operators[index] == "*" and min(left, right) >= SMALLEST_SPOILT_FACTOR
        if spoilt and product != added:
            kind, shown, place = "elsewhere", None, 2 * index
            if str(expression) in shown_chain[:-1]:
                following = shown_chain[shown_chain.index(str(expression)) + 1]
                kind = "same step" if following == str(expression.reduce(index)) else "other step"
                shown = following[place] if kind == "other step" and place < len(following) else None
            yield Product(start + place, kind, str(product), str(added), shown)
        expression = Expression.parse(step)
        start += len(step) + 1


def _reduced(expression: Expression, step: str) -> int | None:
    """Which operator a step applied, whatever the result it wrote; None where that is not one operator."""
    try:
        after = Expression.parse(step)
    except ValueError:
        return None
    found = [
        index
        for index in range(len(expression.operators))
        if expression.operators[:index] + expression.operators[index + 1 :] == after.operators
        and expression.digits[:index] == after.digits[:index]
        and expression.digits[index + 2 :] == after.digits[index + 1 :]
    ]
    return found[0] if len(found) == 1 else None


def examine(runs: Path, student: Path, prompts: Path) -> dict[str, dict[str, float]]:
    """Mean probabilities at the results of products in OPSD's rollouts, by kind.

    Args:
        runs: holds `seed_*`, run directories of OPSD. student: the initial one. prompts: the training prompts.
    """
    tokenizer = AutoTokenizer.from_pretrained(student)
    model = LlamaForCausalLM.from_pretrained(student).eval()
    solutions = {prompt.id: prompt.solution or "" for prompt in read_prompts(prompts)}
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    paths = [path for step in STEPS for path in sorted(runs.glob(f"seed_*/rollouts/step_{step}.jsonl"))]
    for rollout in (json.loads(line) for path in paths for line in path.read_text().splitlines()):
        problem, response = rollout["prompt"][0]["content"], rollout["response"]
        solution = solutions[rollout["prompt_id"]]
        own = _probabilities(model, tokenizer, problem, response)
        shown = HINT.format(problem=problem, solution=solution)
        teacher = _probabilities(model, tokenizer, shown, response)
        for product in products(expression_of(problem), response, solution):
            token = {name: tokenizer(text).input_ids[0] for name, text in _texts(product).items()}
            q, p = own[product.position], teacher[product.position]
            numbers = {f"teacher, {name}": float(p[index]) for name, index in token.items()}
            numbers |= {f"student, {name}": float(q[index]) for name, index in token.items()}
            found[product.kind].append(numbers)
    return {kind: {"products": len(found[kind]), **_means(found[kind])} for kind in KINDS}


def _texts(product: Product) -> dict[str, str]:
    texts = {"product": product.right, "sum": product.added}
    return texts | ({} if product.shown is None else {"shown": product.shown})


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    names = sorted({name for row in rows for name in row})
    return {name: round(fmean(row[name] for row in rows if name in row), 4) for name in names}


@torch.no_grad()
def _probabilities(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, content: str, response: str
) -> Tensor:
    """Of every token of a response, [tokens, vocabulary]; before the box tokens are characters."""
    prompt, tokens = encode_prompt(tokenizer, content), tokenizer(response).input_ids
    logits = model(torch.tensor([prompt + tokens])).logits[0]
    return logits[len(prompt) - 1 : -1].softmax(-1)
