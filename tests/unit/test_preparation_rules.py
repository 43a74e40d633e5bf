"""What counts as the same problem: typesetting, near duplicates against brute force, benchmark questions."""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import combinations
from string import ascii_letters

import pytest

from sead_megatron.data.preparation.contamination import COMMON_PHRASE, Match, Rule, find_contaminated
from sead_megatron.data.preparation.duplicates import Near, Problem, answers_differ, find_duplicates
from sead_megatron.data.preparation.text import answer_key, canonical_tokens


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Find $n$ such that $2^n \\leq 10{,}000$.", "find \\(n\\) such that 2^{n} ≤ 10,000"),
        ("$\\dfrac12 \\cdot x$", "\\(\\frac{1}{2} \\times x\\)"),
        ("\\left( a_{1} \\right)", "(a_1)"),
        ("ＡＢ ⋅ 3", "ab * 3"),
        ("\\begin{align*} x &= 1 \\end{align*}", "x = 1"),
        ("求 n的值", "求n 的 值."),
    ],
)
def test_typesetting_does_not_count(one: str, other: str) -> None:
    assert canonical_tokens(one) == canonical_tokens(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("$x+1$", "$x-1$"),
        ("$2^{10}$", "$210$"),
        ("12 pens", "1 2 pens"),
        ("5!", "5"),
        ("偶数", "奇数"),
        ("0.5", "5"),
    ],
)
def test_meaning_counts(one: str, other: str) -> None:
    assert canonical_tokens(one) != canonical_tokens(other)


def test_tokens() -> None:
    text = "Let $\\triangle ABC$ have $|AB| = 1{,}000$; 求 $\\df{x}{3}$的值!"
    assert canonical_tokens(text) == (
        "let", "triangle", "abc", "have", "|", "ab", "|", "=", "1000", "求", "frac", "x", "3", "的", "值", "!",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "key"),
    [
        ("34", Fraction(34)),
        ("\\boxed{-34}", Fraction(-34)),
        ("$34.0$", Fraction(34)),
        ("1/2", Fraction(1, 2)),
        ("-\\frac{2}{4}", Fraction(-1, 2)),
        ("1/0", ("1", "/", "0")),
        ("x^2", ("x", "^", "2")),
    ],
)
def test_answer_key(answer: str, key: object) -> None:
    assert answer_key(answer) == key


def test_answers_differ() -> None:
    assert answers_differ(["0.5", "1/3"]) and answers_differ(["a", "b", None])
    assert not answers_differ(["0.5", "\\frac12", None]) and not answers_differ([None, None])


def problem(text: str, answer: str | None = "1") -> Problem:
    return Problem(canonical_tokens(text), answer)


LONG = "Find the number of ordered triples of positive integers whose sum is 30 and whose product is even"


def test_duplicates() -> None:
    problems = [
        problem(LONG),
        problem("What is 1 + 1?"),
        problem(LONG.replace("Find", "Compute")),  # nearly 0
        problem(LONG.upper() + "."),  # equals 0
        problem(
            LONG.replace("Find", "Give").replace("whose sum", "that add up; the sum"), "2"
        ),  # other answer
        problem(LONG.replace("30", "31")),  # another number
        problem(LONG.replace("Find", "Compute") + "!!", None),  # nearly 0 and, more so, 2; no answer
        problem("what is $1+1$", "7"),
        problem(LONG.replace("Find", "\\text{compute}")),  # equals 2
    ]
    found = find_duplicates(problems, 0.5)
    assert found.same == [[0, 3], [1, 7], [2, 8]]
    assert [(near.first, near.second) for near in found.near] == [(0, 2), (0, 6)]
    assert [(near.first, near.second) for near in found.lookalikes] == [(0, 4)]
    assert found.leaders(9) == [0, 1, 0, 0, 4, 5, 0, 1, 0]
    # 18 words: 16 shingles each, of which one differs.
    assert found.near[0] == Near(0, 2, 15 / 17)
    assert find_duplicates(problems, 0).near == []


def test_threshold_is_exact() -> None:
    # Shingles of 7 tokens: {abc bcd cde def efg}; of the other {abc bcd cde def efx}: 4 of 6.
    pair = [Problem(tuple("abcdefg"), None), Problem(tuple("abcdefx"), None)]
    assert find_duplicates(pair, 0.66).near == [Near(0, 1, 4 / 6)]
    assert find_duplicates(pair, 0.67).near == []
    # 14 of 25 shingles, and 0.56 * 25 is 14.000000000000002 in floating point. The 11 others are rarer.
    # Many times: were ties of frequency not broken alike in both sets, every other pair would be missed.
    for name in ascii_letters:
        words = [name + letter for letter in ascii_letters[:27]]
        pair = [Problem(tuple(words), None), Problem(tuple(words[:16]), None)]
        assert find_duplicates(pair, 0.56).near == [Near(0, 1, 0.56)]


@pytest.mark.parametrize("threshold", [0.2, 0.3, 0.5, 0.7, 1.0])
def test_near_duplicates_against_brute_force(threshold: float) -> None:
    generator = random.Random(0)
    problems = []
    for _ in range(150):
        words = list(generator.choice([ascii_letters, "abbacadabra", "xyz", "ab"]))
        for _ in range(generator.randint(0, 3)):
            words[generator.randrange(len(words))] = generator.choice("abcdxyz")
        numbers = [str(generator.randint(1, 2))] if generator.random() < 0.7 else []
        problems.append(Problem((*words, *numbers), generator.choice(["1", "2", None])))
    found = find_duplicates(problems, threshold)

    def shingles(tokens: tuple[str, ...]) -> set[tuple[str, ...]]:
        return {tokens[i : i + 3] for i in range(len(tokens) - 2)} or {tokens}

    conflicted = {tokens for group in found.same for tokens in [problems[group[0]].tokens]
                  if len({problems[i].answer for i in group} - {None}) > 1}  # fmt: skip
    first = {p.tokens: i for i, p in reversed(list(enumerate(problems))) if p.tokens not in conflicted}
    near: dict[int, Near] = {}
    lookalikes = []
    for one, two in sorted(combinations(sorted(first.values()), 2), key=lambda pair: (pair[1], pair[0])):
        a, b = problems[one], problems[two]
        left, right = shingles(a.tokens), shingles(b.tokens)
        similarity = Fraction(len(left & right), len(left | right))
        same_numbers = sorted(filter(str.isdigit, a.tokens)) == sorted(filter(str.isdigit, b.tokens))
        if one in near or not same_numbers or similarity < Fraction(str(threshold)):
            continue
        if None not in (a.answer, b.answer) and a.answer != b.answer:
            lookalikes.append(Near(one, two, float(similarity)))
        elif two not in near or float(similarity) > near[two].similarity:
            near[two] = Near(one, two, float(similarity))
    assert found.near == [near[two] for two in sorted(near)]
    assert found.lookalikes == lookalikes
    assert threshold == 1.0 or (len(near) > 3 and len(lookalikes) > 3)


QUESTION = "A spider walks along 12 edges of a cube with side 7 and never turns back. How many ways end where it began?"


def contaminated(
    problems: list[str], questions: list[str], groups: list[int] | None = None, rule: Rule | None = None
) -> dict[int, Match]:
    return find_contaminated(
        [canonical_tokens(text) for text in problems],
        list(range(len(problems))) if groups is None else groups,
        [canonical_tokens(text) for text in questions],
        rule or Rule(),
    )


def test_contamination() -> None:
    tokens = len(canonical_tokens(QUESTION))
    reworded = QUESTION.replace("How many ways", "Count the walks that")
    found = contaminated(
        [
            "Find x.",
            f"Solve this: {QUESTION.upper()} Give m + n.",
            reworded,  # the 15 tokens before it are shared
            QUESTION.replace("12", "13").replace("7", "8"),  # another problem, of the same template
            "A spider walks along 12 edges of a cube with side 7, then sleeps.",  # 12 tokens are shared
        ],
        ["Which prime is even?", QUESTION],
    )
    assert found == {1: Match(1, 1.0, 1.0), 2: Match(1, 16 / tokens, 1.0)}


def test_contamination_thresholds() -> None:
    tokens = len(canonical_tokens(QUESTION))
    # All of the wording after the number is shared.
    assert contaminated([f"With 5 coins: {LONG}"], [f"With 6 coins: {LONG}"]) == {}
    assert len(contaminated([f"With 6 coins: {LONG}"], [f"With 6 notes: {LONG}"])) == 1
    one_number = QUESTION.replace("7", "8")
    rule = Rule(ngram=6, coverage=0.4, numbers=0.5)
    found = contaminated([one_number], [QUESTION], rule=rule)
    assert found == {0: Match(0, (tokens - 1) / tokens, 0.5)}
    assert contaminated([one_number], [QUESTION], rule=Rule(6, 1.0, 0.5)) == {}


def test_short_questions() -> None:
    short = "How many perfect squares are below 2023?"  # 7 tokens: only the whole problem
    medium = "How many positive perfect squares are there below 2023?"  # 9 tokens: wherever it occurs
    found = contaminated(
        [short, f"{short} Explain.", f"Think. {medium} Explain.", medium.replace("2023", "2024")],
        [short, medium],
    )
    assert found == {0: Match(0, 1.0, 1.0), 2: Match(1, 1.0, 1.0)}


def test_a_phrase_is_no_evidence() -> None:
    tail = "where m and n are relatively prime positive integers and then find the value of m + n"
    benchmark = f"It is m/n, {tail}"
    problems = [f"Problem {'abcdefgh'[i] * 3} gives m/n, {tail}" for i in range(COMMON_PHRASE + 1)]
    assert contaminated(problems, [benchmark]) == {}
    assert len(contaminated(problems[:-1], [benchmark])) == COMMON_PHRASE
    # Duplicates of each other count once: many copies do not make a question a phrase.
    assert len(contaminated(problems, [benchmark], groups=[0, 0, 2, 3, 4, 5])) == COMMON_PHRASE + 1
