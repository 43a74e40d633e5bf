"""The token categories of the paper's Table 3, by a rule on entropies and text.

The paper defines one of them: at strategy forks "both teacher and student entropy exceed the 75th percentile"
(section 4.1). For the others it gives names only; the rule here is ours. The first category that fits is taken:

1. strategy fork: both entropies above their 75th percentile over the tokens shown;
2. reasoning transition: the token is a word that joins or turns an argument (`TRANSITIONS`);
3. computation: it has a digit, or consists of arithmetic signs;
4. deterministic syntax: it has no letter (punctuation, brackets, spaces, newlines, special tokens), or is markup,
   that is a backslash and a name;
5. other.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import compress

import numpy as np
import numpy.typing as npt

from sead_megatron.report.statistics import Floats, Tokens

FORK, TRANSITION, COMPUTATION, SYNTAX, OTHER = CATEGORIES = (
    "Strategy fork",
    "Reasoning transition",
    "Computation",
    "Deterministic syntax",
    "Other",
)
TRANSITIONS = {
    "alternatively", "also", "although", "assume", "because", "but", "case", "consider", "finally",
    "first", "given", "hence", "hmm", "however", "if", "instead", "last", "let", "maybe", "meanwhile",
    "moreover", "next", "notice", "now", "once", "otherwise", "perhaps", "recall", "second", "similarly",
    "since", "so", "suppose", "then", "therefore", "third", "though", "thus", "unless", "wait", "when",
    "whereas", "while", "yet",
}  # fmt: skip
_ARITHMETIC = re.compile(r"[-+*/=<>^%±×÷·√≤≥≠≈−∑∏∫]+")
_MARKUP = re.compile(r"\\[A-Za-z]+")


@lru_cache(maxsize=2**16)
def category_of_text(text: str) -> str:
    """The category of a token that is no strategy fork."""
    bare = text.strip()
    if bare.strip(".,;:!?").lower() in TRANSITIONS:
        return TRANSITION
    if any(letter.isdigit() for letter in bare) or _ARITHMETIC.fullmatch(bare):
        return COMPUTATION
    if _MARKUP.fullmatch(bare) or not any(letter.isalpha() for letter in bare):
        return SYNTAX
    return OTHER


def forks(tokens: Tokens) -> npt.NDArray[np.bool_]:
    """bool [N]: both entropies above their 75th percentile (linear interpolation) over the tokens that have both."""
    both = np.isfinite(tokens.student_entropy) & np.isfinite(tokens.teacher_entropy)
    if not both.any():
        return both
    high = both
    for entropy in (tokens.student_entropy, tokens.teacher_entropy):
        high = high & (np.nan_to_num(entropy, nan=-math.inf) > np.percentile(entropy[both], 75))
    return high


def categories(tokens: Tokens) -> list[str]:
    """N names of `CATEGORIES`."""
    return [
        FORK if fork else category_of_text(text)
        for text, fork in zip(tokens.texts, forks(tokens).tolist(), strict=True)
    ]


@dataclass(frozen=True)
class CategoryRow:
    """P(zone | category), and the mean KLs in nats; NaN where nothing was measured. `examples`: frequent texts."""

    name: str
    count: int
    zones: dict[str, float]
    forward_kl: float
    reverse_kl: float
    examples: list[str]


def category_table(tokens: Tokens) -> list[CategoryRow]:
    """One row a category, in the order of the rule."""
    names = np.array(categories(tokens))
    rows = []
    for name in CATEGORIES:
        inside = names == name
        count = int(inside.sum())
        shares = {
            zone: float((tokens.in_zone(zone) & inside).sum()) / count if count and tokens.zoned else math.nan
            for zone in "ABC"
        }
        frequent = [text for text, _ in Counter(compress(tokens.texts, inside.tolist())).most_common(6)]
        means = [_mean(values[inside]) for values in (tokens.forward_kl, tokens.reverse_kl)]
        rows.append(CategoryRow(name, count, shares, means[0], means[1], frequent))
    return rows


def _mean(values: Floats) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan
