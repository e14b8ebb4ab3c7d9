"""Statistics of methods that trade accuracy for tokens: intervals, scores of one point, frontiers, paired differences.

1. Pure functions of arrays. S seeds (training runs), N held-out problems, the same for all methods.
2. An interval over seeds says how far another training run may be away; the bootstrap resamples seeds and problems, and
   compares two methods on the same draws of both.
3. A frontier is what a method reaches with any of its settings, and with mixtures: to answer a share of the problems
   with one policy and the rest with another gives every point between the two, so it is the upper concave hull.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Array = np.ndarray
Point = tuple[float, float]
"""Tokens and accuracy."""


class Interval(NamedTuple):
    """A mean with the ends of its 95 % interval; nan where there is no interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Outcomes:
    """One setting of a method: what each of its runs did with each problem."""

    correct: Array
    """(S, N) bool."""
    tokens: Array
    """(S, N) completion lengths, the end token included."""
    seeds: tuple[int, ...]
    """S seeds; runs of the same seed saw the same prompts in the same order."""

    def __post_init__(self) -> None:
        shape = (len(self.seeds), self.correct.shape[-1])
        if self.correct.shape != shape or self.tokens.shape != shape:
            raise ValueError(
                f"outcomes of {len(self.seeds)} seeds need arrays of shape (seeds, problems), got {self.correct.shape} "
                f"and {self.tokens.shape}."
            )

    @property
    def point(self) -> Point:
        """Mean tokens and accuracy."""
        return float(self.tokens.mean()), float(self.correct.mean())

    def of_seeds(self, seeds: Sequence[int]) -> "Outcomes":
        rows = [self.seeds.index(seed) for seed in seeds]
        return Outcomes(self.correct[rows], self.tokens[rows], tuple(seeds))


# Student's t, 97.5 %, for 1 to 30 degrees of freedom
_T = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip
_NORMAL = 1.959964


def student_t(degrees: int) -> float:
    """The 97.5 % quantile of Student's t; above 30 degrees of freedom to 1e-4, by its expansion in 1/degrees."""
    if degrees <= len(_T):
        return _T[degrees - 1]
    z = _NORMAL
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def seed_interval(values: Sequence[float]) -> Interval:
    """Mean over seeds and its 95 % interval by Student's t; with one seed there is no interval."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Interval(mean, math.nan, math.nan)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
    half = student_t(len(values) - 1) * deviation / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def efficiency_score(
    accuracy: float, tokens: float, base_accuracy: float, base_tokens: float, gain: float = 3.0, loss: float = 5.0
) -> float:
    """Accuracy-Efficiency Score (O1-Pruner, arXiv 2501.12570): the saved share of tokens, plus the relative change of
    the accuracy, times `gain` where it rose and times `loss` where it fell.

    Args:
        accuracy, tokens: of the method.
        base_accuracy, base_tokens: of what it is compared with.

    Raises:
        ValueError: a base without a correct answer or without tokens.
    """
    if not (base_accuracy > 0 and base_tokens > 0):
        raise ValueError(f"relative to an accuracy of {base_accuracy} and {base_tokens} tokens nothing can be said.")
    change = (accuracy - base_accuracy) / base_accuracy
    return (base_tokens - tokens) / base_tokens + (gain if change >= 0 else loss) * change


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Share of the rectangle between the reference and (0 tokens, accuracy 1) that the points dominate, in [0, 1].

    Args:
        points: tokens and accuracy.
        reference: the most tokens and the least accuracy that count; points beyond add nothing.

    Raises:
        ValueError: a reference that leaves no rectangle.
    """
    most, least = reference
    if not (most > 0 and least < 1):
        raise ValueError(f"the reference point {reference} leaves nothing to dominate.")
    area, reached = 0.0, least
    for tokens, accuracy in sorted(points):
        if tokens < most and accuracy > reached:
            area += (most - tokens) * (accuracy - reached)
            reached = accuracy
    return area / (most * (1 - least))


def concave_hull(points: Sequence[Point]) -> list[Point]:
    """The frontier: upper concave hull from the fewest tokens to the highest accuracy, tokens and accuracy rising."""
    hull: list[Point] = []
    # of equal tokens only the most accurate
    for point in sorted(points, key=lambda p: (p[0], -p[1])):
        if hull and point[1] <= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(left: Point, right: Point) -> float:
    return (right[1] - left[1]) / (right[0] - left[0]) if right[0] > left[0] else math.inf


def accuracy_within(points: Sequence[Point], tokens: float) -> float:
    """Highest accuracy on the frontier of the points within a budget of tokens; nan where all need more."""
    hull = concave_hull(points)
    if tokens < hull[0][0]:
        return math.nan
    return float(np.interp(tokens, [p[0] for p in hull], [p[1] for p in hull]))


def tokens_for(points: Sequence[Point], accuracy: float) -> float:
    """Fewest tokens on the frontier of the points for an accuracy; nan where none reaches it."""
    hull = concave_hull(points)
    if accuracy > hull[-1][1]:
        return math.nan
    return float(np.interp(accuracy, [p[1] for p in hull], [p[0] for p in hull]))


class Resampling(NamedTuple):
    """The same draws for whatever is compared: R times S seeds and N problems, with replacement."""

    of_seeds: Array
    """(R, S) shares that add up to 1."""
    of_problems: Array
    """(R, N) shares that add up to 1."""

    def means(self, values: Array) -> Array:
        """(R,) means of values (S, N) over the draws."""
        return ((values.astype(np.float64) @ self.of_problems.T).T * self.of_seeds).sum(1)


def resampling(seeds: int, problems: int, replicates: int = 2000, seed: int = 0) -> Resampling:
    """Draws for a bootstrap over seeds and problems."""
    rng = np.random.default_rng(seed)
    return Resampling(
        rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=replicates) / seeds,
        rng.multinomial(problems, np.full(problems, 1 / problems), size=replicates) / problems,
    )


def percentile_interval(mean: float, replicates: Array) -> Interval:
    """The mean with the middle 95 % of its replicates; nan if some replicate is nan."""
    low, high = np.percentile(replicates, (2.5, 97.5))
    return Interval(mean, float(low), float(high))


class Bootstrapped(NamedTuple):
    """One setting of a method, over draws of seeds and problems."""

    accuracy: Interval
    tokens: Interval
    tokens_per_correct: Interval
    """nan without a correct answer."""


def bootstrap(outcomes: Outcomes, draws: Resampling | None = None) -> Bootstrapped:
    """Intervals of accuracy, tokens and tokens per correct answer over seeds and problems."""
    draws = draws or resampling(len(outcomes.seeds), outcomes.correct.shape[1])
    tokens, accuracy = outcomes.point
    drawn_accuracy, drawn_tokens = draws.means(outcomes.correct), draws.means(outcomes.tokens)
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = percentile_interval(tokens / accuracy if accuracy else math.nan, drawn_tokens / drawn_accuracy)
    return Bootstrapped(percentile_interval(accuracy, drawn_accuracy), percentile_interval(tokens, drawn_tokens), cost)


class Difference(NamedTuple):
    """A method minus a baseline, over common seeds and problems."""

    accuracy: Interval
    """Between the two settings as they are."""
    tokens: Interval
    accuracy_within: Interval
    """What the method's frontier reaches with the baseline's tokens, minus the baseline's accuracy."""
    accuracy_within_defined: float
    """Share of the draws in which the frontier reaches down to that budget; the interval is over those."""
    tokens_for: Interval
    """What the method's frontier needs for the baseline's accuracy, minus the baseline's tokens."""
    tokens_for_defined: float
    """Share of the draws in which the frontier reaches that accuracy."""


def paired_bootstrap(
    ours: Outcomes, theirs: Outcomes, frontier: Sequence[Outcomes] = (), replicates: int = 2000, seed: int = 0
) -> Difference:
    """A method against a baseline, on the same draws of seeds and problems.

    Args:
        ours: the setting that stands for the method.
        theirs: the baseline.
        frontier: further settings of the method, for its frontier.
        replicates, seed: of the bootstrap.

    Raises:
        ValueError: no seed that all of them have, or different numbers of problems.
    """
    curve = [ours, *frontier]
    common = [s for s in theirs.seeds if all(s in one.seeds for one in curve)]
    if not common:
        raise ValueError("the methods have no seed in common, so there is nothing to pair.")
    if len({one.correct.shape[1] for one in (*curve, theirs)}) > 1:
        raise ValueError("the methods were evaluated on different numbers of problems, so there is nothing to pair.")
    curve, theirs = [one.of_seeds(common) for one in curve], theirs.of_seeds(common)
    draws = resampling(len(common), theirs.correct.shape[1], replicates, seed)
    # (settings, R); the mean itself in front
    tokens = np.array([[one.point[0], *draws.means(one.tokens)] for one in (*curve, theirs)])
    accuracy = np.array([[one.point[1], *draws.means(one.correct)] for one in (*curve, theirs)])
    points = [list(zip(t, a, strict=True)) for t, a in zip(tokens[:-1].T, accuracy[:-1].T, strict=True)]
    within = np.array([accuracy_within(p, t) for p, t in zip(points, tokens[-1], strict=True)]) - accuracy[-1]
    needed = np.array([tokens_for(p, a) for p, a in zip(points, accuracy[-1], strict=True)]) - tokens[-1]
    return Difference(
        _interval(accuracy[0] - accuracy[-1])[0],
        _interval(tokens[0] - tokens[-1])[0],
        *_interval(within),
        *_interval(needed),
    )


def _interval(values: Array) -> tuple[Interval, float]:
    """Interval of values whose first is the estimate, over the replicates that are defined, and their share."""
    defined = values[1:][~np.isnan(values[1:])]
    if len(defined) == 0:
        return Interval(float(values[0]), math.nan, math.nan), 0.0
    return percentile_interval(float(values[0]), defined), len(defined) / (len(values) - 1)
