"""How the length signal joins the task signal: which completions feel it, how strongly, on which scale.

    A_t = A_task + coef * gate * A_len_t / scale                                     (LenVM eq. 27; spec of the gates)

1. The gate is one number per completion. It depends on the outcome, so under a gate other than "all" the critic is no
   longer an unbiased baseline of what it multiplies: the mean of the gated signal need not be zero.
2. The scale divides without centring, so that the sign of every token's signal is kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lenvm_rl.advantages import Advantages, RowStats, pooled

LengthGate = Literal["all", "correct", "solve_rate"]
LengthScale = Literal["none", "std"]

SMALLEST_SCALE = 1e-3
"""Floor of the "std" scale: a critic that predicts perfectly leaves no spread to divide by."""


@dataclass(frozen=True)
class LengthCredit:
    """The settings of the length signal.

    Raises:
        ValueError: a setting outside its range.
    """

    coef: float = 1.0
    """Weight s of the length advantage. Positive shortens, negative lengthens, 0 leaves the task advantage alone."""
    lam: float = 1.0
    """lambda of the length advantage: 1 is the Monte-Carlo return minus the value, 0 the one-step residual."""
    gate: LengthGate = "correct"
    """Completions that feel the signal: "all", the "correct" ones, or "solve_rate": the correct ones, in proportion to
    the share of their group that is correct, so that easy prompts are pressed hardest."""
    threshold: float = 1.0
    """Correctness reward from which a completion counts as correct."""
    scale: LengthScale = "none"
    """"none", or "std": the standard deviation of the length advantage over the gated tokens of all processes."""

    def __post_init__(self) -> None:
        if not abs(self.coef) < float("inf"):
            raise ValueError(f"length_coef must be a finite number, got {self.coef}.")
        if not 0.0 <= self.lam <= 1.0:
            raise ValueError(f"length_lambda must lie in [0, 1], got {self.lam}.")
        if not abs(self.threshold) < float("inf"):
            raise ValueError(f"length_gate_threshold must be a finite number, got {self.threshold}.")
        if self.gate not in get_args(LengthGate):
            raise ValueError(f"length_gate must be one of {', '.join(get_args(LengthGate))}, got {self.gate!r}.")
        if self.scale not in get_args(LengthScale):
            raise ValueError(f"length_scale must be one of {', '.join(get_args(LengthScale))}, got {self.scale!r}.")

    def gates(self, correctness: Tensor, num_generations: int) -> Tensor:
        """The gate of each completion.

        Args:
            correctness: (B,) correctness reward of whole groups, one after the other; nan where it could not be scored.
            num_generations: completions per group.

        Returns:
            (B,) float32 in [0, 1].
        """
        if self.gate == "all":
            return torch.ones_like(correctness, dtype=torch.float32)
        correct = (correctness >= self.threshold).float()  # nan compares as False: unscored is not correct
        if self.gate == "correct":
            return correct
        solve_rate = correct.view(-1, num_generations).mean(1)
        return correct * solve_rate.repeat_interleave(num_generations)


def gated_std(stats: RowStats, gate: Tensor, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> Tensor:
    """Standard deviation of the length advantage over all tokens of the completions that feel it.

    Args:
        stats: of the batch.
        gate: (B,) weights; completions of weight 0 are left out.
        reduce: sums a (3,) tensor over processes.

    Returns:
        0-dim float32, at least `SMALLEST_SCALE`.
    """
    variance = pooled(torch.where(gate > 0, stats.tokens, 0), stats.length, reduce).variance
    return variance.sqrt().clamp(min=SMALLEST_SCALE).float()


def rescaled(advantages: Advantages, mask: Tensor, weight: Tensor) -> Tensor:
    """(B, T) task advantage plus `weight` (B,) times the length advantage: a scale that depends on the advantages is
    known after them, and costs this pass."""
    return torch.where(mask, advantages.task + weight[:, None] * advantages.length, 0)
