r"""Whether an answer is the gold in its simplest form, decided without computer algebra wherever possible.

math-verify judges equality alone, so `\boxed{4+3}` is worth as much as `\boxed{7}`; under a length objective, to
restate the question in a box is then the shortest rewarded policy. Here an answer must be finished:

1. a number (`literals.py`) is matched by a number literal of the same value, and fractions must be in lowest terms
   (unless the gold itself was written so);
2. words are matched by the same words, in any case of letters (computer algebra would take "Evelyn" for a product);
3. any other gold is matched by the same string up to white space and typesetting, or by an equivalent expression that
   has at most twice as many symbols, and no more unfinished steps of any kind (`unfinished_steps`) than the gold.
"""

import re
from math import gcd, isqrt

from reward_fns.answers import LONGEST_ANSWER
from reward_fns.literals import read_literal, same_number, strip_setting

_FRACTION_COMMAND = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_SHORT_SCRIPT = re.compile(r"([_^])\{(\w)\}")
_CHOICE = re.compile(r"\(?([A-Za-z])\)?")
_WORDS = re.compile(r"[^\W\d_]+(?:(?:[ ,.']+|-)[^\W\d_]+)*")
_LONG_WORD = re.compile(r"[^\W\d_]{3}|\\text|(?i:^no$)")  # `xy` is a product
_SYMBOL = re.compile(r"\\[A-Za-z]+|[^\s{}]")

_LITERAL_OPERATION = re.compile(
    # `x^2-1` and `6-5i` are finished: the left number is no exponent or index, the right one no coefficient
    r"(?<![\w.^\\])[0-9]+(?:[.,][0-9]+)*\)*(?:[-+*×÷]|\\(?:cdot|times|div|ast|pm)(?![A-Za-z]))[-(]*"
    r"(?=[0-9])(?![0-9.,]*[0-9.](?:[A-Za-z(^{]|\\[A-Za-z]))"
    r"|[-+]0(?![0-9.])"
)
_LITERAL_POWER = re.compile(r"(?<![\w.^])[0-9.]+\)*\^(?!\{?\\circ)")
# possessive: commands and letters can be split in exponentially many ways
_MONOMIAL = r"([0-9]+)(?:\\sqrt\{[^{}]*\}|\\[A-Za-z]++ ?|[A-Za-z])*+"
_FRACTION = re.compile(
    rf"\\frac(?:\{{{_MONOMIAL}\}}\{{([0-9]+)\}}|([0-9])([0-9]))|(?<![\w.^/)}}]){_MONOMIAL}/([0-9]+)(?![0-9.])"
)
_ROOT = re.compile(r"\\sqrt(?:\{([0-9]+)\}|([0-9]))")
_OPERATOR = re.compile(
    r"\\(?:gcd|lcm|sum|prod|int|lim|[dt]?binom|max|min|det|b?mod|pmod|lfloor|lceil"
    r"|(?:arc)?(?:sin|cos|tan|cot|sec|csc)|log|ln|exp)(?![A-Za-z])|\\operatorname|!"
)

_HOSTILE = re.compile(
    r"\^[\s{(\[]*[0-9]+[\s})\]]*\^"  # a tower of numbers, 9^{9^9}
    r"|\^[\s{(]*-?[0-9][0-9,]{4}"  # an exponent of five digits
    r"|[0-9]{4}[\s})]*!|[)}]\s*!|!\s*!"  # the factorial of a large number, of a group, of a factorial
    r"|\\[dt]?binom[^A-Za-z]{0,40}?(?:[0-9]{4}|\^)"
    r"|(?:[{(\[][^{}()\[\]]*){24}"  # 24 brackets opened and none closed
)


def simplest_form_verdict(gold: str, answer: str) -> bool | None:
    r"""Whether `answer` is `gold` in simplest form; None when only computer algebra can tell whether they are equal.

    Args:
        gold: what `answers.gold_of` returned.
        answer: what `answers.answer_of` returned.

    >>> simplest_form_verdict("7", r"\frac{14}{2}"), simplest_form_verdict("p - q", "-q + p")
    (False, None)
    """
    if len(answer) > LONGEST_ANSWER:
        return False
    number = read_literal(gold)
    if number is not None:
        literal = read_literal(answer)
        if literal is not None and literal.simplest:
            return same_number(number, literal)
        # a gold such as 6/8 is its own answer still
        return same_string(gold, answer)
    if same_string(gold, answer):
        return True
    words = strip_setting(gold)
    if _WORDS.fullmatch(words) and _LONG_WORD.search(gold):
        return " ".join(words.split()).casefold() == " ".join(strip_setting(answer).split()).casefold()
    gold, answer = canonical(gold), canonical(answer)
    if len(_SYMBOL.findall(answer)) > 2 * len(_SYMBOL.findall(gold)):
        return False
    allowed = unfinished_steps(gold)
    if any(count > allowed[kind] for kind, count in unfinished_steps(answer).items()):
        return False
    return None if is_worth_computing(gold, answer) else False


def equality_verdict(gold: str, answer: str) -> bool | None:
    """Whether two expressions are equal, in whatever form; None when only computer algebra can tell."""
    if len(answer) > LONGEST_ANSWER:
        return False
    if same_string(gold, answer):
        return True
    number, literal = read_literal(gold), read_literal(answer)
    if number is not None and literal is not None:
        if same_number(number, literal):
            return True
        # unequal integers are unequal; math-verify rounds decimals and fractions to six places
        if number.value.denominator == literal.value.denominator == 1 and not (number.percent or literal.percent):
            return False
    return None if is_worth_computing(canonical(gold), canonical(answer)) else False


def same_string(gold: str, answer: str) -> bool:
    """Whether two strings are the same but for white space and typesetting."""
    return canonical(gold) == canonical(answer)


def canonical(text: str) -> str:
    r"""The string without white space and typesetting: `\left(\dfrac{1}{2}, 3\right)` becomes `(\frac{1}{2},3)`."""
    text = _FRACTION_COMMAND.sub(r"\\frac", strip_setting(text)).replace("\\,", " ")
    text = _SHORT_SCRIPT.sub(r"\1\2", re.sub(r"(\\[A-Za-z]+)\s+(?=[A-Za-z])|\s+", _keep_word_break, text))
    choice = _CHOICE.fullmatch(text)
    return choice[1] if choice else text


def unfinished_steps(text: str) -> dict[str, int]:
    r"""How many steps of each kind a reader could still work out in a canonical expression.

    A sum, difference or product of two numbers, a power of a number, a function or operator that has a value (`\gcd`,
    `\sum`, `\binom`, `\sin`, `!`, ...), a fraction not in lowest terms, a root with a square factor.
    """
    reducible = 0
    for fraction in _FRACTION.finditer(text):
        numerator, denominator = (int(digits) for digits in fraction.groups() if digits)
        reducible += denominator < 2 or gcd(numerator, denominator) > 1
    return {
        "operation": len(_LITERAL_OPERATION.findall(text)),
        "power": len(_LITERAL_POWER.findall(text)),
        "operator": len(_OPERATOR.findall(text)),
        "fraction": reducible,
        "root": sum(_has_square_factor(int(root[1] or root[2])) for root in _ROOT.finditer(text)),
    }


def is_worth_computing(gold: str, answer: str) -> bool:
    """Whether computer algebra may be tried on canonical strings: not on towers of powers and the like, unless the gold
    has one too. What this misses, the time limit of the worker catches."""
    return _HOSTILE.search(answer) is None or _HOSTILE.search(gold) is not None


def _keep_word_break(match: re.Match[str]) -> str:
    # `\pi r` must not become `\pir`
    return f"{match[1]} " if match[1] else ""


def _has_square_factor(radicand: int) -> bool:
    root = isqrt(radicand)
    return root * root == radicand or any(radicand % (d * d) == 0 for d in range(2, min(root, 1000) + 1))
