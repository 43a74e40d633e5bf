"""How often the grader accepts what it should and what it should not, and what hostile text does to it.

    python benchmarks/grader_rates.py DATA benchmarks/results/grader_rates.json
    python benchmarks/grader_rates.py --table benchmarks/results/grader_rates.json    # as docs/grading.md has it

DATA holds the benchmarks as parquet files with a column `reward_model.ground_truth`. Of every problem, the gold answer
is graded against itself, once in a boxed sentence and once as plain text at the end, and against the gold answers of
other problems, in the same two forms. Pairs of equal value by `same_value`, which knows nothing of math-verify, are no
mistakes; every other pair that is accepted is written out. Then strings made to break a grader, from a seed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

from record_run import commit, machine

from sead_megatron.evaluation.grader import Grader

BENCHMARKS = ("MATH-500", "Minerva", "Olympiad-Bench", "AMC23", "AIME24", "AIME25")
SHUFFLES = 1
FORMS: dict[str, str] = {
    "boxed": "So the final answer is $\\boxed{{{}}}$.",
    "plain": "So we find what was asked for.\n\nThe final answer is {}",
}
_FRACTION = re.compile(r"(-?)\\frac\{?(\d+)\}?\{?(\d+)\}?|(-?[\d,]*\.?\d+)(?:/(\d+))?")


def unboxed(gold: str) -> str:
    """A gold answer without the box that some benchmarks put around it."""
    return gold.strip().removeprefix("\\boxed{").removesuffix("}") if "\\boxed{" in gold else gold.strip()


def same_value(first: str, second: str) -> bool:
    """Whether two gold answers are the same text but for typography, or the same rational number."""
    first, second = plain_text(first), plain_text(second)
    numbers = rational(first), rational(second)
    return first == second or (numbers[0] is not None and numbers[0] == numbers[1])


def plain_text(gold: str) -> str:
    """Without spaces, dollar signs, units in \\text, degrees, `x =`, and sizes of parentheses."""
    text = re.sub(
        r"\\(?:text|mbox|mathrm)\{[^}]*\}(?:\^\d)?(?=$|[.$])|\\left|\\right|\\[,;! ]|[\s$]", "", gold
    )
    text = text.replace("\\dfrac", "\\frac").replace("\\%", "").replace("%", "").replace("^\\circ", "")
    return re.sub(r"^[A-Za-z]=|\^\{\\circ\}|\.$", "", text).lower()


def rational(text: str) -> Fraction | None:
    """The number that a plain text is, if it is an integer, a decimal or a fraction of integers."""
    match = _FRACTION.fullmatch(text)
    if match is None:
        return None
    sign, numerator, denominator, number, divisor = match.groups()
    if number is not None:
        return Fraction(number.replace(",", "")) / int(divisor or 1)
    return Fraction(int(f"{sign}{numerator}"), int(denominator)) if int(denominator) else None


def shuffled(golds: Sequence[str], rng: Random) -> list[str]:
    """For every problem the gold answer of another one, which is written differently."""
    return [rng.choice([other for other in golds if other != gold]) for gold in golds]


def hostile_strings(seed: int, golds: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Endlessly (kind, text); kinds take turns, the heavy ones in every twentieth round only."""
    rng = Random(seed)
    for turn in itertools.count():
        for kind, make in LIGHT.items() if turn % 20 else (LIGHT | HEAVY).items():
            text = make(rng, golds)
            yield kind, text if rng.random() < 0.3 else f"\\boxed{{{text}}}"


def _size(rng: Random, low: int, high: int) -> int:
    """Log-uniform: small ones get through the first checks, large ones try the limits."""
    return round(math.exp(rng.uniform(math.log(low), math.log(high))))


def _pick(rng: Random, alphabet: str | Sequence[str], low: int, high: int) -> str:
    return "".join(rng.choice(alphabet) for _ in range(_size(rng, low, high)))


def _mutated(rng: Random, golds: Sequence[str]) -> str:
    text = list(rng.choice(golds))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text) + 1)
        if rng.random() < 0.5 and at < len(text):
            del text[at]
        else:
            text.insert(at, rng.choice("{}\\^_$()[]|,&09ex!/%"))
    return "".join(text)


_TOKENS = (
    *(
        "\\frac",
        "\\sqrt",
        "\\sum_",
        "\\int",
        "\\lim_",
        "\\left(",
        "\\right)",
        "\\binom",
        "\\log_",
        "\\begin{pmatrix}",
    ),
    *(
        "\\end{pmatrix}",
        "\\text",
        "\\cup",
        "\\infty",
        "\\boxed{",
        "{",
        "}",
        "^",
        "_",
        "&",
        "\\\\",
        "$",
        "x",
        "1",
        "=",
        ",",
    ),
)
_INJECTIONS = (
    "__import__('os').system('touch {0}')",
    "().__class__.__bases__[0].__subclasses__()",
    "open('{0}','w').write('x')",
    "exec('while True: pass')",
    "lambdify(x, '__import__(\"os\").abort()')()",
    "1 + eval('__import__(\"time\").sleep({1})')",
    "sympify('9**9**9**9')",
    "\\input{{/etc/passwd}}",
    "(lambda f: f(f))(lambda f: f(f))",
    "integrate(exp(x**x), x)",
)
LIGHT: dict[str, Callable[[Random, Sequence[str]], str]] = {
    "unbalanced braces": lambda rng, _: _pick(rng, "{}\\[]()$1x", 1, 200),
    "nested exponents": lambda rng, _: (
        "9^{" * (n := _size(rng, 12, 200)) + "9" + "}" * (n - rng.randint(0, 1))
    ),
    "unicode": lambda rng, _: "".join(chr(rng.randrange(0x80, 0x30000)) for _ in range(_size(rng, 1, 120))),
    "control characters": lambda rng, _: _pick(rng, [*map(chr, range(33)), *"\x7f\u2028\ud800{}1"], 1, 200),
    "nested fractions": lambda rng, _: (
        "\\frac{1}{" * (n := _size(rng, 3, 60)) + "2" + "}" * (n + rng.randint(-1, 1))
    ),
    "nested roots": lambda rng, _: "\\sqrt{2+" * (n := _size(rng, 3, 60)) + "2" + "}" * n,
    "nested parentheses": lambda rng, _: (
        "(" * (n := _size(rng, 3, 3000)) + "1" + ")" * (n + rng.randint(-1, 1))
    ),
    "very long": lambda rng, _: _pick(rng, ("9", "1+", "x^2 ", "the ", "\\pi"), 300, 40000),
    "repeated boxes": lambda rng, golds: " and ".join(
        f"\\boxed{{{rng.choice(golds)}}}" for _ in range(_size(rng, 2, 300))
    ),
    "nested boxes": lambda rng, _: (
        "\\boxed{" * (n := _size(rng, 2, 2000)) + "2" + "}" * (n - rng.randint(0, 2))
    ),
    "injection": lambda rng, _: rng.choice(_INJECTIONS).format("INJECTED", rng.randint(10, 10**6)),
    "many elements": lambda rng, _: ",".join(str(rng.randint(-9, 9)) for _ in range(_size(rng, 5, 240))),
    "token soup": lambda rng, _: _pick(rng, _TOKENS, 3, 60),
    "mutated gold answers": _mutated,
}
HEAVY: dict[str, Callable[[Random, Sequence[str]], str]] = {
    "giant exponents": lambda rng, _: rng.choice(("^", "**")).join(
        f"{{{_size(rng, 2, 99999)}}}" if rng.random() < 0.3 else str(_size(rng, 2, 99))
        for _ in range(rng.randint(3, 6))
    ),
    "factorials": lambda rng, _: str(_size(rng, 10, 10**9)) + "!" * rng.randint(1, 5),
    "huge sums": lambda rng, _: (
        f"\\{rng.choice(('sum', 'prod'))}_{{k=1}}^{{10^{{{rng.randint(3, 30)}}}}} k^{{k}}"
    ),
    "binomials": lambda rng, _: f"\\binom{{{_size(rng, 10**4, 10**9)}}}{{{_size(rng, 10**3, 10**8)}}}",
    "integrals": lambda rng, _: (
        f"\\int_0^{{{rng.randint(1, 99)}}} \\sin(x^{{{rng.randint(2, 99)}}}) e^{{x^{{{rng.randint(2, 9)}}}}} dx"
    ),
    "large powers": lambda rng, _: f"(x+y+z+{rng.randint(1, 9)})^{{{_size(rng, 20, 9999)}}}",
}


def read_golds(path: Path) -> list[str]:
    """The gold answers of a benchmark, without boxes."""
    import pyarrow.parquet as parquet

    rows = parquet.read_table(path, columns=["reward_model"]).to_pylist()
    return [unboxed(row["reward_model"]["ground_truth"]) for row in rows]


def measure_golds(grader: Grader, golds: Sequence[str]) -> dict[str, Any]:
    """Accepted gold answers and wrongly accepted answers of other problems, by form; the slowest answer."""
    row: dict[str, Any] = {"problems": len(golds), "gold": {}, "shuffled": {}, "accepted": []}
    slowest = 0.0
    for form, template in FORMS.items():
        accepted = 0
        for gold in golds:
            started = time.perf_counter()
            accepted += grader.grade_many([(template.format(gold), gold)])[0]
            slowest = max(slowest, time.perf_counter() - started)
        row["gold"][form] = accepted
    pairs = [
        (gold, other)
        for shuffle in range(SHUFFLES)
        for gold, other in zip(golds, shuffled(golds, Random(shuffle)), strict=True)
        if not same_value(gold, other)
    ]
    row["pairs"] = len(pairs)
    for form, template in FORMS.items():
        flags = grader.grade_many([(template.format(other), gold) for gold, other in pairs])
        wrong = [list(pair) for pair, flag in zip(pairs, flags, strict=True) if flag]
        row["shuffled"][form] = len(wrong)
        row["accepted"] += [[form, *pair] for pair in wrong]
    row["slowest_gold_seconds"] = round(slowest, 2)
    return row


def measure_hostile(grader: Grader, golds: Sequence[str], count: int, seed: int) -> dict[str, Any]:
    """Times and outcomes of hostile strings, as the response or, one time in four, as the gold answer."""
    grader.take_counts()
    seconds: list[float] = []
    by_kind: dict[str, dict[str, int]] = {
        kind: {"timeouts": 0, "crashes": 0, "accepted": 0} for kind in LIGHT | HEAVY
    }
    rng = Random(seed)
    strings = hostile_strings(seed, golds)
    for _ in range(count):
        kind, text = next(strings)
        gold = rng.choice(golds)
        pair = (f"\\boxed{{{gold}}}", text) if rng.random() < 0.25 else (text, gold)
        started = time.perf_counter()
        (flag,) = grader.grade_many([pair])
        seconds.append(time.perf_counter() - started)
        timeouts, crashes = grader.take_counts()
        for key, number in (("timeouts", timeouts), ("crashes", crashes), ("accepted", int(flag))):
            by_kind[kind][key] += number
        if len(seconds) % 500 == 0:
            print(f"{len(seconds)} of {count} hostile strings", file=sys.stderr, flush=True)
    seconds.sort()
    return {
        "strings": count,
        "seed": seed,
        "median_ms": round(statistics.median(seconds) * 1e3, 1),
        "p99_ms": round(seconds[int(len(seconds) * 0.99)] * 1e3, 1),
        "max_seconds": round(seconds[-1], 1),
        **{key: sum(row[key] for row in by_kind.values()) for key in ("timeouts", "crashes", "accepted")},
        "by_kind": {kind: row for kind, row in by_kind.items() if any(row.values())},
    }


def table(content: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| benchmark | problems | gold, boxed | gold, plain text | pairs | another's answer, boxed | plain text |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in content["benchmarks"].items():
        count, pairs = row["problems"], row["pairs"]
        gold, wrong = row["gold"], row["shuffled"]
        lines.append(
            f"| {name} | {count} | {gold['boxed'] / count:.1%} | {gold['plain'] / count:.1%} | {pairs} "
            f"| {wrong['boxed'] / pairs:.2%} | {wrong['plain'] / pairs:.2%} |"
        )
    hostile = content["hostile"]
    lines += [
        "",
        f"{hostile['strings']:,} hostile strings: median {hostile['median_ms']} ms, 99 % below {hostile['p99_ms']} ms, "
        f"at most {hostile['max_seconds']} s; {hostile['timeouts']} stopped by the time limit, {hostile['crashes']} "
        f"ended the worker otherwise, {hostile['accepted']} were accepted.",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="?", metavar="DATA")
    parser.add_argument("output", type=Path, metavar="RESULTS")
    parser.add_argument("--table", action="store_true", help="only print the table of a results file")
    parser.add_argument("--strings", type=int, default=10_000, help="hostile strings")
    parser.add_argument("--seed", type=int, default=0, help="of the hostile strings")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.output.read_text())))
        return 0
    if options.data is None:
        parser.error("DATA is needed to measure")
    content: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "command": f"benchmarks/grader_rates.py DATA RESULTS --strings {options.strings} --seed {options.seed}",
        "benchmarks": {},
    }
    everything: list[str] = []
    with Grader() as grader:
        for name in BENCHMARKS:
            golds = read_golds(options.data / f"{name}.parquet")
            everything += golds
            row = measure_golds(grader, golds)
            row["timeouts"], row["crashes"] = grader.take_counts()
            content["benchmarks"][name] = row
            print(
                name,
                {key: value for key, value in row.items() if key != "accepted"},
                file=sys.stderr,
                flush=True,
            )
        content["hostile"] = measure_hostile(grader, everything, options.strings, options.seed)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
