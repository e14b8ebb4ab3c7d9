"""How values compare with returns, by tenths of the states: in constant memory, over any number of batches."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

VALUE_BINS = 4096
"""Bins of V in (-1, 0], from which deciles are made: quantiles to within 1 / 4096 of the range, in constant memory."""


@dataclass(frozen=True)
class CalibrationBin:
    """A tenth of the states, by predicted value."""

    predicted: float
    """Mean V."""
    true: float
    """Mean G."""
    states: int


class ValueHistogram:
    """Counts and sums of values and returns over the range of the value."""

    def __init__(self) -> None:
        self._bins = np.zeros((VALUE_BINS, 3))  # states, sum of V, sum of G

    def add(self, values: np.ndarray, returns: np.ndarray) -> None:
        """Count states.

        Args:
            values: (N,) V in [-1, 0].
            returns: (N,) G.
        """
        where = np.clip((-values * VALUE_BINS).astype(int), 0, VALUE_BINS - 1)
        count_rows(self._bins, where, values, returns)

    def tenths(self) -> tuple[CalibrationBin, ...]:
        """Tenths of the states by V, from long to short; equal values stay together."""
        bins = self._bins[self._bins[:, 0] > 0][::-1]
        if not len(bins):
            return ()
        middle = (bins[:, 0].cumsum() - bins[:, 0] / 2) / bins[:, 0].sum()
        tenths = [bins[(middle * 10).astype(int) == i].sum(0) for i in range(10)]
        return tuple(CalibrationBin(v / n, g / n, int(n)) for n, v, g in tenths if n)


def calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """Mean |mean V - mean G| over the states."""
    states = sum(b.states for b in bins)
    return sum(b.states * abs(b.predicted - b.true) for b in bins) / states


def count_rows(table: np.ndarray, where: np.ndarray, *numbers: np.ndarray) -> None:
    """Add a one and the numbers to the rows of a table.

    Args:
        table: (R, 1 + len(numbers)), changed in place.
        where: (N,) row of each entry.
        numbers: (N,) each.
    """
    for column, weights in enumerate((None, *numbers)):
        table[:, column] += np.bincount(where, weights, minlength=len(table))
