"""Finds training problems that are problems of a benchmark.

A shared run of 13 words, the usual rule, does not do for mathematics: "where m and n are relatively prime positive
integers. Find m + n" is longer. What counts here is how much of the benchmark's question such runs cover, and that its
numbers are there.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from sead_megatron.data.preparation.text import numbers

# A run of tokens that more training problems have, duplicates counted once, is a phrase and not a question.
COMMON_PHRASE = 5
# A question shorter than an n-gram must occur as a whole; one shorter than this (`Simplify \sqrt{242}`) must be the
# whole problem.
SHORTEST_CONTAINED = 8


@dataclass(frozen=True)
class Rule:
    """A problem is a benchmark's question when n-grams of `ngram` tokens that they share cover at least `coverage` of
    the question's tokens, and at least the share `numbers` of the question's numbers is in the problem."""

    ngram: int = 13
    coverage: float = 0.4
    numbers: float = 0.75


@dataclass(frozen=True)
class Match:
    """The question by its index, and what part of its tokens and numbers the problem has."""

    question: int
    coverage: float
    numbers: float


def find_contaminated(
    problems: Sequence[tuple[str, ...]],
    groups: Sequence[int],
    questions: Sequence[tuple[str, ...]],
    rule: Rule,
) -> dict[int, Match]:
    """Index of each contaminated problem -> the question it covers most, the first of these.

    Problems and questions are canonical tokens (`text.canonical_tokens`), without wrappers. `groups` holds a number for
    each problem, the same for duplicates of each other (`Duplicates.leaders`).
    """
    index = _QuestionIndex(questions, rule.ngram)
    grams = [_runs(problem, rule.ngram) & index.grams.keys() for problem in problems]
    frequency = Counter(
        gram for gram, _ in {(gram, group) for own, group in zip(grams, groups, strict=True) for gram in own}
    )
    wanted = [numbers(question) for question in questions]
    found: dict[int, Match] = {}
    for number, problem in enumerate(problems):
        covered = index.covered(problem, {g for g in grams[number] if frequency[g] <= COMMON_PHRASE})
        own = numbers(problem)
        matches = [
            Match(
                question,
                tokens / len(questions[question]),
                (wanted[question] & own).total() / wanted[question].total() if wanted[question] else 1.0,
            )
            for question, tokens in sorted(covered.items())
        ]
        enough = [m for m in matches if m.coverage >= rule.coverage and m.numbers >= rule.numbers]
        if enough:
            found[number] = max(enough, key=lambda match: match.coverage)
    return found


class _QuestionIndex:
    """Where each n-gram occurs in the questions, and the questions shorter than one."""

    def __init__(self, questions: Sequence[tuple[str, ...]], ngram: int) -> None:
        self.grams: defaultdict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
        self._short: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
        self._ngram = ngram
        for number, question in enumerate(questions):
            if len(question) < ngram:
                self._short[question].append(number)
            for start in range(len(question) - ngram + 1):
                self.grams[question[start : start + ngram]].append((number, start))
        self._short_lengths = sorted({len(question) for question in self._short})

    def covered(self, problem: tuple[str, ...], grams: set[tuple[str, ...]]) -> dict[int, int]:
        """Question -> how many of its tokens these n-grams of the problem cover; all, of a short one that is in it."""
        places: defaultdict[int, set[int]] = defaultdict(set)
        for gram in grams:
            for number, start in self.grams[gram]:
                places[number].update(range(start, start + self._ngram))
        for length in self._short_lengths:
            runs = _runs(problem, length) if length >= SHORTEST_CONTAINED else {problem}
            for run in runs & self._short.keys():
                for number in self._short[run]:
                    places[number].update(range(length))
        return {number: len(tokens) for number, tokens in places.items()}


def _runs(tokens: tuple[str, ...], length: int) -> set[tuple[str, ...]]:
    return {tokens[i : i + length] for i in range(len(tokens) - length + 1)}
