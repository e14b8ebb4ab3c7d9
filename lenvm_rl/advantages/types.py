"""What goes into and comes out of `compute_advantages`. Shapes: B completions, T completion tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TaskSignal:
    """Per-token task rewards with a task critic: the task side of PPO, turned into advantages by GAE."""

    rewards: Tensor
    """(B, T). The sequence reward belongs on the last token of the policy (the last 1 of the mask)."""

    values: Tensor
    """(B, T). Task critic at the states before each token. With shaping, a critic that has
    converged estimates V_task - beta * Phi."""

    bootstrap: Tensor
    """(B,). Task critic after the last token: 0 where the episode ended, the critic's value where it goes on."""

    gamma: float
    """Task discount, in [0, 1]. Shaping uses it too."""

    lam: float | Tensor
    """GAE lambda of the task side, in [0, 1]: a number, or (B,) numbers as in VAPO's length-adaptive GAE."""

    potential_coef: float = 0.0
    """Weight beta of potential-based shaping with the length values as potential (LenVM eq. 28-32): the rewards become
    `r_t + beta * (gamma * Phi(s_{t+1}) - Phi(s_t))`, Phi = length values, and 0 after the last token also where the
    completion was cut, since the episode ended there. The conditions of invariance are in the documentation."""


@dataclass(frozen=True)
class Moments:
    """Mean and centred second moment `sum (x - mean)^2` of one quantity over the tokens of each row; both (B,)."""

    mean: Tensor
    m2: Tensor


COUNTS = ("tokens", "nonfinite", "task_nonfinite")
QUANTITIES = ("length", "returns", "task", "total", "task_returns")
STATISTICS = (*COUNTS, *(f"{name}_{moment}" for name in QUANTITIES for moment in ("mean", "m2")))
"""Columns of `RowStats.table`, in their order; the rest of its width is alignment."""

TABLE_WIDTH = 16


@dataclass(frozen=True)
class RowStats:
    """Statistics of each row, (B,), on the device of the values: what whitening, explained variance and logs need."""

    table: Tensor
    """(B, 16) float32, one row per completion with the columns `STATISTICS`: one buffer, so that a kernel writes it in
    passing. Counts are exact below 2^24."""

    @property
    def tokens(self) -> Tensor:
        """Tokens of the policy in the row (int64)."""
        return self._count("tokens")

    @property
    def nonfinite(self) -> Tensor:
        """Length values at these tokens, and the bootstrap, that are NaN or infinite (int64). More than 0: results of
        this row are meaningless."""
        return self._count("nonfinite")

    @property
    def task_nonfinite(self) -> Tensor:
        """The same count for the task side: sequence advantage or rewards, values and bootstrap, and the gate."""
        return self._count("task_nonfinite")

    @property
    def length(self) -> Moments:
        """Of the raw length advantage: the error of the length critic, whose targets are `returns`."""
        return self._moments("length")

    @property
    def returns(self) -> Moments:
        """Of the length critic's targets."""
        return self._moments("returns")

    @property
    def task(self) -> Moments:
        """Of the task advantage."""
        return self._moments("task")

    @property
    def total(self) -> Moments:
        """Of the combined advantage."""
        return self._moments("total")

    @property
    def task_returns(self) -> Moments:
        """Of the task critic's targets; zeros without a task critic."""
        return self._moments("task_returns")

    def _count(self, name: str) -> Tensor:
        return self.table[:, STATISTICS.index(name)].long()

    def _moments(self, name: str) -> Moments:
        return Moments(self.table[:, STATISTICS.index(f"{name}_mean")], self.table[:, STATISTICS.index(f"{name}_m2")])


@dataclass(frozen=True)
class Advantages:
    """Token advantages and critic targets: (B, T), float32, exactly 0 where the mask is 0, without gradient."""

    total: Tensor
    """task + coef * gate * length / scale: what the policy loss takes."""

    length: Tensor
    """Raw length advantage A_len, before coefficient, gate and scale."""

    task: Tensor
    """Task advantage: GAE of the (shaped) task rewards, or a sequence advantage, which stays (B, 1): it is the same on
    every token, and a fused computation does not write the same number T times."""

    returns: Tensor
    """Targets of the length critic: its lambda-return A_len + V."""

    stats: RowStats

    task_returns: Tensor | None = None
    """Targets of the task critic: A_task + V_task, shaping included. None where `task` is a sequence advantage."""


def empty_advantages(values: Tensor, *, token_task: bool) -> Advantages:
    """Buffers for a batch of the shape (B, T) and on the device of `values`.

    Rows start 16-byte aligned on a GPU, whatever T. Where T is a multiple of 4, a kernel stores 128 bits at a time.
    """
    B, T = values.shape
    width = T + -T % 4 if values.is_cuda else T

    def rows() -> Tensor:
        return torch.empty(B, width, dtype=torch.float32, device=values.device)[:, :T]

    return Advantages(
        total=rows(),
        length=rows(),
        task=rows() if token_task else torch.empty(B, 1, dtype=torch.float32, device=values.device),
        returns=rows(),
        stats=RowStats(torch.empty(B, TABLE_WIDTH, dtype=torch.float32, device=values.device)),
        task_returns=rows() if token_task else None,
    )
