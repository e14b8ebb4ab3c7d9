r"""Where the answer stands, in a completion and in a gold.

In a completion, reasoning is no answer: only the text after the last `</think>` counts, and of it only what precedes a
`<think>` that is never closed. There, the answer is the last `\boxed{...}` whose braces balance; without a box, the
line after the last `####`; without either, there is none. Free text is not searched for numbers, since the last number
of an unfinished completion is often right by chance.

In a gold, the same box and the same `####` (GSM8K) are looked for, and without them the whole string is the answer.
"""

import re
from collections.abc import Iterable

LONGEST_ANSWER = 512
"""Characters. The longest answers of MATH, matrices, stay under 200; what is longer is not checked, and scores 0."""

# `\\` is a line break, except before "boxed", where it is a model's (or JSON's) doubled backslash
_BRACES = re.compile(r"(\\(?:boxed|fbox)\s*\{)|\\\\(?!boxed|fbox)|\\[{}]|([{}])")
_BARE_BOX = re.compile(r"\\boxed\s+(\\[A-Za-z]+|[^\s\\{}$]+)")
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3})")


def final_text(text: str) -> str:
    """The part of a completion outside its reasoning: after the last `</think>`, before a `<think>` left open."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def box_spans(text: str) -> list[tuple[int, int]]:
    r"""Where the contents of each closed `\boxed{...}` start and end, in the order of their starts.

    One pass, linear in the text, nested or unclosed braces included; spans and not strings, since the contents of
    n nested boxes would take n^2 characters.
    """
    openings = [position for position in (text.find("\\boxed"), text.find("\\fbox")) if position >= 0]
    if not openings:
        return []
    open_braces: list[int] = []  # where the contents start; negative for a brace that is no box
    spans = []
    for match in _BRACES.finditer(text, min(openings)):
        if match[1]:
            open_braces.append(match.end())
        elif match[2] == "{":
            open_braces.append(-1)
        elif match[2] == "}" and open_braces and (start := open_braces.pop()) >= 0:
            spans.append((start, match.start()))
    return sorted(spans)


def last_box(text: str) -> str | None:
    r"""Contents of the last `\boxed{...}` (or `\fbox{...}`) with balanced braces, the innermost if nested, or None."""
    spans = box_spans(text)
    return text[slice(*spans[-1])] if spans else None


def answer_of(text: str) -> str | None:
    """The answer of a completion's text, as the module says; None when there is none or it is empty."""
    final = final_text(text)
    answer = last_box(final)
    if answer is None and "####" in final:
        answer = _line_after_hashes(final)
    return (answer or "").strip() or None


def gold_of(gold: str) -> str:
    r"""The answer of a gold: its last box (also TeX's bare `\boxed 7`), else the line after `####`, else all of it.

    `####` is GSM8K's mark, and the commas that GSM8K puts between thousands are dropped.
    """
    box = last_box(gold)
    if box is None and (bare := _BARE_BOX.findall(gold)):
        box = bare[-1]
    if box is not None:
        return box.strip()
    if "####" in gold:
        return _THOUSANDS.sub("", _line_after_hashes(gold))
    return gold.strip()


def check_gold(gold: object, row: int, column: str) -> str:
    """`gold_of(gold)`, after making sure that some completion could match it.

    Raises:
        ValueError: the gold is not a string, is empty, or is longer than `LONGEST_ANSWER`; names the row and column.
    """
    where = f"row {row} of column {column!r}"
    if not isinstance(gold, str):
        raise ValueError(
            f"{where} holds {gold!r:.200} ({type(gold).__name__}), but a gold must be a string: it is compared as "
            "mathematics, and another type would score 0 for ever. Convert the column, e.g. "
            f"dataset.map(lambda row: {{{column!r}: str(row[{column!r}])}}), or drop rows without a gold."
        )
    answer = gold_of(gold)
    if not answer:
        raise ValueError(f"{where} holds {gold!r:.200}, a gold without an answer: fill it in or drop the row.")
    if len(answer) > LONGEST_ANSWER:
        raise ValueError(
            f"{where} holds a gold of {len(answer):,} characters ({answer[:60]!r}...), but an answer has at most "
            f"{LONGEST_ANSWER}: mark the answer of a worked solution with \\boxed{{...}} or ####, or drop the row."
        )
    return answer


def validate_golds(golds: Iterable[object], column: str = "solution") -> None:
    """Check a whole dataset column once, before training: `validate_golds(dataset["solution"])`.

    Args:
        golds: the column.
        column: its name, for the message.

    Raises:
        ValueError: names the first row whose gold no completion could match (see `check_gold`).
    """
    for row, gold in enumerate(golds):
        check_gold(gold, row, column)


def _line_after_hashes(text: str) -> str:
    return text.rpartition("####")[2].strip().partition("\n")[0].strip()
