"""A coefficient of the length signal that changes during training: under a constraint, or on a schedule.

1. A constraint is kept by dual ascent on the logarithm of the coefficient: every batch of rollouts multiplies it by
   exp(rate * slack), slack being how far the policy is on the right side of the target. A start that is ten times off
   is forgotten within some ten batches, and the coefficient never changes its sign.
2. What is measured is smoothed over batches, of the prompts that were really seen, before any of them was replaced.
3. The first batches change nothing: they say where the policy started.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

ControllerKind = Literal["none", "accuracy", "tokens", "linear", "cosine"]
SCHEDULES = ("linear", "cosine")


@dataclass(frozen=True)
class ControllerSettings:
    """What the coefficient follows.

    Raises:
        ValueError: a setting outside its range, or one that the kind needs and that is missing.
    """

    kind: ControllerKind = "none"
    """"accuracy" keeps the share of correct completions at a target or above, and shortens as far as that allows;
    "tokens" reaches a mean length and holds it; "linear" and "cosine" go from the first coefficient to `end`."""
    target: float | None = None
    """Share of correct completions, or mean tokens. None with "accuracy": that of the warm-up, minus `margin`."""
    margin: float = 0.01
    """Accuracy that may be given away, where the target is the policy's own start."""
    rate: float = 2.0
    """Change of the coefficient's logarithm in one batch, for a slack of 1: one point of accuracy above the target
    raises it by 2 %."""
    smoothing: float = 0.9
    """Weight of the past in the mean over batches."""
    warmup: int = 5
    """Batches before the first change."""
    low: float = 0.01
    """Least size of the coefficient."""
    high: float = 10.0
    """Largest size of the coefficient."""
    end: float = 0.0
    """Coefficient at the end of a schedule."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(ControllerKind):
            raise ValueError(
                f"length_controller must be one of {', '.join(get_args(ControllerKind))}, got {self.kind!r}."
            )
        if self.kind == "accuracy" and self.target is not None and not 0.0 < self.target <= 1.0:
            raise ValueError(
                f"length_controller_target is a share of correct completions, in (0, 1], got {self.target}."
            )
        if self.kind == "tokens" and not (self.target is not None and 0.0 < self.target < math.inf):
            raise ValueError(
                "length_controller='tokens' needs the mean length to reach, got "
                f"length_controller_target={self.target}."
            )
        ranges = {
            "margin": 0.0 <= self.margin < 1.0,
            "rate": 0.0 < self.rate < math.inf,
            "smoothing": 0.0 <= self.smoothing < 1.0,
            "warmup": self.warmup >= 1,
            "low": 0.0 < self.low < math.inf,
            "high": self.low < self.high < math.inf,
            "end": abs(self.end) < math.inf,
        }
        for name, fits in ranges.items():
            if not fits:
                raise ValueError(
                    f"length_controller_{name}={getattr(self, name)} is out of range: margin and smoothing lie in "
                    "[0, 1), rate and low above 0, high above low, warmup is at least 1."
                )


def check_start(settings: ControllerSettings, coef: float) -> None:
    """Refuse a controller or a schedule that begins at nothing.

    Raises:
        ValueError: a coefficient of 0, which has no logarithm and turns the length signal off.
    """
    if settings.kind != "none" and coef == 0.0:
        raise ValueError(
            f"length_controller={settings.kind!r} starts from length_coef, which is 0, and cannot leave 0: set it to "
            "where the coefficient should start."
        )


class LengthController:
    """The coefficient and what it has seen; the same on every process.

    Args:
        settings: of kind "accuracy" or "tokens".
        coef: where it starts, not 0. A negative one lengthens, and its size is controlled.

    Raises:
        ValueError: a coefficient of 0, which has no logarithm.
    """

    def __init__(self, settings: ControllerSettings, coef: float) -> None:
        check_start(settings, coef)
        self.settings = settings
        self.coef = math.copysign(min(max(abs(coef), settings.low), settings.high), coef)
        self.target = settings.target
        self._batches, self._weight, self._mean, self._start = 0, 0.0, 0.0, 0.0

    @property
    def measured(self) -> float:
        """Smoothed accuracy or length; nan before the first batch."""
        return self._mean / self._weight if self._weight else math.nan

    def observe(self, accuracy: float, tokens: float) -> None:
        """Count a batch of rollouts, and adapt the coefficient for the next one.

        Args:
            accuracy: share of correct completions, over all processes.
            tokens: mean length, over all processes.
        """
        settings = self.settings
        seen = accuracy if settings.kind == "accuracy" else tokens
        self._mean = settings.smoothing * self._mean + (1 - settings.smoothing) * seen
        self._weight = settings.smoothing * self._weight + (1 - settings.smoothing)
        self._batches += 1
        if self._batches <= settings.warmup:
            self._start += accuracy / settings.warmup
            return
        if self.target is None:
            self.target = max(self._start - settings.margin, 0.0)
        self._step(self.target)

    def _step(self, target: float) -> None:
        if self.settings.kind == "accuracy":
            slack = self.measured - target
        else:  # too long asks for more pressure; a coefficient that lengthens, for less
            slack = math.copysign(1.0, self.coef) * (self.measured - target) / target
        size = abs(self.coef) * math.exp(self.settings.rate * slack)
        self.coef = math.copysign(min(max(size, self.settings.low), self.settings.high), self.coef)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "coef": self.coef,
            "target": self.target,
            "batches": self._batches,
            "weight": self._weight,
            "mean": self._mean,
            "start": self._start,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a checkpoint stopped. A target in the settings wins over the one of the checkpoint."""
        self.coef, self._batches = state["coef"], state["batches"]
        self._weight, self._mean, self._start = state["weight"], state["mean"], state["start"]
        self.target = self.settings.target if self.settings.target is not None else state["target"]


def scheduled(settings: ControllerSettings, coef: float, progress: float) -> float:
    """Coefficient of a schedule.

    Args:
        settings: of kind "linear" or "cosine".
        coef: at the start.
        progress: share of the run that is done, in [0, 1].
    """
    left = 1.0 - progress if settings.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return settings.end + (coef - settings.end) * left
