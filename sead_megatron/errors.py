"""The one error a user can cause: it says what is wrong, with which value, what holds, and what to do."""

import json
from collections.abc import Sequence

_LONGEST_VALUE = 160


class UserError(Exception):
    """A mistake in a configuration, an input file or a command line.

    `what` is a dotted field or a file; `value` its value (None: nothing to show, for example a missing key);
    `constraint` what must hold; `remedy` what to do about it. `str()` is one line, whatever the parts hold:

        student.parallel.tensor = 3: must divide num_attention_heads (8); use 1, 2, 4 or 8

    The command line prints that line on stderr and exits with code 2, without a traceback.
    """

    def __init__(self, what: str, value: object, constraint: str, remedy: str) -> None:
        super().__init__(what, value, constraint, remedy)
        self.what = what
        self.value = value
        self.constraint = constraint
        self.remedy = remedy

    def __str__(self) -> str:
        shown = "" if self.value is None else f" = {_one_line_value(self.value)}"
        return " ".join(f"{self.what}{shown}: {self.constraint}; {self.remedy}".split())


def _one_line_value(value: object) -> str:
    """The value as JSON (true, not True; newlines escaped), cut when it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def alternatives(values: Sequence[object], last: str = "or") -> str:
    """`[1, 2, 4]` -> `1, 2 or 4`, for the remedy of an error."""
    words = [str(value) for value in values]
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} {last} {words[-1]}"
