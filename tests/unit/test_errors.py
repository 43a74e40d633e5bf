"""A user error is one line, whatever it is made of, and survives the way between processes."""

import pickle

from sead_megatron.errors import UserError, alternatives


def test_parts_in_order() -> None:
    error = UserError("a.b", 3, "must be 4", "use 4")
    assert str(error) == "a.b = 3: must be 4; use 4"
    assert (error.what, error.value, error.constraint, error.remedy) == ("a.b", 3, "must be 4", "use 4")


def test_values_are_shown_as_json() -> None:
    shown = [str(UserError("a", value, "b", "c")) for value in (True, "x", [1, None], {"k": 0.5}, None)]
    assert shown == [
        "a = true: b; c",
        'a = "x": b; c',
        "a = [1, null]: b; c",
        'a = {"k": 0.5}: b; c',
        "a: b; c",
    ]


def test_always_one_line() -> None:
    assert str(UserError("a", "x\ny", "first\n  second", "use\n")) == 'a = "x\\ny": first second; use'


def test_long_values_are_cut() -> None:
    assert str(UserError("a", "x" * 500, "b", "c")) == 'a = "' + "x" * 156 + "...: b; c"


def test_pickle() -> None:
    error = UserError("a", 1, "b", "c")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_alternatives() -> None:
    assert [alternatives(values) for values in ([], [1], [1, 2], [1, 2, 4])] == [
        "",
        "1",
        "1 or 2",
        "1, 2 or 4",
    ]
