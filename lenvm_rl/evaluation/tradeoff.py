"""Accuracy for tokens: curves of steering at inference, beside what training buys.

1. A curve is a way to be short with a knob: the tilt by a critic, a hard budget, a bias of the end token; a point alone
   is a way without one, such as a prompt or a trained policy. All of them sample from the same truncated candidates.
2. A hard budget cuts the unguided completions after n tokens: what has not ended by then is wrong and costs n.
3. Curves are compared by their frontiers: upper concave hulls that start at (0, 0), since to answer a share of the
   problems one way and the rest another, or not at all, gives every point between. This also helps the weaker curve.
4. Intervals resample problems and draws, the same for both curves of a comparison.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lenvm_rl.evaluation.frontier import (
    Interval,
    Outcomes,
    Point,
    Resampling,
    bootstrap,
    concave_hull,
    hypervolume,
    percentile_interval,
    resampling,
)

__all__ = ["Curve", "CurvePoint", "Gap", "area_under", "gaps", "hard_budget", "summarise_curves"]

ORIGIN: Point = (0.0, 0.0)


@dataclass(frozen=True)
class CurvePoint:
    """What a way to be short did with each problem at one setting of its knob."""

    label: str
    outcomes: Outcomes
    """S draws of each of N problems."""
    knob: float | None = None


@dataclass(frozen=True)
class Curve:
    """A way to be short."""

    name: str
    points: tuple[CurvePoint, ...]
    knob_name: str | None = None

    @property
    def means(self) -> list[Point]:
        """Tokens and accuracy of each point."""
        return [point.outcomes.point for point in self.points]


def hard_budget(unguided: Outcomes, finished: np.ndarray, budgets: Sequence[int]) -> Curve:
    """The unguided completions, cut after each budget.

    Args:
        unguided: their outcomes.
        finished: (S, N) bool, they ended before the token limit.
        budgets: tokens, the end token counted.

    Raises:
        ValueError: a budget below one token.
    """
    if min(budgets) < 1:
        raise ValueError(f"A budget must be at least one token, got {min(budgets)}.")
    points = []
    for budget in budgets:
        within = finished & (unguided.tokens <= budget)
        cut = Outcomes(unguided.correct & within, np.minimum(unguided.tokens, budget), unguided.seeds)
        points.append(CurvePoint(str(budget), cut, float(budget)))
    return Curve("hard budget", tuple(points), "tokens")


def area_under(points: Sequence[Point], most: float) -> float:
    """Mean accuracy of the frontier over mean budgets from 0 to `most` tokens: the area under it, divided by `most`.

    Args:
        points: tokens and accuracy.
        most: right end, where the frontier goes on flat if it ends before.

    Raises:
        ValueError: no room to the left of `most`.
    """
    if not most > 0:
        raise ValueError(f"An area needs a budget above 0 tokens, got {most}.")
    hull = concave_hull([ORIGIN, *points])
    x = [tokens for tokens, _ in hull if tokens < most] + [most]
    y = np.interp(x, [p[0] for p in hull], [p[1] for p in hull])
    return float(np.trapezoid(y, x) / most)


@dataclass(frozen=True)
class Gap:
    """How far the frontier of one curve is above another's at one budget."""

    budget: str
    tokens: float
    """Mean tokens that the budget comes to."""
    ours: float
    theirs: float
    difference: Interval


def gaps(ours: Curve, theirs: Curve, *, replicates: int = 1000, seed: int = 0) -> list[Gap]:
    """The frontier of one curve minus that of the other, at the mean tokens of each point of the other.

    Args:
        ours, theirs: outcomes of the same draws and problems.
        replicates, seed: of the bootstrap. It holds the tokens fixed where the mean has them.

    Raises:
        ValueError: curves of different draws or problems.
    """
    shapes = {point.outcomes.correct.shape for point in (*ours.points, *theirs.points)}
    if len(shapes) > 1:
        raise ValueError(f"Curves of different draws or problems cannot be paired: {sorted(shapes)}.")
    ((count, problems),) = shapes
    draws = resampling(count, problems, replicates, seed)
    at = [tokens for tokens, _ in theirs.means]
    mine, their = (_frontiers(curve, draws, at) for curve in (ours, theirs))
    difference = mine - their
    return [
        Gap(
            point.label,
            at[i],
            float(mine[0, i]),
            float(their[0, i]),
            percentile_interval(float(difference[0, i]), difference[1:, i]),
        )
        for i, point in enumerate(theirs.points)
    ]


def _frontiers(curve: Curve, draws: Resampling, at: Sequence[float]) -> np.ndarray:
    """(1 + R, len(at)) accuracy of the frontier within budgets: of the means, then of each draw."""
    tokens = np.array([[p.outcomes.point[0], *draws.means(p.outcomes.tokens)] for p in curve.points])
    accuracy = np.array([[p.outcomes.point[1], *draws.means(p.outcomes.correct)] for p in curve.points])
    frontiers = []
    for of_draw in zip(tokens.T, accuracy.T, strict=True):
        hull = concave_hull([ORIGIN, *zip(*(values.tolist() for values in of_draw), strict=True)])
        frontiers.append(np.interp(at, [p[0] for p in hull], [p[1] for p in hull]))
    return np.array(frontiers)


def summarise_curves(
    curves: Sequence[Curve], *, unguided: Outcomes, compare: Mapping[str, str] | None = None, seed: int = 0
) -> dict[str, Any]:
    """All numbers of a trade-off.

    Args:
        curves: ways to be short.
        unguided: the policy as it is: areas end at its mean tokens.
        compare: names of curves, each with one that it is compared with at every point of the latter.
        seed: of the bootstrap.

    Returns:
        ``unguided``, ``curves`` with points, area and hypervolume, ``gaps`` by "ours over theirs".
    """
    most = unguided.point[0]
    by_name = {curve.name: curve for curve in curves}
    return {
        "problems": int(unguided.correct.shape[1]),
        "draws": int(unguided.correct.shape[0]),
        "unguided": _point("", unguided, None),
        "curves": [
            {
                "name": curve.name,
                "knob_name": curve.knob_name,
                "area": area_under(curve.means, most),
                "hypervolume": hypervolume(curve.means, (most * (1 + 1e-9), 0.0)),
                "points": [_point(p.label, p.outcomes, p.knob) for p in curve.points],
            }
            for curve in curves
        ],
        "gaps": {
            f"{ours} over {theirs}": [
                {
                    "budget": gap.budget,
                    "tokens": gap.tokens,
                    "ours": gap.ours,
                    "theirs": gap.theirs,
                    "difference": gap.difference._asdict(),
                }
                for gap in gaps(by_name[ours], by_name[theirs], seed=seed)
            ]
            for ours, theirs in (compare or {}).items()
        },
    }


def _point(label: str, outcomes: Outcomes, knob: float | None) -> dict[str, Any]:
    intervals = bootstrap(outcomes)
    return {
        "label": label,
        "knob": knob,
        "accuracy": intervals.accuracy._asdict(),
        "tokens": intervals.tokens._asdict(),
        "tokens_per_correct": None
        if math.isnan(intervals.tokens_per_correct.mean)
        else intervals.tokens_per_correct._asdict(),
    }
