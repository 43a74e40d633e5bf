"""Is the final answer of a response the gold answer?

math-verify decides; this file chooses what it sees and for how long. math-verify limits its time with
SIGALRM, hence `grade` belongs to the main thread of a process, and no other user of SIGALRM may be active
there.
"""

import functools
import re
import threading

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

# Seconds for one parse and for one comparison. SIGALRM counts whole seconds; honest answers take
# milliseconds.
TIMEOUT_SECONDS = 2
# A longer "answer" is degenerate text (repetition, nested brackets), and parsing it costs seconds: it is
# wrong unread.
MAX_ANSWER_CHARACTERS = 500
# Without a box the answer is looked for at the end only: math-verify takes the last number of what it is
# given.
TAIL_CHARACTERS = 500

# A box's opening, any other backslash and what it applies to (\\{ is a printed brace), a brace.
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_EXTRACTION = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())


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


def grade(response: str, answer: str) -> bool:
    r"""Whether the final answer of `response` equals the gold `answer`.

    The last `\boxed{...}` of the response is its answer. If that is not the gold answer and there are
    several boxes, they are also read together, as math-verify does, for gold answers that are sets. A
    response without a box is judged by the last formula or number of its last `TAIL_CHARACTERS` characters.
    The gold answer is a number or LaTeX, boxed or not: `\boxed{204}`, `70`, `\left(3, \frac{\pi}{2}\right)`.

    Never raises on any pair of strings; what cannot be parsed or compared in `TIMEOUT_SECONDS` each is wrong.
    Raises RuntimeError outside the main thread (see the module's docstring).
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("grade() limits its time with SIGALRM and must be called from the main thread")
    gold_text = answer.strip()
    boxes = boxed_answers(response)
    if not boxes:
        return _equal(gold_text, response[-TAIL_CHARACTERS:].strip())
    if _equal(gold_text, f"\\boxed{{{boxes[-1]}}}"):
        return True
    together = " and ".join(f"\\boxed{{{box}}}" for box in dict.fromkeys(boxes))
    return len(set(boxes)) > 1 and len(together) <= MAX_ANSWER_CHARACTERS and _equal(gold_text, together)


def _equal(gold_text: str, answer_text: str) -> bool:
    gold = _parse_gold(gold_text)
    if not gold or not answer_text:
        return False
    parsed = parse(answer_text, extraction_config=_EXTRACTION, parsing_timeout=TIMEOUT_SECONDS)
    return bool(verify(list(gold), parsed, timeout_seconds=TIMEOUT_SECONDS))


@functools.lru_cache(maxsize=4096)
def _parse_gold(gold_text: str) -> tuple[object, ...]:
    # Bare LaTeX is not recognised as LaTeX: `\left( 3, \frac{\pi}{2} \right)` would be read as its first
    # number, 3.
    if not gold_text or len(gold_text) > MAX_ANSWER_CHARACTERS:
        return ()
    text = gold_text if boxed_answers(gold_text) else f"\\boxed{{{gold_text}}}"
    return tuple(parse(text, extraction_config=_EXTRACTION, parsing_timeout=TIMEOUT_SECONDS))
