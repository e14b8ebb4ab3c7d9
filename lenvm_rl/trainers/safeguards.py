"""What keeps the length signal from doing harm: trust in a critic as far as it explains, and an end to a collapse."""

import logging
import math
from typing import Any

from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

SMOOTHING = 0.9
"""Weight of the past in the means that a collapse is judged by."""


def trust_in(explained_variance: float, floor: float) -> float:
    """Share of the coefficient that a critic deserves: 1 from the floor on, 0 where it explains nothing.

    Args:
        explained_variance: on the latest rollouts; nan, where all remainders are equal, is no evidence against it.
        floor: in [0, 1); 0 trusts every critic.
    """
    if floor == 0.0 or not explained_variance < floor:
        return 1.0
    return max(explained_variance, 0.0) / floor


class Trust:
    """`trust_in` a critic, and a line in the log where it becomes less than whole.

    Args:
        floor: of `trust_in`.
        accelerator: the trainer's; its main process speaks.
    """

    def __init__(self, floor: float, accelerator: Accelerator) -> None:
        self.floor, self.accelerator = floor, accelerator
        self._whole = True

    def __call__(self, explained_variance: float, *, training: bool) -> float:
        """The trust in a critic that explains so much of a batch; only training batches are spoken of."""
        trust = trust_in(explained_variance, self.floor)
        if training and trust < 1.0 and self._whole and self.accelerator.is_main_process:
            logger.warning(
                "The length critic explains %.2f of the variance of the latest rollouts, less than "
                "length_critic_trust=%s: the length signal is scaled by %.2f, and by more or less as that changes.",
                explained_variance,
                self.floor,
                trust,
            )
        self._whole = trust == 1.0 if training else self._whole
        return trust


class CollapseDetector:
    """Says when a policy has been losing accuracy and length together for too long; the same on every process.

    Args:
        patience: batches in a row with accuracy under its best by more than `drop`, and completions shorter than then.
        drop: share of correct completions.
    """

    def __init__(self, patience: int, drop: float) -> None:
        self.patience, self.drop = patience, drop
        self._accuracy = self._tokens = self._weight = 0.0
        self._best, self._tokens_then, self._fallen = 0.0, 0.0, 0
        self._batches = 0

    def observe(self, accuracy: float, tokens: float) -> None:
        """Count a batch of rollouts: its share of correct completions, nan without a verdict, and its mean length."""
        if math.isnan(accuracy):
            return
        self._batches += 1
        self._weight = SMOOTHING * self._weight + 1 - SMOOTHING
        self._accuracy = SMOOTHING * self._accuracy + (1 - SMOOTHING) * accuracy
        self._tokens = SMOOTHING * self._tokens + (1 - SMOOTHING) * tokens
        accuracy, tokens = self._accuracy / self._weight, self._tokens / self._weight
        if self._batches <= 1 / (1 - SMOOTHING):
            self._best, self._tokens_then = accuracy, tokens  # a mean of few batches says little
            return
        if accuracy >= self._best:
            self._best, self._tokens_then = accuracy, tokens
        fallen = self._best - accuracy > self.drop and tokens < self._tokens_then
        self._fallen = self._fallen + 1 if fallen else 0

    @property
    def verdict(self) -> str | None:
        """What happened and what to do, once it has."""
        if not self.patience or self._fallen < self.patience:
            return None
        accuracy, tokens = self._accuracy / self._weight, self._tokens / self._weight
        return (
            f"The policy is collapsing: accuracy fell from {self._best:.0%} to {accuracy:.0%} while completions went "
            f"from {self._tokens_then:.0f} to {tokens:.0f} tokens, for {self._fallen} batches of rollouts. Training "
            "stops here. Go on from an earlier checkpoint with a lower length_coef, start again with "
            "length_controller='accuracy', or set length_collapse_patience=0 to go on regardless."
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {name: value for name, value in vars(self).items() if name.startswith("_")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a checkpoint stopped. After a collapse, patience begins anew: someone chose to go on."""
        vars(self).update(state)
        if self.verdict is not None:
            self._fallen = 0


class StopOnCollapse(TrainerCallback):
    """Ends training, with a checkpoint where the run saves any, once a detector has spoken.

    Args:
        detector: sees every batch of rollouts.
    """

    def __init__(self, detector: CollapseDetector) -> None:
        self.detector = detector
        self._said = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        verdict = self.detector.verdict
        if verdict is None:
            return
        control.should_training_stop = True
        control.should_save = args.save_strategy != "no"
        if not self._said and state.is_world_process_zero:
            logger.error(verdict)
        self._said = True
