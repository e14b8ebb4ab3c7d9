"""The control modes of the authors' released server, under their names.

Those that mean what they say are thin variants of ours; three are refused, each with what to use in its place. The
server's defects (candidates that see each other, unguided requests that lose their truncation, an end two tokens late,
modes that change when requests are mixed) are not part of a mode.
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lenvm_rl.decoding.controls import (
    Candidates,
    LengthControl,
    LengthTarget,
    LengthTilt,
    SoftTarget,
    tilt_to_mean,
)

__all__ = ["OFFICIAL_MODES", "MeanTilt", "official_control"]

_RULES = ("mul", "linear", "exp", "length_mul")
OFFICIAL_MODES = ("centered_exp", *_RULES, "eq", "eq_soft")
"""Names that `official_control` takes."""

_REFUSED = {
    "value_bias": "it tilts by the raw logit, whose size at an end token is unbounded for a good critic (z goes to "
    "minus infinity), so that any scale below 0 ends at once. Use centered_exp, or LengthTilt(beta)",
    "le": "it takes the shortest candidate in every step and never reads the target. Use AtMost(n)",
    "ge": "it takes the longest candidate until the target is reached and the shortest afterwards, which is neither "
    "the base distribution nor a natural end. Use AtLeast(n), or AtLeast(n, foresight=True)",
}


@dataclass(frozen=True)
class MeanTilt(LengthControl):
    """The tilt that moves the mean value of the next state as one of the official rules says.

    With E the mean, lowest and highest value over the candidates under the base distribution, and s the scale, the mean
    becomes: `mul` s E; `linear` E + (s - 1)(highest - E) from s = 1 up, E - (1 - s)(E - lowest) below; `exp` the share
    1 - (1 - share of E)^s of the range; `length_mul` the value of s times the length that E stands for. A mean outside
    of the candidates' values takes the nearest one. s = 1 is the base distribution.

    Raises:
        ValueError: an unknown rule, or a scale that is negative or not finite.
    """

    rule: str
    """One of mul, linear, exp, length_mul."""
    scale: float
    """Above 1 lengthens, below 1 shortens."""

    order: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.rule not in _RULES:
            raise ValueError(f"unknown rule {self.rule!r}: it is one of {', '.join(_RULES)}.")
        if not 0 <= self.scale < math.inf:
            raise ValueError(
                f"the rule {self.rule!r} needs a finite scale from 0 up, got {self.scale!r}; 1 changes nothing."
            )

    @property
    def kind(self) -> Hashable:
        return type(self), self.rule

    def parameters(self) -> tuple[float, ...]:
        return (self.scale,)

    def needs_critic(self, generated: int) -> bool:
        return self.scale != 1

    def reweight(self, log_weights: Tensor, candidates: Candidates, parameters: Tensor) -> Tensor:
        values, scale = candidates.values, parameters[:, 0]
        alive = log_weights.isfinite()
        mean = (log_weights.double().softmax(1) * values.masked_fill(~alive, 0.0)).sum(1)
        lowest = values.masked_fill(~alive, math.inf).amin(1)
        highest = values.masked_fill(~alive, -math.inf).amax(1)
        if self.rule == "mul":
            target = scale * mean
        elif self.rule == "linear":
            target = torch.where(
                scale >= 1, mean + (scale - 1) * (highest - mean), mean - (1 - scale) * (mean - lowest)
            )
        elif self.rule == "exp":
            share = ((mean - lowest) / (highest - lowest).clamp(min=1e-12)).clamp(0, 1)
            target = lowest + (1 - (1 - share) ** scale) * (highest - lowest)
        else:
            # gamma^(s L) with gamma^L = 1 - E: the discount cancels
            target = 1 - (1 - mean) ** scale
        return tilt_to_mean(log_weights, values, target, torch.full_like(target, math.inf))


def official_control(mode: str, *, scale: float | None = None, target_length: int | None = None) -> LengthControl:
    """A control by the name of the authors' server.

    Args:
        mode: `centered_exp` (a tilt by `scale`), `mul`, `linear`, `exp`, `length_mul` (see `MeanTilt`), `eq`
            (`LengthTarget`), `eq_soft` (`SoftTarget` without a bound).
        scale: of the first five.
        target_length: of the last two, in tokens, end token included.

    Raises:
        ValueError: a mode that is unknown or refused, or the wrong parameter for it.
    """
    if mode in _REFUSED:
        raise ValueError(f"the official mode {mode!r} is not offered: {_REFUSED[mode]}.")
    if mode not in OFFICIAL_MODES:
        raise ValueError(f"unknown mode {mode!r}: it is one of {', '.join(OFFICIAL_MODES)}.")
    takes_length = mode in ("eq", "eq_soft")
    given, other = (target_length, scale) if takes_length else (scale, target_length)
    if given is None or other is not None:
        wanted, unused = ("target_length", "scale") if takes_length else ("scale", "target_length")
        raise ValueError(f"the mode {mode!r} takes {wanted} and no {unused}.")
    if mode == "eq":
        return LengthTarget(given)  # type: ignore[arg-type]
    if mode == "eq_soft":
        return SoftTarget(given, max_beta=math.inf)  # type: ignore[arg-type]
    return LengthTilt(given) if mode == "centered_exp" else MeanTilt(mode, given)
