"""Problems as sequences of tokens that do not depend on how they were typeset, for comparisons only."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction

# Commands that change how a formula looks and not what it says.
_LAYOUT = frozenset(
    """
    left right big bigg bigl bigr biggl biggr displaystyle textstyle limits nolimits quad qquad hspace vspace hfill
    mathrm mathbf mathit mathsf mathbb mathcal operatorname text textbf textit textrm emph rm bf it boldsymbol
    overline underline bar boxed noindent par newline hline centering
    """.split()  # noqa: SIM905 - a list of literals would be a page long
)
_SAME = {
    "dfrac": "frac",
    "tfrac": "frac",
    "cfrac": "frac",
    "df": "frac",  # in the Chinese problems of DAPO-Math-17k
    "leq": "le",
    "leqslant": "le",
    "geq": "ge",
    "geqslant": "ge",
    "neq": "ne",
    "ldots": "dots",
    "cdots": "dots",
    "dotsc": "dots",
    "dotsb": "dots",
    "dotsm": "dots",
    "times": "*",
    "cdot": "*",
    "lvert": "|",
    "rvert": "|",
    "vert": "|",
    "mid": "|",
    "lbrace": "",
    "rbrace": "",
    "gt": ">",
    "lt": "<",
}
_CHARACTERS = str.maketrans(
    {
        "−": "-", "–": "-", "—": "-", "×": "*", "⋅": "*", "·": "*", "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ",
        "°": "\\circ ", "∠": "\\angle ", "△": "\\triangle ", "π": "\\pi ", "…": "\\dots ", "∞": "\\infty ",
        "√": "\\sqrt ",
    }
)  # fmt: skip
# A thousands separator, as in 10,000 and in LaTeX's 10{,}000 and 10\,000.
_THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3})((?:(?:,|\{,\}|\\[,!]|,\\!)\d{3})+)(?!\d)")
_FRACTION_OF_DIGITS = re.compile(r"\\[dtc]?frac\s*(\d)\s*(\d)")
_TOKEN = re.compile(
    r"\\(?:begin|end)\s*\{[^{}]*\}"
    r"|\\(?P<command>[a-z]+)"
    r"|\\."  # spaces and brackets of LaTeX
    r"|(?P<number>\d+(?:\.\d+)?)"
    r"|(?P<wide>[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff])"  # no spaces between words there
    r"|(?P<word>[^\W\d_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]+)"
    r"|(?P<operator>[-+*/=<>^|!%])",
    re.DOTALL,
)


def canonical_tokens(text: str) -> tuple[str, ...]:
    r"""Words, numbers, operators and LaTeX commands of `text`, in order, in lower case.

    Dropped: spaces, punctuation, brackets, dollar signs, subscript marks, commands of layout (`\left`, `\mathrm`,
    `\quad`). Made equal: `\dfrac` and `\frac`, `\leq` and `\le` and `≤`, `\cdot` and `\times`, `10,000` and `10000`,
    full-width and other compatibility characters (NFKC). Chinese, Japanese and Korean characters are one token each.
    Two texts with equal tokens ask the same, but for brackets: `(a+b)c` and `a+bc` have equal tokens.
    """
    text = unicodedata.normalize("NFKC", text.translate(_CHARACTERS)).lower()
    text = _FRACTION_OF_DIGITS.sub(r"\\frac \1 \2", text)
    text = _THOUSANDS.sub(lambda found: found[1] + re.sub(r"\D", "", found[2]), text)
    tokens = []
    for found in _TOKEN.finditer(text):
        token = found[0]
        if found.lastgroup is None:
            continue
        if found.lastgroup == "command":
            name = found["command"]
            token = "" if name in _LAYOUT else _SAME.get(name, name)
        if token:
            tokens.append(token)
    return tuple(tokens)


def numbers(tokens: Iterable[str]) -> Counter[str]:
    """How often each number in digits is among canonical tokens."""
    return Counter(token for token in tokens if token[0].isdecimal())


def answer_key(answer: str) -> Fraction | tuple[str, ...]:
    r"""Equal for answers that are written alike (`\boxed{34}`, `$34$`, `34.0`), as a number where it is one."""
    tokens = canonical_tokens(answer)
    sign = -1 if tokens[:1] == ("-",) else 1
    match tokens[1:] if sign < 0 else tokens:
        case (number,) if number[0].isdecimal():
            return sign * Fraction(number)
        case ("frac", top, bottom) | (top, "/", bottom) if (top + bottom).isdecimal() and int(bottom):
            return sign * Fraction(int(top), int(bottom))
    return tokens
