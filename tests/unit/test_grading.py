"""Answers that are right, and answers that are wrong."""

import pytest
import sympy.core.random

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
    (r"\boxed{15}", r"15\mbox{ cm}^2"),
    (r"\boxed{15 \text{ cm}^2}", "15"),
    (r"\boxed{12.5\%}", r"12.5\%"),
    (r"\boxed{[1, 2)}", r"\left[1,2\right)"),
    (r"\boxed{2 > x}", "x<2"),
    (r"\boxed{\begin{pmatrix} 0.2 \\ -3.6 \end{pmatrix}}", r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}"),
    # As plain text.
    (r"The answer is \left( 3, \frac{\pi}{2} \right).", r"\left( 3, \frac{\pi}{2} \right)"),
    ("**Answer:** 3x + 1\nI hope it helps.", "1+3x"),
    ("The answer is 5. No, the answer is 6 apples.", "6"),
    ("Adding both,\n\n\\frac{e^{-2t}}{15}", "e^{-2 t}/15"),
    # What gold answers of benchmarks need to be read (`_REWRITTEN`), beside an answer written in another way.
    (r"\boxed{E_2, E_1}", "E_{1},E_{2}"),
    (r"\boxed{\frac{2E_2 + E_1}{3}}", r"\frac{1}{3} E_{1}+\frac{2}{3} E_{2}"),
    (r"\boxed{\frac{M^6 L_{\odot}}{M_{\odot}^6}}", r"\frac{L_{\odot}}{M_{\odot}^{6}} M^{6}"),
    (r"\boxed{m_{\max} = n^2 - (n + 1)}", r"$m_{\max }=n^{2}-n-1$"),
    (r"\boxed{-\frac{1}{3}}", "-1./3"),
    (r"\boxed{\arcsin(\frac{10}{13})}", "np.arcsin(10/13)"),
    (r"\boxed{\{1\} \cup (-\infty, 0)}", r"$(-\infty, 0) \cup\{1\}$."),
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
    (r"\boxed{2}", r"\hbar \omega(v+1 / 2)-\frac{E_{0}^{2} e^{2}}{2 m \omega^{2}}"),  # nor its last one
    (r"\boxed{2/3}", r"\frac{1}{3} E_{1}+\frac{2}{3} E_{2}"),
    (r"\boxed{\odot 7}", "7"),  # cannot be read
    (r"\boxed{(1, 2)}", "[1, 2]"),
    (r"\boxed{E_1}", "E_{2}"),
    ("The answer is 5. No, the answer is 6.", "5"),
    ("\\boxed{" + "(" * 13 + "7" + ")" * 13 + "}", "7"),  # too deep to be an answer
    ("\\boxed{" + "1+" * 300 + "0}", "300"),  # right, were it not too long to be an answer
]


@pytest.mark.parametrize(("response", "answer"), RIGHT)
def test_right(response: str, answer: str) -> None:
    assert grade(response, answer) is True


@pytest.mark.parametrize(("response", "answer"), WRONG)
def test_wrong(response: str, answer: str) -> None:
    assert grade(response, answer) is False


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


def test_verdicts_do_not_depend_on_what_came_before() -> None:
    """sympy compares at random points, which must be the same ones every time."""
    pair = (r"\boxed{\sin(2x) + 1}", r"2 \sin(x) \cos(x) + 1")
    first = grade(*pair)
    drawn = sympy.core.random.random()
    sympy.core.random.seed(7)
    assert (grade(*pair), sympy.core.random.random()) == (first, drawn)
    assert first is True
