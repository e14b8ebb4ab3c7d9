"""HAPO: shorter than the shortest correct answer so far (arXiv 2505.11225).

The reward remembers, for every prompt, how long correct completions were. It knows nothing of a prompt until one was
correct, so it has no effect in the first epoch, and none where no prompt comes twice.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from reward_fns.accuracy import accuracy_reward
from reward_fns.length_term import Call, Completion, LengthReward, by_prompt
from reward_fns.settings import check_choice, check_number

Mode = Literal["min", "mean"]
Shape = Literal["cosine", "linear"]


class HistoryAwareLengthReward(LengthReward):
    """Length term of HAPO, with h the history of the prompt from before the batch and L the length.

        cosine:  f = cos(pi/2 * min(L/h, 2));  correct: max(correct_floor, f);  wrong: min(0, f)
        linear:  L < h: 1 - L/h if correct, 0 if wrong;  h <= L < (1 + tolerance) h: 0;
                 beyond: -(L - (1 + tolerance) h)/h, at least correct_floor if correct, at least -1 if wrong
        no history: 0

    Args:
        correctness: reward function that says what is correct.
        mode: "min", h is the shortest correct length seen; "mean", the mean of all correct lengths seen.
        shape: "cosine", or "linear".
        weight: w, from 0 to 1, published 1. At 1, a long correct answer (1 - 0.7) still earns more than a wrong one.
        correct_floor: c, the least term of a correct completion, published -0.7.
        tolerance: share of h by which the linear shape lets a completion be longer, published 0.1.

    Raises:
        ValueError: a setting outside its range.

    The history grows in training only; evaluation reads it. Save it with the checkpoint: `state_dict` goes through
    JSON. In several processes all hold the same history, and all must load it.

    Logs `history_aware_length_reward/known`, the share of completions whose prompt has a history.
    """

    def __init__(
        self,
        correctness: Any = accuracy_reward,
        mode: Mode = "min",
        shape: Shape = "cosine",
        weight: float = 1.0,
        correct_floor: float = -0.7,
        tolerance: float = 0.1,
    ) -> None:
        super().__init__("history_aware_length_reward", correctness)
        check_choice("mode", mode, get_args(Mode))
        check_choice("shape", shape, get_args(Shape))
        self.mode = mode
        self.shape = shape
        self.weight = check_number("weight", weight, "above 1, a wrong answer could earn more", at_most=1.0)
        self.correct_floor = check_number(
            "correct_floor", correct_floor, "the least term of a correct completion", at_least=-1.0, at_most=0.0
        )
        self.tolerance = check_number("tolerance", tolerance, "a share of the history's length")
        self._calls = 0
        # of each prompt: the shortest correct length ("min") or the sum of all ("mean"), and how many there were
        self._history: dict[str, tuple[int, int]] = {}

    def history(self, prompt_key: str) -> float | None:
        """h, in tokens, of the prompt with this key (`prompts.prompt_keys`); None if it was never solved."""
        if prompt_key not in self._history:
            return None
        tokens, count = self._history[prompt_key]
        return float(tokens) if self.mode == "min" else tokens / count

    def terms(self, completions: list[Completion], call: Call) -> list[float]:
        lengths = [self.history(completion.prompt) for completion in completions]
        terms = [
            0.0 if length is None else self.weight * self._term(completion.tokens, length, completion.correct)
            for completion, length in zip(completions, lengths, strict=True)
        ]
        if call.training:
            self._remember(completions)
        if call.log_metric is not None:
            known = sum(length is not None for length in lengths)
            call.log_metric(f"{self.__name__}/known", known / len(lengths) if lengths else 0.0)
        return terms

    def fingerprint(self) -> tuple[int, int, int]:
        # enough to notice a history that was loaded in some processes only
        return self._calls, len(self._history), sum(tokens for tokens, _ in self._history.values())

    def state_dict(self) -> dict[str, Any]:
        """The history, made of what JSON can hold."""
        return {
            "mode": self.mode,
            "calls": self._calls,
            "history": {key: list(entry) for key, entry in self._history.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with a history from `state_dict`.

        Raises:
            ValueError: it is none, or of the other mode.
        """
        try:
            mode, calls = state["mode"], int(state["calls"])
            history = {str(key): (int(tokens), int(count)) for key, (tokens, count) in state["history"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"this is no state of a HistoryAwareLengthReward ({type(error).__name__}: {error}): pass what "
                "state_dict() returned."
            ) from error
        if mode != self.mode:
            raise ValueError(
                f"the history was kept with mode={mode!r}, but this reward has mode={self.mode!r}, which cannot be "
                "computed from it: construct the reward with the same mode."
            )
        self._calls, self._history = calls, history

    def _term(self, tokens: int, length: float, correct: bool) -> float:
        if self.shape == "cosine":
            f = math.cos(math.pi / 2 * min(tokens / length, 2.0))
            return max(self.correct_floor, f) if correct else min(0.0, f)
        if tokens < length:
            return 1 - tokens / length if correct else 0.0
        allowed = (1 + self.tolerance) * length
        if tokens < allowed:
            return 0.0
        return max(self.correct_floor if correct else -1.0, -(tokens - allowed) / length)

    def _remember(self, completions: list[Completion]) -> None:
        self._calls += 1
        for prompt, members in by_prompt(completions).items():
            # an empty completion has no ratio to others
            correct = [max(1, completions[index].tokens) for index in members if completions[index].correct]
            if not correct:
                continue
            tokens, count = self._history.get(prompt, (None, 0))
            if self.mode == "min":
                shortest = min(correct) if tokens is None else min(tokens, *correct)
                self._history[prompt] = shortest, count + len(correct)
            else:
                self._history[prompt] = (tokens or 0) + sum(correct), count + len(correct)
