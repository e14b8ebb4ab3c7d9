r"""Number literals: what a numeric answer looks like once nothing is left to compute.

A literal is, in this order and with nothing else around it:

1. at most one label of one symbol, `x =`;
2. at most one sign and one currency, `-`, `+`, `\$`, `$`;
3. an integer (`7`, `1,234`, `1{,}234`, `1,\!234`, `1\,234`), a decimal (`0.75`, `.5`), a fraction of integers (`3/4`,
   `\frac{3}{4}`, `\dfrac`, `\tfrac`, `\frac34`) or an integer with a proper fraction (`1\frac{4}{5}`);
4. at most one unit: `\%`, `^\circ`, `\text{ cm}^2`, or plain words after a space, `18 dollars`. Units are dropped, not
   compared. Words that change the value or hedge it (`million`, `dozen`, `or`) are no units.

Around it may stand what only sets type: `$...$`, braces, `\text{...}`, `\mathbf{...}`, `**...**`, a full stop.
"""

import re
from fractions import Fraction
from math import gcd
from typing import NamedTuple


class NumberLiteral(NamedTuple):
    """A number as it was written."""

    value: Fraction
    simplest: bool
    """False for a fraction that can be reduced or has denominator 1, such as 14/2, 6/8 and 7/1."""
    percent: bool
    label: str
    """The x of `x = 7`, "" without one."""


_WRAPPED = re.compile(
    r"\\(?:text|textbf|textrm|mathrm|mathbf|mathit|mbox)\s*\{([^{}]*)\}"
    r"|\\\((.*)\\\)|\\\[(.*)\\\]|\{(.*)\}|\$\$?([^$]*)\$\$?|\*\*(.*)\*\*",
    re.DOTALL,
)
_SPACING = re.compile(r"\\[!;:> ]|\\q?quad(?![A-Za-z])|\\displaystyle(?![A-Za-z])|\\(?:left|right)(?![A-Za-z])|~")
_COMMA = re.compile(r"\{,\}|,\\!|(?<=[0-9])\\,(?=[0-9]{3})")

_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_LITERAL = re.compile(
    rf"""
    (?: (?P<label> [A-Za-z] | \\[A-Za-z]+ ) (?P<index> _\{{?\w{{1,8}}\}}? )? \s* = \s* )?
    (?P<sign> [-+] )? \s* (?: \\?\$ | [€£¥] )? \s* (?P<late_sign> [-+] )?
    (?:
        (?P<whole> {_INTEGER} )? \s*
        \\[dtc]?frac \s*
        (?: \{{ \s* (?P<top_sign> - )? \s* (?P<top> {_INTEGER} ) \s* \}} | (?P<top_digit> [0-9] ) ) \s*
        (?: \{{ \s* (?P<bottom> {_INTEGER} ) \s* \}} | (?P<bottom_digit> [0-9] ) )
      | (?P<slash_top> {_INTEGER} ) \s* / \s* (?P<slash_bottom> {_INTEGER} )
      | (?P<decimal> {_INTEGER} (?: \.[0-9]* )? | \.[0-9]+ )
    )
    (?P<unit> .* )
    """,
    re.VERBOSE | re.DOTALL,
)
_UNIT = re.compile(
    r"""
    \s* (?:
        (?P<percent> \\?% )
      | \^ \s* \{? \s* \\circ \s* \}? | \\degree | °
      | (?: \\,|\s )* \\(?:text|textrm|textbf|textit|mathrm|mbox) \s* \{ (?P<text> [^{}]* ) \} (?: \^ \{? [23] \}? )?
      | (?: \\,|\s )+ (?P<words> [A-Za-z][A-Za-z .'/-]* ) (?: \^ \{? [23] \}? )?
      | \\?\$ | [€£¥¢]
    )?
    """,
    re.VERBOSE,
)
_LONGEST_UNIT = 40
# a symbol after a number is a factor ("7 x"): a unit outside \text has three letters or is one of these
_SHORT_UNIT = re.compile(r"cm|mm|km|kg|mg|m[lL]|c[lL]|ft|in|yd|mi|lb|oz|hr|cc|ms|ns")
_NO_UNIT = re.compile(
    r"(?i:or|and|not|nor|but|to|plus|minus|times|over|by|mod|modulo|half|halves|thirds|tenths|hundredths|thousandths"
    r"|hundred|thousand|million|billion|trillion|dozens?|score|pi|tau|phi|sqrt|squared|cubed|factorial"
    r"|if|then|than|is|equals|approximately|sin|cos|tan|log|exp)|k|K|M|B|bn|mn"
)


def read_literal(text: str) -> NumberLiteral | None:
    """The number that a string is, or None when it is anything more, or less, than one number literal.

    Args:
        text: an answer or a gold, at most a few hundred characters.

    The value is exact, so 0.333 is not 1/3. `14/2` is read, with `simplest` False, and `4+3` is not.
    """
    match = _LITERAL.fullmatch(strip_setting(text))
    if match is None:
        return None
    unit = _UNIT.fullmatch(match["unit"])
    if unit is None or not _is_unit(unit):
        return None
    sign, late_sign, top_sign = match["sign"], match["late_sign"], match["top_sign"]
    if (sign and late_sign) or (top_sign and (sign or late_sign or match["whole"])):
        return None
    fraction = _read_fraction(match)
    if fraction is None:
        return None
    value, simplest = fraction
    if "-" in (sign, late_sign, top_sign):
        value = -value
    label = (match["label"] or "") + (match["index"] or "").translate({ord("{"): None, ord("}"): None})
    return NumberLiteral(value, simplest, unit["percent"] is not None, label)


def same_number(gold: NumberLiteral, answer: NumberLiteral) -> bool:
    r"""Whether two literals have the same value.

    A percent sign on one side only may be a unit or a factor: `50\%` is the same as 50 and as 0.5, as for math-verify.
    Labels must agree where both have one.
    """
    if gold.label and answer.label and gold.label != answer.label:
        return False
    if gold.value == answer.value:
        return True
    if gold.percent == answer.percent:
        return False
    return gold.value / 100 == answer.value if gold.percent else gold.value == answer.value / 100


def strip_setting(text: str) -> str:
    """The text without what only sets type around it: delimiters, font commands, spacing commands, a full stop."""
    text = _COMMA.sub(",", text.replace("−", "-"))
    # single spaces also bound what the many \s* of a literal can try
    text = " ".join(_SPACING.sub(" ", text).split()).removesuffix(".").strip()
    for _ in range(4):
        match = _WRAPPED.fullmatch(text)
        if match is None:
            break
        text = next(inside for inside in match.groups() if inside is not None).strip().removesuffix(".").strip()
    return text


def _is_unit(unit: re.Match[str]) -> bool:
    words = (unit["text"] or unit["words"] or "").split()
    if sum(map(len, words)) > _LONGEST_UNIT:
        return False
    if unit["words"] and len(words[0]) < 3 and not _SHORT_UNIT.fullmatch(words[0]):
        return False
    return all(re.fullmatch(r"[A-Za-z.'/-]+", word) and not _NO_UNIT.fullmatch(word.strip(".'/-")) for word in words)


def _read_fraction(match: re.Match[str]) -> tuple[Fraction, bool] | None:
    """Value without sign, and whether it is in lowest terms; None for a division by 0 or an improper mixed number."""
    if match["decimal"]:
        return Fraction(match["decimal"].replace(",", "")), True
    top = _integer(match["top"] or match["top_digit"] or match["slash_top"])
    bottom = _integer(match["bottom"] or match["bottom_digit"] or match["slash_bottom"])
    if bottom == 0:
        return None
    simplest = bottom > 1 and gcd(top, bottom) == 1
    if match["whole"] is None:
        return Fraction(top, bottom), simplest
    if top >= bottom:
        return None
    return _integer(match["whole"]) + Fraction(top, bottom), simplest


def _integer(digits: str) -> int:
    return int(digits.replace(",", ""))
