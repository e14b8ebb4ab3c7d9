from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_fns.literals import read_literal, same_number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("-7", -7),
        ("+7", 7),
        ("- 7", -7),
        ("−7", -7),  # U+2212
        ("007", 7),
        ("7.", 7),
        ("7.50", Fraction(15, 2)),
        (".5", Fraction(1, 2)),
        ("-.35625", Fraction(-57, 160)),
        ("1,234", 1234),
        ("1,234,567.8", Fraction(12345678, 10)),
        ("1{,}234", 1234),
        (r"10,\!080", 10080),
        (r"12\,345", 12345),
        ("3/4", Fraction(3, 4)),
        ("-3 / 4", Fraction(-3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"-\frac{3}{4}", Fraction(-3, 4)),
        (r"\frac{-3}{4}", Fraction(-3, 4)),
        (r"\dfrac{3}{4}", Fraction(3, 4)),
        (r"\tfrac34", Fraction(3, 4)),
        (r"\frac 3 4", Fraction(3, 4)),
        (r"\frac{1,001}{2}", Fraction(1001, 2)),
        (r"1\frac{4}{5}", Fraction(9, 5)),
        (r"-1 \frac{4}{5}", Fraction(-9, 5)),
        ("x = 7", 7),
        ("x_1=7", 7),
        (r"\theta=90^\circ", 90),
        (r"\$5", 5),
        ("$5", 5),
        ("-$5", -5),
        (r"\$-5", -5),
        ("€5", 5),
        ("$7$", 7),
        ("$$7$$", 7),
        (r"\(7\)", 7),
        (r"\[7\]", 7),
        ("{7}", 7),
        ("**7**", 7),
        (r"\text{7}", 7),
        (r"\mathbf{7}", 7),
        (r"\displaystyle 7", 7),
        ("7 dollars", 7),
        ("7 cm", 7),
        ("60 miles per hour", 60),
        (r"7\text{ cm}", 7),
        (r"7\,\text{cm}^2", 7),
        (r"15\mbox{ cm}^2", 15),
        (r"5.4 \text{ cents}", Fraction(27, 5)),
        (r"\frac{270}7\text{ degrees}", Fraction(270, 7)),
        (r"90^\circ", 90),
        (r"90^{\circ}", 90),
        ("90°", 90),
        (r"50\%", 50),
        ("50%", 50),
    ],
)
def test_literal_is_read_with_its_exact_value(text, value):
    literal = read_literal(text)
    assert literal is not None and literal.simplest
    assert literal.value == value


@pytest.mark.parametrize("text", ["14/2", "7/1", r"\frac{6}{8}", r"-\frac{92}{524}", "0/5", r"1\frac{2}{4}"])
def test_fraction_that_can_be_reduced_is_not_simplest(text):
    literal = read_literal(text)
    assert literal is not None and not literal.simplest


@pytest.mark.parametrize(
    "text",
    [
        "",
        "seven",
        "4+3",
        "4 + 3",
        "14 - 7",
        r"7 \cdot 1",
        "(7)",
        "-(-7)",
        "--7",
        "+-7",
        r"-\frac{-3}{4}",
        r"\frac{3}{-4}",
        r"\frac{1.5}{2}",
        r"1\frac{5}{4}",
        "3/4/5",
        "7/0",
        r"\frac{7}{0}",
        r"\sqrt{49}",
        "7^1",
        "7!",
        "7e0",
        r"7 \times 10^0",
        "0x7",
        "٧",
        "7x",
        "7 x",
        "7i",
        r"7\pi",
        "7 pi",
        "7, 8",
        "7,8",
        "1,23",
        "1,2345",
        "7 8",
        "7 or 8",
        "7 or eight",
        r"7\text{ or }8",
        r"7\text{ or }",
        r"7\text{ = 4 + 3}",
        r"\text{not }7",
        "7 million",
        r"7\text{ thousand}",
        "7k",
        r"7\text{k}",
        "7 dozen",
        "x = 4 + 3",
        "4 + 3 = 7",
        "x = y = 7",
        "f(2) = 7",
        r"u=\frac{3044-4}{32}",
        r"\approx 7",
        r"7 \pm 0",
        "7?",
        "7" + "\\text{ " + "very " * 20 + "long}",
    ],
)
def test_what_is_more_than_one_literal_is_no_number(text):
    assert read_literal(text) is None


@given(st.fractions(max_denominator=10_000))
def test_written_fraction_reads_back_exactly_and_is_simplest(value):
    top, bottom = value.numerator, value.denominator
    sign = "-" if top < 0 else ""
    forms = [f"{top}"] if bottom == 1 else [f"{top}/{bottom}", f"{sign}\\frac{{{abs(top)}}}{{{bottom}}}"]
    for form in forms:
        literal = read_literal(form)
        assert literal is not None and literal.value == value and literal.simplest


@given(st.fractions(max_denominator=1000), st.integers(2, 1000))
def test_expanded_fraction_has_the_value_but_is_never_simplest(value, factor):
    literal = read_literal(f"{value.numerator * factor}/{value.denominator * factor}")
    assert literal is not None and literal.value == value and not literal.simplest


@given(st.integers(-(10**15), 10**15), st.integers(0, 10**6 - 1))
def test_grouped_decimal_reads_back_exactly(whole, decimals):
    literal = read_literal(f"{whole:,}.{decimals:06d}")
    assert literal is not None
    assert literal.value == whole + Fraction(decimals, 10**6) * (-1 if f"{whole}".startswith("-") else 1)


@pytest.mark.parametrize(
    ("gold", "answer", "same"),
    [
        ("0.75", r"\frac{3}{4}", True),
        (r"50\%", "50", True),
        (r"50\%", "0.5", True),
        ("0.5", r"50\%", True),
        ("50", "50%", True),
        (r"50\%", r"50 \%", True),
        (r"50\%", r"0.5\%", False),
        (r"50\%", "5000", False),
        ("x = 7", "7", True),
        ("7", "x = 7", True),
        ("x = 7", "y = 7", False),
        ("x_{1} = 7", "x_1 = 7", True),
        (r"\frac{1}{3}", "0.333333", False),
        (r"7\text{ cm}", r"7\text{ m}", True),
    ],
)
def test_numbers_are_compared_exactly_and_units_are_not(gold, answer, same):
    first, second = read_literal(gold), read_literal(answer)
    assert first is not None and second is not None
    assert same_number(first, second) is same
