"""Finds rows that ask the same question: equal up to typesetting, or nearly equal with the same numbers and answer.

Near duplicates are found exactly, not by hashing: of two sets of shingles with Jaccard similarity >= t, each in one
global order, the first |x| - ceil(t |x|) + 1 of either share at least one (prefix filter; Chaudhuri, Ganti and Kaushik,
ICDE 2006; Bayardo, Ma and Srikant, WWW 2007).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from sead_megatron.data.preparation.text import answer_key, numbers

SHINGLE = 3


@dataclass(frozen=True)
class Problem:
    """A problem as canonical tokens (`text.canonical_tokens`), without wrapper, and its gold answer."""

    tokens: tuple[str, ...]
    answer: str | None


@dataclass(frozen=True)
class Near:
    """Two problems by their indices, `first` < `second`, and the Jaccard similarity of their shingles."""

    first: int
    second: int
    similarity: float


@dataclass
class Duplicates:
    """What was found.

    `same`: for each group of two or more problems with equal tokens its indices, ascending. `near`: a problem and the
    earlier one it nearly equals, which itself is no duplicate. `lookalikes`: the same, but the answers differ; they are
    no duplicates. Indices of a group are represented by its first one in `near` and `lookalikes`.
    """

    same: list[list[int]] = field(default_factory=list)
    near: list[Near] = field(default_factory=list)
    lookalikes: list[Near] = field(default_factory=list)

    def leaders(self, count: int) -> list[int]:
        """For each of `count` problems the first one of those that it is a duplicate of, or itself."""
        leaders = list(range(count))
        for group in self.same:
            for index in group:
                leaders[index] = group[0]
        for near in self.near:
            leaders[near.second] = near.first
        return [leaders[leader] for leader in leaders]  # equal to one that nearly equals a third


def answers_differ(answers: Sequence[str | None]) -> bool:
    """Whether two of the gold answers are written differently; None is no answer and differs from none."""
    return len({answer_key(answer) for answer in answers if answer is not None}) > 1


def find_duplicates(
    problems: Sequence[Problem], threshold: float, advance: Callable[[], object] = lambda: None
) -> Duplicates:
    """All duplicates among `problems`, in their order.

    Two problems nearly equal each other when the Jaccard similarity of their sets of `SHINGLE` consecutive tokens is at
    least `threshold` and they hold the same numbers, each as often. Otherwise problems of one template, which differ in
    a number only, would be alike. With different answers they are `lookalikes`. A group of equal tokens whose answers
    differ takes no part. Each later problem is compared with earlier ones that are no near duplicates themselves and
    goes to the most similar, the earliest of these. `threshold` 0 looks for equal tokens only. `advance` is called
    once for each distinct problem.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, problem in enumerate(problems):
        groups.setdefault(problem.tokens, []).append(index)
    found = Duplicates([group for group in groups.values() if len(group) > 1])
    if threshold:
        distinct = [
            group[0] for group in groups.values() if not answers_differ([problems[i].answer for i in group])
        ]
        _find_near(problems, distinct, Fraction(str(threshold)), found, advance)
    return found


def _find_near(
    problems: Sequence[Problem],
    distinct: Sequence[int],
    threshold: Fraction,
    found: Duplicates,
    advance: Callable[[], object],
) -> None:
    shingles = {index: _shingles(problems[index].tokens) for index in distinct}
    frequency = Counter(shingle for index in distinct for shingle in shingles[index])
    postings: defaultdict[tuple[object, tuple[str, ...]], list[int]] = defaultdict(list)
    for index in distinct:
        advance()
        own = shingles[index]
        # Rare ones first: short posting lists. The shingle itself breaks ties: sets have no order of their own.
        ordered = sorted(own, key=lambda shingle: (frequency[shingle], shingle))
        prefix = ordered[: len(own) - math.ceil(threshold * len(own)) + 1]
        same_numbers = frozenset(numbers(problems[index].tokens).items())
        keys = [(same_numbers, shingle) for shingle in prefix]
        best: Near | None = None
        for other in sorted({other for key in keys for other in postings[key]}):
            common = len(own & shingles[other])
            union = len(own) + len(shingles[other]) - common
            if common < threshold * union:
                continue
            near = Near(other, index, common / union)
            if answers_differ([problems[other].answer, problems[index].answer]):
                found.lookalikes.append(near)
            elif best is None or near.similarity > best.similarity:
                best = near
        if best is not None:
            found.near.append(best)
        else:
            for key in keys:
                postings[key].append(index)


def _shingles(tokens: tuple[str, ...]) -> frozenset[tuple[str, ...]]:
    """Every run of `SHINGLE` tokens; all of the tokens where there are fewer."""
    return frozenset(tokens[i : i + SHINGLE] for i in range(max(1, len(tokens) - SHINGLE + 1)))
