"""How well completions keep a length that was asked for: LIFEBench's scores and Ruler's matches.

1. Three constraints: equal to n, at most n, at least n. The unit, tokens or words, is the caller's.
2. A score is 100 where the constraint is kept, and falls exponentially with the relative deviation; equal to n, too
   short costs more than too long.
3. Ruler's matches are for targets in words, at its nine levels.
"""

import math
import re
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

__all__ = [
    "CONSTRAINTS",
    "Constraint",
    "count_words",
    "length_deviation",
    "length_scores",
    "mean_over_targets",
    "ruler_matches",
    "ruler_ranges",
]

Constraint = Literal["equal", "at_most", "at_least"]
CONSTRAINTS: tuple[Constraint, ...] = get_args(Constraint)

TOO_SHORT, TOO_LONG = 5.0, 2.0
"""How fast the score falls below and above the target."""

_RULER: dict[int, tuple[tuple[float, float], tuple[float, float]]] = {
    10: ((0, 20), (0, 20)),
    30: ((20, 40), (20, 40)),
    50: ((40, 60), (40, 60)),
    80: ((70, 90), (60, 100)),
    150: ((130, 170), (100, 200)),
    300: ((280, 320), (200, 400)),
    500: ((450, 550), (400, 600)),
    700: ((630, 770), (600, 800)),
}
_RULER_LAST = ((800.0, math.inf), (800.0, math.inf))
"""Of every target above 800 words."""

# a Chinese, Japanese or Korean character is a word of its own; any other run without spaces and CJK punctuation is one
_CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\s\u3000-\u303f\uff00-\uffef{_CJK}]+")


def length_deviation(lengths: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """LD = (L - n) / n, same shape.

    Args:
        lengths: what was written.
        targets: what was asked for, at least 1.

    Raises:
        ValueError: a target below 1.
    """
    targets = np.asarray(targets, dtype=float)
    if (targets < 1).any():
        raise ValueError(f"A target length must be at least 1, got {targets.min():g}.")
    return (np.asarray(lengths, dtype=float) - targets) / targets


def length_scores(lengths: np.ndarray, targets: np.ndarray, constraint: Constraint) -> np.ndarray:
    """LS of LIFEBench, in [0, 100], same shape.

    Args:
        lengths: what was written.
        targets: what was asked for, at least 1.
        constraint: "equal", "at_most" or "at_least".

    Returns:
        100 exp(5 LD) below the target and 100 exp(-2 LD) above it, where the constraint does not allow to be there.

    Raises:
        ValueError: another constraint, or a target below 1.
    """
    if constraint not in CONSTRAINTS:
        raise ValueError(f"A length constraint is one of {', '.join(CONSTRAINTS)}, got {constraint!r}.")
    deviation = length_deviation(lengths, targets)
    short = np.zeros_like(deviation) if constraint == "at_most" else TOO_SHORT * np.minimum(deviation, 0)
    long = np.zeros_like(deviation) if constraint == "at_least" else -TOO_LONG * np.maximum(deviation, 0)
    return 100 * np.exp(short + long)


def mean_over_targets(scores: np.ndarray, targets: np.ndarray) -> float:
    """LIFEBench's mean: over the completions of each target, then over the targets."""
    targets = np.asarray(targets)
    return float(np.mean([np.mean(scores[targets == target]) for target in np.unique(targets)]))


def count_words(text: str) -> int:
    """Words between spaces, and Chinese, Japanese and Korean characters one by one, without their punctuation."""
    return len(_WORD.findall(text))


def ruler_ranges(target: int) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """Ruler's ranges (a, b] of a target in words, for the precise and for the flexible match; None between levels."""
    return _RULER_LAST if target > 800 else _RULER.get(target)


def ruler_matches(words: Sequence[int], targets: Sequence[int]) -> tuple[float, float] | None:
    """Ruler's precise and flexible match: shares of completions whose words lie in the range of their target.

    Args:
        words: of each completion.
        targets: in words, of each completion.

    Returns:
        PM and FM in [0, 1]; None where a target is none of Ruler's levels, or where there is nothing to match.
    """
    ranges = [ruler_ranges(target) for target in targets]
    if not ranges or any(one is None for one in ranges):
        return None
    inside = [[a < count <= b for a, b in one] for count, one in zip(words, ranges, strict=True) if one is not None]
    precise, flexible = np.mean(inside, axis=0)
    return float(precise), float(flexible)
