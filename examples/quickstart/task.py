"""The quick start's task: arithmetic modulo 10, reduced one operation at a time.

A prompt is a flat expression of single digits with `+` and `*`. A response rewrites the expression after
every operation until one digit is left:

    Evaluate 3*8+2+9 modulo 10.    ->    4+2+9=6+9=5 \\boxed{5}

Both operators are associative modulo 10, so several operations are legal at most steps and any of them may be
taken first. The digit that gives the choice away is a true fork: even perfect knowledge of the task leaves it
open, while copied digits and results of an operation are certain. Everything is deterministic in its seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

MODULUS = 10
DIGITS, OPERATORS = "0123456789", "+*"
MIN_OPERANDS = 3
MAX_OPERANDS = 6
PRODUCT_PROBABILITY = 0.4
# One expression in 16 belongs to the evaluation side, chosen by a hash of its text: no list has to be kept,
# and whatever draws training expressions, with any seed, never meets an evaluation expression.
HELD_OUT_BUCKETS = 16
TRAIN_SEED = 20260
EVAL_SEED = 20261
TRAIN_PROMPTS = 3840
EVAL_PROMPTS = 256


@dataclass(frozen=True)
class Expression:
    """`digits[i] operators[i] digits[i + 1] ...`; always one digit more than operators."""

    digits: tuple[int, ...]
    operators: str

    def __post_init__(self) -> None:
        if len(self.digits) != len(self.operators) + 1:
            raise ValueError(f"{len(self.digits)} digits do not fit {len(self.operators)} operators")

    def __str__(self) -> str:
        tail = "".join(f"{op}{digit}" for op, digit in zip(self.operators, self.digits[1:], strict=True))
        return f"{self.digits[0]}{tail}"

    @classmethod
    def parse(cls, text: str) -> Expression:
        """Inverse of `str`. Raises ValueError for anything that is not digits joined by `+` and `*`."""
        digits, operators = text[0::2], text[1::2]
        if not (digits.isascii() and digits.isdigit()) or set(operators) - {"+", "*"}:
            raise ValueError(f"not an expression of single digits, + and *: {text!r}")
        return cls(tuple(int(digit) for digit in digits), operators)

    def legal_reductions(self) -> list[int]:
        """Indices of the operators that may be applied now without changing the value.

        A product always may. A sum may unless one of its operands is still part of a product.
        """
        padded = f"+{self.operators}+"
        free_sums = {i for i in range(len(self.operators)) if padded[i : i + 3] == "+++"}
        return [i for i, op in enumerate(self.operators) if op == "*" or i in free_sums]

    def reduce(self, index: int) -> Expression:
        """The expression after applying operator `index`, modulo 10."""
        left, right = self.digits[index], self.digits[index + 1]
        result = (left + right if self.operators[index] == "+" else left * right) % MODULUS
        digits = (*self.digits[:index], result, *self.digits[index + 2 :])
        return Expression(digits, self.operators[:index] + self.operators[index + 1 :])

    def value(self) -> int:
        """Sum of the products, modulo 10: the answer, found without `reduce`."""
        total = 0
        for term in str(self).split("+"):
            product = 1
            for digit in term.split("*"):
                product *= int(digit)
            total += product
        return total % MODULUS


def is_held_out(expression: Expression) -> bool:
    """Whether the expression may only be used for evaluation."""
    return hashlib.sha256(str(expression).encode()).digest()[0] % HELD_OUT_BUCKETS == 0


def sample_expression(rng: Random, operands: int, *, held_out: bool = False) -> Expression:
    """A random expression of `operands` digits 1 to 9 from the training side, or from the evaluation side."""
    while True:
        digits = tuple(1 + rng.randrange(MODULUS - 1) for _ in range(operands))
        operators = "".join("*" if rng.random() < PRODUCT_PROBABILITY else "+" for _ in range(operands - 1))
        expression = Expression(digits, operators)
        if is_held_out(expression) == held_out:
            return expression


def solve(expression: Expression, rng: Random) -> str:
    """A correct response. Each step takes one of the legal reductions, all equally likely."""
    return solve_with_slips(expression, rng, 0.0)[0]


def solve_with_slips(expression: Expression, rng: Random, slip_probability: float) -> tuple[str, list[int]]:
    """A response whose steps are each miswritten with a probability, and the characters where that happened.

    After a slip the solution goes on correctly from what was written. That is what a teacher must be able to
    do, because it is asked about the student's prefixes, wrong ones too. The slips are not for learning.
    """
    chain, slips = "", []
    while expression.operators:
        legal = expression.legal_reductions()
        step = str(expression.reduce(legal[rng.randrange(len(legal))]))
        if rng.random() < slip_probability:
            step = _miswrite(step, rng)
            offset = _first_illegal_offset(expression, step)
            if offset is not None:
                slips.append(len(chain) + offset)
        expression = Expression.parse(step)
        chain += step + ("=" if expression.operators else "")
    return f"{chain} \\boxed{{{expression}}}", slips


def solve_carelessly(expression: Expression, rng: Random, carelessness: float) -> str:
    """A response that, with this probability, adds instead of multiplying two factors of 3 or more."""
    steps = []
    while expression.operators:
        legal = expression.legal_reductions()
        index = legal[rng.randrange(len(legal))]
        factors = expression.digits[index : index + 2]
        if expression.operators[index] == "*" and min(factors) >= 3 and rng.random() < carelessness:
            operators = f"{expression.operators[:index]}+{expression.operators[index + 1 :]}"
            expression = Expression(expression.digits, operators)
        expression = expression.reduce(index)
        steps.append(str(expression))
    return f"{'='.join(steps)} \\boxed{{{expression}}}"


def _miswrite(step: str, rng: Random) -> str:
    """The step with another character in one place or, one time in four, without one of its operands."""
    at = rng.randrange(len(step))
    if rng.random() < 0.25 and len(step) > 1:
        at -= at % 2
        return (step[:at] + step[at + 2 :]).rstrip("+*")
    others = DIGITS if step[at] in DIGITS else OPERATORS
    return step[:at] + others[rng.randrange(len(others))] + step[at + 1 :]


def _first_illegal_offset(expression: Expression, step: str) -> int | None:
    """Where `step` (and the `=` after it) stops being the beginning of a legal step; None if it is legal."""
    successors = [str(expression.reduce(i)) + "=" for i in expression.legal_reductions()]
    for offset in range(len(step) + 1):
        if not any(text.startswith(f"{step}="[: offset + 1]) for text in successors):
            return offset
    return None


def prompt_text(expression: Expression) -> str:
    return f"Evaluate {expression} modulo {MODULUS}."


def expression_of(prompt: str) -> Expression:
    """Inverse of `prompt_text`. Raises ValueError for another text."""
    prefix, suffix = prompt_text(Expression((0,), "")).split("0", 1)
    if not (prompt.startswith(prefix) and prompt.endswith(suffix)):
        raise ValueError(f"not a prompt of this task: {prompt!r}")
    return Expression.parse(prompt[len(prefix) : -len(suffix)])


def is_valid_solution(expression: Expression, response: str) -> bool:
    """Whether every step is one legal, correctly computed reduction and the box holds the result.

    Stricter than grading the answer: two wrong steps can cancel out.
    """
    chain, _, boxed = response.partition(" ")
    for step in chain.split("="):
        successors = {str(expression.reduce(i)): i for i in expression.legal_reductions()}
        if step not in successors:
            return False
        expression = expression.reduce(successors[step])
    return not expression.operators and boxed == f"\\boxed{{{expression}}}"


def fork_positions(expression: Expression, response: str) -> list[int]:
    """Character positions of a valid response at which the legal next characters are more than one.

    This is the ground truth for "the teacher should be unsure here". Different reductions may lead to the
    same text (both orders of `5*5*5` do); such a choice is invisible and no fork.

    Raises:
        ValueError: The response is not a valid solution.
    """
    if not is_valid_solution(expression, response):
        raise ValueError(f"not a valid solution of {expression}: {response!r}")
    forks, start = [], 0
    for step in response.partition(" ")[0].split("="):
        successors = {str(expression.reduce(i)): i for i in expression.legal_reductions()}
        for offset in range(len(step)):
            if len({text[offset] for text in successors if text[:offset] == step[:offset]}) > 1:
                forks.append(start + offset)
        expression = expression.reduce(successors[step])
        start += len(step) + 1
    return forks


def prompt_records(split: str, count: int) -> list[dict[str, object]]:
    """The first `count` distinct prompts of "train" or "eval": id, chat messages, answer.

    Numbers of operands alternate, so that every prefix holds all difficulties in equal parts.
    """
    held_out = split == "eval"
    rng = Random(EVAL_SEED if held_out else TRAIN_SEED)
    seen: set[Expression] = set()
    records: list[dict[str, object]] = []
    sizes = MAX_OPERANDS - MIN_OPERANDS + 1
    while len(records) < count:
        expression = sample_expression(rng, MIN_OPERANDS + len(records) % sizes, held_out=held_out)
        if expression in seen:
            continue
        seen.add(expression)
        messages = [{"role": "user", "content": prompt_text(expression)}]
        identifier = f"{split}-{len(records):05d}"
        records.append({"id": identifier, "messages": messages, "answer": str(expression.value())})
    return records


def write_jsonl(path: Path, records: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write prompts_train.jsonl and prompts_eval.jsonl.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    out = parser.parse_args().out
    write_jsonl(out / "prompts_train.jsonl", prompt_records("train", TRAIN_PROMPTS))
    write_jsonl(out / "prompts_eval.jsonl", prompt_records("eval", EVAL_PROMPTS))


if __name__ == "__main__":
    main()
