"""What goes into and comes out of `compute_advantages`. Shapes: B completions, T completion tokens."""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class RowStats:
    """Statistics of each row, (B,), on the device of the values: what whitening, explained variance and logs need."""

    tokens: Tensor
    """Tokens of the policy in the row (int64)."""

    nonfinite: Tensor
    """Length values at these tokens, and the bootstrap, that are NaN or infinite (int64). More than 0: results of this
    row are meaningless."""

    task_nonfinite: Tensor
    """The same count for the task side: sequence advantage or rewards, values and bootstrap, and the gate (int64)."""

    length: Moments
    """Of the raw length advantage: the error of the length critic, whose targets are `returns`."""

    returns: Moments
    """Of the length critic's targets."""

    task: Moments
    """Of the task advantage."""

    total: Moments
    """Of the combined advantage."""

    task_returns: Moments | None = None
    """Of the task critic's targets; None without a task critic."""


@dataclass(frozen=True)
class Advantages:
    """Token advantages and critic targets: (B, T), float32, exactly 0 where the mask is 0, without gradient."""

    total: Tensor
    """task + coef * gate * length / scale: what the policy loss takes."""

    length: Tensor
    """Raw length advantage A_len, before coefficient, gate and scale."""

    task: Tensor
    """Task advantage: the sequence advantage on every token, or GAE of the (shaped) task rewards."""

    returns: Tensor
    """Targets of the length critic: its lambda-return A_len + V."""

    stats: RowStats

    task_returns: Tensor | None = None
    """Targets of the task critic: A_task + V_task, shaping included. None where `task` is a sequence advantage."""
