import doctest
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_fns import simplest_form
from reward_fns.simplest_form import equality_verdict, is_worth_computing, simplest_form_verdict


def test_example_of_the_docstring_holds():
    assert doctest.testmod(simplest_form).failed == 0


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("7", "7"),
        ("1080", "1,080"),
        (r"\frac{3}{4}", "0.75"),
        (r"\frac{6}{8}", r"\frac{3}{4}"),
        (r"\frac{6}{8}", r"\dfrac{6}{8}"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        (r"\dfrac{\pi}{2}", r"\frac{\pi}{2}"),
        ("x^{2}+1", "x^2 + 1"),
        (r"\pi r^2", r"\pi  r^{2}"),
        ("4210_{5}", "4210_5"),
        (r"\text{(C)}", "C"),
        ("(A)", r"\text{A}"),
        (r"\text{Evelyn}", "Evelyn"),
        ("Tuesday", r"\text{tuesday}"),
        ("No solution", "no  solution"),
        ("no", "No"),
        ("6:30", "6:30"),
    ],
)
def test_right_answers_need_no_computer_algebra(gold, answer):
    assert simplest_form_verdict(gold, answer) is True


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (r"\text{Evelyn}", "Evenly"),
        ("Evelyn", "Evelyn or Carla"),
        ("no", "on"),
        (r"3\sqrt{13}", r"\sqrt{36+81}"),
        (r"3\sqrt{13}", r"\sqrt{117}"),
        (r"\frac{\sqrt{3}}{2}", r"\sin 60^\circ"),
        (r"2\ln 2", r"\ln(2^2)"),
        ("(3, 4)", "(3, 16/4)"),
        ("(3, 4)", "(3, 1+3)"),
        (r"\{1, 2\}", r"\{1, \sqrt{4}\}"),
        ("2x", r"\frac{14}{7}x"),
        (r"\frac{\pi}{2}", r"\frac{2\pi}{4}"),
        (r"\frac{\pi}{2}", r"2\pi/4"),
        (r"\frac{\sqrt{3}}{2}", r"\frac{2\sqrt{3}}{4}"),
        (r"\frac{\pi}{2}", r"\frac{\pi}{2}+0"),
        ("2^{10}", "1023+1"),
        ("p - q", "p - q + 0 + 0 + 0"),
        ("x", "x+0"),
    ],
)
def test_unfinished_long_and_wrong_answers_need_no_computer_algebra(gold, answer):
    assert simplest_form_verdict(gold, answer) is False


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("p - q", "-q + p"),
        ("6 - 5i", "-5i + 6"),
        ("(x-1)(x+1)", "x^2-1"),
        ("x^2-1", "(x-1)(x+1)"),
        ("-2, 1", "1, -2"),
        (r"\pi/2", r"\frac{\pi}{2}"),
        (r"\frac{\pi-2}{2}", r"\frac{\pi}{2}-1"),
        (r"\sqrt{16-x^2}", r"\sqrt{-x^2+16}"),
        (r"\sqrt{-x^2+16}", r"\sqrt{16-x^2}"),
        (r"\frac{36}{x}", "36/x"),
        (r"2+\frac{36}{x}", r"\frac{36}{x}+2"),
        (r"2\ln 2", r"\ln 4"),
        ("2^{10}", "1024"),
        (r"90^\circ, 30^\circ", r"30^\circ, 90^\circ"),
        (r"\begin{pmatrix} 1/3 \\ 2 \end{pmatrix}", r"\begin{pmatrix} \frac{1}{3} \\ 2 \end{pmatrix}"),
    ],
)
def test_finished_expressions_are_left_to_computer_algebra(gold, answer):
    assert simplest_form_verdict(gold, answer) is None


@pytest.mark.parametrize(
    ("gold", "answer", "verdict"),
    [
        ("7", "7", True),
        ("7", "8", False),
        ("7", "7.0", True),
        ("7", "4+3", None),
        (r"\frac{3}{4}", "6/8", True),
        (r"\frac{1}{3}", "0.333333", None),
        ("p - q", "p-q", True),
        ("p - q", "-q + p", None),
        ("7", "9^{9^9}", False),
        ("7", "7" * 513, False),
    ],
)
def test_without_simplest_form_only_clear_cases_are_decided_here(gold, answer, verdict):
    assert equality_verdict(gold, answer) is verdict


@pytest.mark.parametrize(
    "answer",
    [
        "9^{9^9}-1",
        "2^{10^{10}}-1",
        "10^{10^{10}}",
        "5^{5^{5^5}-4}",
        "(10^6)!",
        "1000000!",
        "((9!)!)!",
        r"\binom{10^9}{10^8}",
        r"\binom{1000000}{500000}",
        "2^{1000000}",
        "{" * 30 + "7" + "}" * 30,
    ],
)
def test_hopeless_computations_are_not_tried(answer):
    assert not is_worth_computing("x+1", answer)


@pytest.mark.parametrize("expression", ["e^{x^2}", "2^{2019}", "(n+1)^{10}", r"\binom{10}{3}", "x_{n}^{2}", "10!"])
def test_ordinary_expressions_are_tried(expression):
    assert is_worth_computing("x+1", expression)


def test_gold_that_is_a_tower_may_be_compared():
    assert is_worth_computing("2^{2^{2019}}+1", "1+2^{2^{2019}}")


@pytest.mark.parametrize(
    "answer",
    [
        "1" + r"\aaaa" * 100 + "!",
        r"\frac{1" + r"\aaaa" * 100 + "}{x}",
        "1" + "a" * 500 + "!",
        "x=" + " " * 500 + "y",
        "-" + r"\, " * 160 + "y",
        "7" + " " * 500 + "!",
        "7 " + "ab " * 160 + "!",
        "1,111" * 100 + "x",
        "1.1," * 120 + "+",
        "(" * 250 + "1" + ")" * 250 + "+",
        "ab " * 160 + "!",
        "^" + "{" * 250 + "1" + "}" * 250,
        "\\binom" * 70,
        r"\sqrt{" * 80,
        "1" + r"\sqrt{1}" * 60 + "!",
    ],
)
def test_regular_expressions_never_backtrack_for_long(answer):
    start = time.perf_counter()
    for gold in ("7", "p - q", r"\text{Evelyn}", answer):
        simplest_form_verdict(gold, answer)
        equality_verdict(gold, answer)
    assert time.perf_counter() - start < 1.0


@given(st.text(max_size=80))
def test_any_string_gets_a_verdict_and_a_numeric_gold_a_final_one(answer):
    assert simplest_form_verdict("7", answer) in (True, False)
    assert simplest_form_verdict("p - q", answer) in (True, False, None)
    assert equality_verdict("p - q", answer) in (True, False, None)


@given(st.text(alphabet="0123456789+-*/^().,{}\\ =!", max_size=24))
def test_only_a_plain_literal_earns_a_numeric_gold(answer):
    if simplest_form_verdict("7", answer):
        assert "".join(c for c in answer if c.isdigit()).rstrip("0").lstrip("0") == "7"
        assert not set(answer) & set("*/^!")


@given(st.text(max_size=40).filter(str.strip))
def test_every_gold_is_its_own_answer(gold):
    if simplest_form.canonical(gold):
        assert equality_verdict(gold, gold) is True
        assert simplest_form_verdict(gold, gold) is True
