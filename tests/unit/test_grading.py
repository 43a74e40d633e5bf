"""Answers that are right, answers that are wrong, and text that must never break a run."""

import threading
import time

import pytest

from sead_megatron.evaluation.grading import MAX_ANSWER_CHARACTERS, boxed_answers, grade

RIGHT = [
    (r"So the answer is \boxed{204}.", r"\boxed{204}"),
    (r"\boxed{70}", "70"),
    (r"\boxed{8}", r"Of the 9 apples \boxed{8} are left."),
    (r"\boxed{70 \text{ apples}}", "70"),
    (r"\boxed{1,234}", "1234"),
    (r"\boxed{x = 5}", "5"),
    (r"\boxed{\frac12}", "0.5"),
    (r"\boxed{\dfrac{2}{4}}", r"\frac{1}{2}"),
    (r"\boxed{(3, \pi/2)}", r"\left( 3, \frac{\pi}{2} \right)"),
    (r"\boxed{11\sqrt2}", r"11\sqrt{2}"),
    (r"\boxed{\text{Friday}}", r"\text{Friday}"),
    (r"\boxed{90}", r"90^\circ"),
    (r"\boxed{\{1, 2\}}", r"\{1,2\}"),
    (r"First \boxed{7}, no: \boxed{8}", "8"),  # the last box counts
    (r"\boxed{8}, that is \boxed{8}", "8"),
    (r"\boxed{1} and \boxed{2}", "1, 2"),  # a set given in several boxes
    ("The total is 13.", "13"),
    ("2 + 2 = 4", "4"),
    (r"so $x = \frac{3}{4}$.", r"\boxed{\frac{3}{4}}"),
]
WRONG = [
    (r"\boxed{205}", r"\boxed{204}"),
    (r"First \boxed{7}, no: \boxed{8}", "7"),
    (r"\boxed{3}", r"\left( 3, \frac{\pi}{2} \right)"),  # the gold answer is not its first number
    (r"204 is close, but \boxed{203}", "204"),  # a box beats a number in the text
    (r"\boxed{}", "70"),
    ("", "70"),
    ("", ""),
    (r"\boxed{}", ""),
    (r"\boxed{70", "71"),
    ("no number at all", "70"),
    (r"\boxed{}", r"\boxed{}"),
    ("\\boxed{" + "1+" * 300 + "0}", "300"),  # right, were it not too long to be an answer
]


@pytest.mark.parametrize(("response", "answer"), RIGHT)
def test_right(response: str, answer: str) -> None:
    assert grade(response, answer) is True


@pytest.mark.parametrize(("response", "answer"), WRONG)
def test_wrong(response: str, answer: str) -> None:
    assert grade(response, answer) is False


@pytest.mark.parametrize(
    "response",
    [
        r"\boxed{10^{10^{10}}}",
        r"\boxed{10**10**10}",
        "10^10^10",
        r"\boxed{100000000!}",
        r"\boxed{\binom{100000000}{50000000}}",
        r"\boxed{1e1000000000}",
        "\\boxed{" + "(" * 3000 + "1" + ")" * 3000 + "}",
        "\\boxed{" * 5000 + "2" + "}" * 5000,
        "\\boxed{" * 20000,
        "{" * 50000,
        "\\frac{" * 5000,
        "$" * 50001,
        "\\boxed{" + "9" * 100000 + "}",
        "9" * 100000,
        "\x00\ud800 \\boxed{\x00}",
        "\\",
        "\\boxed{\\",
    ],
    ids=lambda text: repr(text[:24]),
)
@pytest.mark.parametrize("role", ["response", "answer"])
def test_hostile_text_is_wrong_in_bounded_time(response: str, role: str) -> None:
    started = time.perf_counter()
    assert (grade(response, "1") if role == "response" else grade(r"\boxed{1}", response)) is False
    # One parse and one comparison take 2 s each; the rest is slack for a busy machine. Unguarded: minutes.
    assert time.perf_counter() - started < 15.0


def test_long_response_reads_its_end() -> None:
    filler = "Let $x=3$, so we have 4 apples. " * 3000
    assert grade(filler + r"\boxed{7}", "7")
    assert grade(filler + "The answer is 7", "7")
    assert not grade(filler, "7")


def test_boxed_answers() -> None:
    assert boxed_answers(r"\boxed{\frac{1}{2}} and \fbox{3}") == [r"\frac{1}{2}", "3"]
    assert boxed_answers(r"\boxed{a \} b}") == [r"a \} b"]
    assert boxed_answers(r"\boxed{\boxed{4}}") == [r"\boxed{4}"]
    assert boxed_answers(r"\boxed{5") == []
    assert boxed_answers(r"\boxed{5 and \boxed{6}") == ["6"]
    assert boxed_answers("\\boxed{" + "1" * (MAX_ANSWER_CHARACTERS + 1) + "}") == []


def test_refuses_other_threads() -> None:
    caught: list[Exception] = []

    def call() -> None:
        try:
            grade("1", "1")
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert "main thread" in str(caught[0])
