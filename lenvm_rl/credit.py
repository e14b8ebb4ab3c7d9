"""How the length signal joins the task signal: which completions feel it, how strongly, on which scale, in which form.

    A_t = A_task + coef * gate * A_len_t / scale                                     (LenVM eq. 27; spec of the gates)

1. The gate is one number per completion. It depends on the outcome, so under a gate other than "all" the critic is no
   longer an unbiased baseline of what it multiplies: the mean of the gated signal need not be zero.
2. The scale divides without centring, so that the sign of every token's signal is kept.
3. What stands in the place of A_len_t, for shaping and for targets, is in `length_signal.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lenvm_rl.advantages import RowStats, pooled
from lenvm_rl.advantages.types import Moments

LengthMode = Literal["additive", "shaping"]
LengthGate = Literal["all", "correct", "solve_rate"]
LengthScale = Literal["none", "std"]
LengthResolution = Literal["token", "completion", "batch"]

SMALLEST_SCALE = 1e-3
"""Floor of the "std" scale: a critic that predicts perfectly leaves no spread to divide by."""


@dataclass(frozen=True)
class LengthCredit:
    """The settings of the length signal.

    Raises:
        ValueError: a setting outside its range, or one that another makes meaningless.
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
    unsolved: bool = False
    """With the gate "all": also groups without a correct completion feel the signal, as in the paper."""
    scale: LengthScale = "none"
    """"none", or "std": the standard deviation of the length advantage over the gated tokens of all processes."""
    mode: LengthMode = "additive"
    """"additive" (eq. 27), or "shaping": potential-based, with the length values as the potential (eq. 28-32)."""
    discounted: bool = False
    """Shaping by gamma * Phi(s') - Phi(s), as the paper writes it, instead of Phi(s') - Phi(s)."""
    clip: float | None = None
    """Largest size of a token's length advantage, after the scale and before the coefficient."""
    resolution: LengthResolution = "token"
    """What shares one number: each "token" has its own, a "completion" has the mean of its tokens, or the "batch" has
    the mean over all gated tokens, which says nothing of length: a control for experiments."""
    targeted: bool = False
    """The signal presses towards a length from both sides."""

    def __post_init__(self) -> None:
        if not abs(self.coef) < float("inf"):
            raise ValueError(f"length_coef must be a finite number, got {self.coef}.")
        if not 0.0 <= self.lam <= 1.0:
            raise ValueError(f"length_lambda must lie in [0, 1], got {self.lam}.")
        if not abs(self.threshold) < float("inf"):
            raise ValueError(f"length_gate_threshold must be a finite number, got {self.threshold}.")
        if self.clip is not None and not 0.0 < self.clip < float("inf"):
            raise ValueError(f"length_clip must be a positive number, or None for no clip, got {self.clip}.")
        choices = {
            "gate": (self.gate, get_args(LengthGate)),
            "scale": (self.scale, get_args(LengthScale)),
            "mode": (self.mode, get_args(LengthMode)),
            "resolution": (self.resolution, get_args(LengthResolution)),
        }
        for name, (value, known) in choices.items():
            if value not in known:
                raise ValueError(f"length_{name} must be one of {', '.join(known)}, got {value!r}.")
        if self.mode == "shaping":
            self._check_shaping()
        elif self.discounted:
            raise ValueError(
                "length_shaping_discounted says which form of shaping is meant: set length_mode='shaping'."
            )
        if self.targeted and self.coef < 0:
            raise ValueError(
                f"length_coef={self.coef} would press away from the length target, without end: make it positive."
            )

    def _check_shaping(self) -> None:
        if self.targeted:
            raise ValueError(
                "length_mode='shaping' does not change what is optimal, so it cannot reach a length target: take "
                "length_mode='additive', or leave the target out."
            )
        if self.lam != 1.0:
            raise ValueError(
                f"length_lambda={self.lam} belongs to the additive length advantage. Under length_mode='shaping' the "
                "rewards are shaped and no length advantage is estimated: leave it at 1."
            )

    @property
    def fused(self) -> bool:
        """`compute_advantages` gives the total at once: nothing depends on a first pass over the batch."""
        return (
            self.mode == "additive"
            and self.scale == "none"
            and self.clip is None
            and self.resolution == "token"
            and not self.targeted
        )

    def gates(self, correctness: Tensor, num_generations: int) -> Tensor:
        """The gate of each completion.

        Args:
            correctness: (B,) correctness reward of whole groups, one after the other; nan where it could not be scored.
            num_generations: completions per group.

        Returns:
            (B,) float32 in [0, 1].
        """
        correct = (correctness >= self.threshold).float()  # nan compares as False: unscored is not correct
        if self.gate == "correct":
            return correct
        if self.gate == "all" and self.unsolved:
            return torch.ones_like(correct)
        solve_rate = correct.view(-1, num_generations).mean(1).repeat_interleave(num_generations)
        return (solve_rate > 0).float() if self.gate == "all" else correct * solve_rate


def gated_std(stats: RowStats, gate: Tensor, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> Tensor:
    """Standard deviation of the length advantage over all tokens of the completions that feel it.

    Args:
        stats: of the batch.
        gate: (B,) weights; completions of weight 0 are left out.
        reduce: sums a (3,) tensor over processes.

    Returns:
        0-dim float32, at least `SMALLEST_SCALE`.
    """
    return std_over_gated(stats.tokens, stats.length, gate, reduce)


def std_over_gated(
    tokens: Tensor, moments: Moments, gate: Tensor, reduce: Callable[[Tensor], Tensor] = lambda sums: sums
) -> Tensor:
    """`gated_std` of any quantity, from the (B,) tokens and moments of its rows."""
    variance = pooled(torch.where(gate > 0, tokens, 0), moments, reduce).variance
    return variance.sqrt().clamp(min=SMALLEST_SCALE).float()
