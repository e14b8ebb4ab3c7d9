"""How well remaining lengths are predicted along the completion: sums over batches, and what they say.

Token metrics rest on finished completions, in the states before each token: after the end token there is nothing left
to predict, and a cut completion has no known length. Sums are kept, not predictions.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lenvm_rl.advantages.statistics import explained_variance_of_sums
from lenvm_rl.evaluation.calibration import CalibrationBin, ValueHistogram, calibration_error, count_rows
from lenvm_rl.length import check_gamma, logit_to_remaining

POSITIONS = (0.0, 0.25, 0.5, 0.75)
"""Shares of the completion at which errors are reported."""
SLICES = 20
"""Slices of the completion in the curve of errors over positions."""


@dataclass(frozen=True)
class PositionError:
    """Mean error of the predicted remaining length."""

    position: float
    """Share of the completion that was there already."""
    tokens: float
    relative: float


@dataclass(frozen=True)
class LengthValueScores:
    """Token metrics, over the states before each token of finished completions; nan where there are none."""

    mean_squared_error: float
    """Of the value."""
    explained_variance: float
    """1 - Var[G - V] / Var[G]: 1 is perfect, 0 no better than a constant; nan where G does not vary."""
    length_error_tokens: float
    """Mean |predicted - true| remaining length."""
    length_error_relative: float
    """Mean |predicted - true| / true remaining length."""
    calibration_error: float
    """Mean |mean V - mean G| over the tenths of the states."""
    completions: int
    cut: int
    """Completions that were cut, and count nowhere here."""
    states: int
    positions: tuple[PositionError, ...] = ()
    """At `POSITIONS`, one state of each completion."""
    slices: tuple[PositionError, ...] = ()
    """All states, by the slice of the completion that they lie in."""
    calibration: tuple[CalibrationBin, ...] = ()

    def metrics(self) -> dict[str, float]:
        """As a flat table, for logs."""
        names = ("mean_squared_error", "explained_variance", "length_error_tokens", "length_error_relative")
        flat: dict[str, float] = {name: getattr(self, name) for name in (*names, "calibration_error")}
        for error in self.positions:
            flat[f"length_error_tokens_at_{error.position:.0%}".rstrip("%")] = error.tokens
            flat[f"length_error_relative_at_{error.position:.0%}".rstrip("%")] = error.relative
        return flat


class LengthValueStatistics:
    """Sums over batches of completions, from which `LengthValueScores` are made.

    Args:
        gamma: discount of the critic.
    """

    def __init__(self, gamma: float) -> None:
        self.gamma = check_gamma(gamma)
        self._sums = np.zeros(7)  # states, G, G^2, G - V, (G - V)^2, |l - L|, |l - L| / L
        self._completions = self._cut = 0
        self._positions = np.zeros((len(POSITIONS), 2))
        self._slices = np.zeros((SLICES, 3))
        self._histogram = ValueHistogram()
        self._first: list[np.ndarray] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch.

        Args:
            logits: (B, S) head outputs, one completion in each row.
            labels: (B, S) of `LengthValueCollator`.
        """
        remaining = labels.cpu().double().numpy()
        z = logits.detach().cpu().double()
        value, predicted = (-torch.sigmoid(z)).numpy(), logit_to_remaining(z, self.gamma).numpy()
        acting = remaining > 0
        rows = np.arange(len(remaining))
        first, length = acting.argmax(1), remaining.max(1)
        some = acting.any(1)
        finished = some & (remaining == 0).any(1)
        self._first.append(value[rows, first][some])
        self._completions += int(finished.sum())
        self._cut += int((some & ~finished).sum())

        known = acting & finished[:, None]
        left, v, guess = remaining[known], value[known], predicted[known]
        g = np.expm1(left * math.log(self.gamma))
        off = np.abs(guess - left)
        self._sums += [len(left), *moments(g), *moments(g - v), off.sum(), (off / left).sum()]
        whole = np.broadcast_to(length[:, None], known.shape)[known]
        count_rows(self._slices, ((whole - left) * SLICES // whole).astype(int), off, off / left)
        self._histogram.add(v, g)

        rows, first, length = rows[finished], first[finished], length[finished]
        for position, sums in zip(POSITIONS, self._positions, strict=True):
            time = np.floor(position * length).astype(int)
            off = np.abs(predicted[rows, first + time] - (length - time))
            sums += [off.sum(), (off / (length - time)).sum()]

    def first_values(self) -> np.ndarray:
        """(completions,) V(s_0) of all that were added, in their order; empty completions are left out."""
        return np.concatenate(self._first) if self._first else np.zeros(0)

    def scores(self) -> LengthValueScores:
        """What the sums say."""
        states, g1, g2, e1, e2, off, relative = self._sums
        if not states:
            return LengthValueScores(*(math.nan,) * 5, completions=0, cut=self._cut, states=0)
        calibration = self._histogram.tenths()
        return LengthValueScores(
            mean_squared_error=e2 / states,
            explained_variance=explained_variance_of_sums(states, g1, g2, e1, e2),
            length_error_tokens=off / states,
            length_error_relative=relative / states,
            calibration_error=calibration_error(calibration),
            completions=self._completions,
            cut=self._cut,
            states=int(states),
            positions=tuple(
                PositionError(position, *(sums / self._completions).tolist())
                for position, sums in zip(POSITIONS, self._positions, strict=True)
            ),
            slices=tuple(
                PositionError((i + 0.5) / SLICES, tokens / count, share / count)
                for i, (count, tokens, share) in enumerate(self._slices.tolist())
                if count
            ),
            calibration=calibration,
        )


def moments(x: np.ndarray) -> tuple[float, float]:
    """Sum and sum of squares."""
    return x.sum(), (x**2).sum()
