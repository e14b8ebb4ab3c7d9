"""A coefficient of the length signal that changes during training: under a constraint, or on a schedule.

1. **Accuracy** is kept by dual ascent on the logarithm of the coefficient: every batch of rollouts multiplies it by
   exp(rate * slack), slack being how far the policy is on the right side of the target. A start that is ten times off
   is soon forgotten, and the coefficient never changes its sign. An accuracy above the policy's start cannot be kept
   yet: it is due at the end of training, and until then what is required rises with the square of the progress. A
   policy learns fast first and slowly then, so it is not held to a target from the beginning that it will soon pass.
2. **A mean length** is reached and held by a coefficient of either sign, rate * log(length / due). The coefficient does
   not set the length but its change: a policy that was shortened stays short at 0, and one that became too short comes
   back slowly, with no longer completions to learn from. So it is led: what is due goes evenly, in its logarithm, from
   the length at the start to the target, in the first `DUE` of the training. The sum of all excesses, but for the lag
   on that way, is added to the coefficient over `INTEGRAL_BATCHES`, against a drift of the policy's own.
3. What is measured is smoothed over batches, of the prompts that were really seen, before any of them was replaced.
4. The first batches change nothing: they say where the policy started. Under "accuracy" nothing presses it in them, and
   their standard error is taken off: they are few, and a start that they overrate would be required for good.
5. While the critic is not trusted, what the policy does says nothing of the coefficient, which waits.
"""

import math
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, Literal, get_args

ControllerKind = Literal["none", "accuracy", "tokens", "linear", "cosine"]
CONTROLLERS = ("accuracy", "tokens")
"""Kinds that follow what they measure."""
SCHEDULES = ("linear", "cosine")
"""Kinds that follow the progress of the run alone."""
INTEGRAL_BATCHES = 30
"""Batches of a constant excess in which its sum weighs as much as the excess itself."""

DUE = 0.5
"""Share of the training in which the policy is led to a mean length; the rest holds it."""


@dataclass(frozen=True)
class ControllerSettings:
    """What the coefficient follows.

    Raises:
        ValueError: a setting outside its range, or one that the kind needs and that is missing.
    """

    kind: ControllerKind = "none"
    """"accuracy" keeps the share of correct completions at a target or above, and shortens as far as that allows;
    "tokens" leads to a mean length and holds it; "linear" and "cosine" go from the first coefficient to `end`."""
    target: float | None = None
    """Share of correct completions, or mean tokens. None with "accuracy": that of the warm-up, minus `margin` and its
    standard error. A share above that is due at the end of training."""
    margin: float = 0.01
    """Accuracy that may be given away, where the target is the policy's own start, beside the standard error of it."""
    rate: float = 3.0
    """Change of the coefficient's logarithm in one batch, for a slack of 1: a point above the target raises it by 3 %.
    With "tokens": the coefficient for a length e times what is due."""
    smoothing: float = 0.7
    """Weight of the past in the mean over batches. More of it makes the controller late, and so unstable."""
    warmup: int = 5
    """Batches before the first change."""
    low: float = 0.05
    """Least size of the coefficient under "accuracy": it has no effect, and from there the way back is short."""
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
    """Refuse a first coefficient that a controller or a schedule could not go on from.

    Raises:
        ValueError: 0, which means no length signal at all, or a size beyond the controller's bounds.
    """
    if settings.kind == "none":
        return
    if coef == 0.0:
        raise ValueError(
            f"length_controller={settings.kind!r} starts from length_coef, which is 0 and means a run without any "
            "length signal: set it to where the coefficient should start."
        )
    low = settings.low if settings.kind == "accuracy" else 0.0
    if settings.kind in CONTROLLERS and not low <= abs(coef) <= settings.high:
        raise ValueError(
            f"length_controller={settings.kind!r} starts from length_coef={coef}, which lies beyond its bounds, "
            f"{low} and {settings.high}: move length_controller_low or _high, or start between them."
        )


class LengthController:
    """The coefficient and what it has seen; the same on every process.

    Args:
        settings: of one of the kinds `CONTROLLERS`.
        coef: where it starts, not 0. Under "accuracy" a negative one lengthens, and its size is controlled; under
            "tokens" it is that of the first batches.

    Raises:
        ValueError: as `check_start`.
    """

    def __init__(self, settings: ControllerSettings, coef: float) -> None:
        check_start(settings, coef)
        self.settings = settings
        self._coef = coef
        self.target = settings.target
        self.trust = 1.0
        """Share of the coefficient that the policy felt in the latest batch; the next step is as much smaller."""
        self._batches, self._weight, self._mean, self._offset = 0, 0.0, 0.0, 0.0
        self._first: list[float] = []

    @property
    def coef(self) -> float:
        """Of the next batch."""
        return 0.0 if self.settings.kind == "accuracy" and self._batches < self.settings.warmup else self._coef

    @property
    def measured(self) -> float:
        """Smoothed accuracy or length; nan before the first batch."""
        return self._mean / self._weight if self._weight else math.nan

    def observe(self, accuracy: float, tokens: float, progress: float = 1.0) -> None:
        """Count a batch of rollouts, and adapt the coefficient for the next one.

        Args:
            accuracy: share of correct completions, over all processes; nan where none could be scored, which tells
                "accuracy" nothing.
            tokens: mean length, over all processes.
            progress: share of the training that is done, in [0, 1].
        """
        settings = self.settings
        seen = accuracy if settings.kind == "accuracy" else tokens
        if math.isnan(seen):
            return
        self._mean = settings.smoothing * self._mean + (1 - settings.smoothing) * seen
        self._weight = settings.smoothing * self._weight + (1 - settings.smoothing)
        self._batches += 1
        if self._batches <= settings.warmup:
            self._first.append(seen)
            return
        if self.target is None:
            self.target = self._least_at_start()
        if settings.kind == "accuracy":
            self._ascend(self._required(self.target, progress))
        else:
            self._regulate(self.target, progress)

    def _required(self, target: float, progress: float) -> float:
        start = self._least_at_start()
        return start + progress**2 * (target - start) if target > start else target

    def _least_at_start(self) -> float:
        error = stdev(self._first) / math.sqrt(len(self._first)) if len(self._first) > 1 else 0.0
        return max(fmean(self._first) - error - self.settings.margin, 0.0)

    def _ascend(self, required: float) -> None:
        size = abs(self._coef) * math.exp(self.settings.rate * self.trust * (self.measured - required))
        self._coef = math.copysign(min(max(size, self.settings.low), self.settings.high), self._coef)

    def _regulate(self, target: float, progress: float) -> None:
        start, left = max(fmean(self._first), 1.0), max(1.0 - progress / DUE, 0.0)
        due = target * (start / target) ** left
        excess = math.log(max(self.measured, 1.0) / due)
        wanted = self.settings.rate * excess + self._offset
        self._coef = min(max(wanted, -self.settings.high), self.settings.high)
        if progress < DUE and excess * math.log(start / target) > 0:
            return  # the lag of a policy that is led, summed up, would drive it past the target
        if self._coef == wanted or wanted * excess < 0:  # a sum that grew at the bound would have to shrink first
            self._offset += self.settings.rate * self.trust * excess / INTEGRAL_BATCHES

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "kind": self.settings.kind,
            "coef": self._coef,
            "target": self.target,
            "batches": self._batches,
            "weight": self._weight,
            "mean": self._mean,
            "first": list(self._first),
            "offset": self._offset,
            "trust": self.trust,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a checkpoint stopped. A target in the settings wins over the one of the checkpoint.

        Raises:
            ValueError: the checkpoint is of a run under another controller.
        """
        if state.get("kind") != self.settings.kind:
            raise ValueError(
                f"The checkpoint's coefficient was under length_controller={state.get('kind')!r}, this run's is under "
                f"{self.settings.kind!r}: resume with what the checkpoint had, or start a new run from its weights."
            )
        self._coef, self._batches = state["coef"], state["batches"]
        self._weight, self._mean, self._first = state["weight"], state["mean"], list(state["first"])
        self._offset, self.trust = state["offset"], state["trust"]
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
