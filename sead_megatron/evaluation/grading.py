"""Is the final answer of a response the gold answer? math-verify decides; this file chooses what it sees.

Nothing here limits time or memory, and model output can ask for any amount of both: `grade` runs in a worker process
(`grader.Grader`).
"""

import functools
import logging
import re

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from sympy.core.random import seed

# math-verify warns of every formula that it cannot read, and that nobody limits its time.
logging.getLogger("math_verify").setLevel(logging.ERROR)

# A longer "answer" is degenerate text (repetition, nested brackets), and parsing it costs seconds: it is
# wrong unread.
MAX_ANSWER_CHARACTERS = 500
# Brackets within brackets; the deepest gold answer of six benchmarks has 4, and parsing slows down exponentially.
MAX_DEPTH = 12
# Without a box the answer is looked for at the end only: math-verify takes the last number of what it is
# given.
TAIL_CHARACTERS = 500

# A box's opening, any other backslash and what it applies to (\\{ is a printed brace), a brace.
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
# What announces an answer in plain words, up to where the answer begins.
_ANNOUNCED = re.compile(r"\banswer(?:\s+is|\s*:)(?:\s*:)?\s*", re.IGNORECASE)
# What math-verify 0.9 cannot read, or reads as something else, in gold answers of the benchmarks of docs/grading.md.
_REWRITTEN = (
    # E is Euler's number and takes no index: E_{1},E_{2}.
    (re.compile(r"(?<![A-Za-z\\])E(?=_)"), r"\\epsilon"),
    # Operators as an index: M_{\odot}, m_{\max }.
    (re.compile(r"_\{\s*\\odot\s*\}"), "_{sun}"),
    (re.compile(r"_\{\s*\\(max|min)\s*\}"), r"_{\1}"),
    # Python: -1./3, np.arcsin(10/13).
    (re.compile(r"(?<=\d)\.(?=\s*[-+*/)])"), ""),
    (re.compile(r"\bnp\.(?=[a-z])"), r"\\"),
    # A full stop.
    (re.compile(r"\.\s*$"), ""),
)
# In a box everything is the answer: what cannot be parsed is compared as text, not by a number that occurs in it.
_IN_BOX = (LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False),)
_IN_TEXT = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())


def boxed_answers(text: str) -> list[str]:
    r"""Contents of the outermost `\boxed{...}` of `text`, in order.

    A box that never closes, or that holds more than `MAX_ANSWER_CHARACTERS`, is none. One pass over the text.
    """
    opened: list[
        int | None
    ] = []  # for each brace that is open: where the content of its box starts, if it is one
    closed: list[tuple[int, int]] = []
    for brace in _BRACES.finditer(text):
        if brace[0] == "}":
            start = opened.pop() if opened else None
            if start is not None and brace.start() - start <= MAX_ANSWER_CHARACTERS:
                while closed and closed[-1][0] > start:
                    closed.pop()  # it lies inside
                closed.append((start, brace.start()))
        elif brace[0].endswith("{") and brace[0] != r"\{":
            opened.append(None if brace[0] == "{" else brace.end())
    return [text[start:end].strip() for start, end in closed]


def stated_answer(text: str) -> str:
    r"""What a text without a box ends with: the rest of the line after its last "answer is" or "answer:", or its last
    line; without emphasis around it."""
    announced = list(_ANNOUNCED.finditer(text))
    if announced:
        stated = text[announced[-1].end() :].lstrip("* \n").partition("\n")[0]
    else:
        stated = text.rstrip().rpartition("\n")[2]
    return stated.strip("* \n\r\t")


def grade(response: str, answer: str) -> bool:
    r"""Whether the final answer of `response` equals the gold `answer`.

    The last `\boxed{...}` of the response is its answer. If that is not the gold answer and there are
    several boxes, they are also read together, as math-verify does, for gold answers that are sets. A
    response without a box is judged by its last `TAIL_CHARACTERS` characters: by what they state as the answer
    (`stated_answer`), read as if it were boxed, then by their last formula or number.
    The gold answer is a number or LaTeX, boxed or not: `\boxed{204}`, `70`, `\left(3, \frac{\pi}{2}\right)`.

    The same pair gives the same verdict in every process with one PYTHONHASHSEED.
    """
    seed(0)  # sympy compares at random points
    gold = _parse_gold(answer.strip())
    if not gold:
        return False
    boxes = boxed_answers(response)
    if not boxes:
        tail = response[-TAIL_CHARACTERS:].strip()
        return _agree(gold, _parse_box(stated_answer(tail))) or _agree(gold, _parse(tail, _IN_TEXT))
    if _agree(gold, _parse_box(boxes[-1])):
        return True
    together = " and ".join(f"\\boxed{{{_rewritten(box)}}}" for box in dict.fromkeys(boxes))
    return (
        len(set(boxes)) > 1
        and len(together) <= MAX_ANSWER_CHARACTERS
        and _agree(gold, _parse(together, _IN_BOX))
    )


def warm_up() -> None:
    """Fills the tables of the LaTeX parser, which build up at the first formulas of a process, for seconds."""
    for answer in (
        r"\frac{1}{2}",
        r"\left( 3, \frac{\pi}{2} \right)",
        r"\{1, 2\}",
        "x^2 + 1",
        r"[0, \sqrt{2})",
    ):
        grade(f"\\boxed{{{answer}}}", answer)


def _agree(gold: tuple[object, ...], answer: list[object]) -> bool:
    return bool(verify(list(gold), answer, timeout_seconds=None))


def _parse(text: str, extraction: tuple[object, ...]) -> list[object]:
    if not text or _depth(text) > MAX_DEPTH:
        return []
    return list(parse(text, extraction_config=extraction, parsing_timeout=None))


def _depth(text: str) -> int:
    deepest = depth = 0
    for character in text:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth = max(0, depth - 1)
    return deepest


def _parse_box(content: str) -> list[object]:
    r"""The content as LaTeX, which it is not taken for elsewhere: `(3, \frac{\pi}{2})` would be read as a number, 3."""
    return _parse(f"\\boxed{{{_rewritten(content)}}}" if content else "", _IN_BOX)


def _rewritten(formula: str) -> str:
    for pattern, replacement in _REWRITTEN:
        formula = pattern.sub(replacement, formula)
    return formula


@functools.lru_cache(maxsize=4096)
def _parse_gold(gold: str) -> tuple[object, ...]:
    if not gold or len(gold) > MAX_ANSWER_CHARACTERS:
        return ()
    boxes = boxed_answers(gold)
    together = " and ".join(f"\\boxed{{{_rewritten(box)}}}" for box in dict.fromkeys(boxes))
    return tuple(_parse(together, _IN_BOX) if boxes else _parse_box(gold))
