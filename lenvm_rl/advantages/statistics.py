"""Batch statistics from the moments of the rows, over all processes: for whitening, explained variance and logs."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lenvm_rl.advantages.types import Moments


class Pooled(NamedTuple):
    """Token count, mean and population variance of a batch; 0-dim float64 tensors, on the device."""

    tokens: Tensor
    mean: Tensor
    variance: Tensor

    @property
    def unbiased_variance(self) -> Tensor:
        """With Bessel's correction; 0 of a single token."""
        return self.variance * self.tokens / (self.tokens - 1).clamp(min=1)


def row_moments(x: Tensor, mask: Tensor) -> Moments:
    """Mean and centred second moment of the masked tokens of each row; 0 of a row without any."""
    count = mask.sum(1).clamp(min=1)
    mean = torch.where(mask, x, 0.0).sum(1) / count
    return Moments(mean, torch.where(mask, x - mean[:, None], 0.0).square().sum(1))


def pooled(tokens: Tensor, moments: Moments, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> Pooled:
    """Mean and variance over all tokens of a batch.

    Args:
        tokens: (B,) token counts. Rows set to 0 here are left out.
        moments: of the quantity, from `RowStats`.
        reduce: adds up a (3,) tensor over processes, e.g. `partial(accelerator.reduce, reduction="sum")`.

    Widths T differ between processes and averages of averages are wrong, so it is three sums that travel.
    """
    dtype = torch.float32 if tokens.device.type == "mps" else torch.float64
    count, mean, m2 = tokens.to(dtype), moments.mean.to(dtype), moments.m2.to(dtype)
    chosen = tokens > 0
    first, second = torch.where(chosen, count * mean, 0), torch.where(chosen, m2 + count * mean.square(), 0)
    count, first, second = reduce(torch.stack([count.sum(), first.sum(), second.sum()]))
    mean = first / count.clamp(min=1)
    return Pooled(count, mean, (second / count.clamp(min=1) - mean.square()).clamp(min=0))


def explained_variance(
    tokens: Tensor, error: Moments, returns: Moments, reduce: Callable[[Tensor], Tensor] = lambda sums: sums
) -> Tensor:
    """1 - Var[returns - values] / Var[returns] of a critic over all tokens; nan where the returns do not vary.

    `error` is the critic's advantage: `stats.length` with `stats.returns`, or `stats.task` with `stats.task_returns`.
    """
    target = pooled(tokens, returns, reduce).variance
    unexplained = pooled(tokens, error, reduce).variance
    return torch.where(target > 0, 1 - unexplained / target, torch.nan)


def explained_variance_of_sums(count: float, g1: float, g2: float, e1: float, e2: float) -> float:
    """`explained_variance` from float64 sums: of returns G, G^2, and of errors G - V, (G - V)^2; nan where G does not
    vary."""
    variance = g2 / count - (g1 / count) ** 2
    if not variance > 1e-12 * g2 / count:  # where all returns are equal, the difference leaves its rounding error
        return math.nan
    return float(1 - (e2 / count - (e1 / count) ** 2) / variance)
