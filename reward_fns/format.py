r"""The format reward: whether a completion presents an answer that the accuracy reward can find.

A completion has the format when

1. its reasoning, if any, is one `<think>...</think>` block that opens the completion (TRL's `think_format_reward`), and
2. the rest holds exactly one `\boxed{...}`, closed and not empty, with hardly anything after it.

Boxes inside the reasoning are thoughts, and do not count.
"""

from collections.abc import Sequence
from typing import Literal, get_args

from reward_fns.answers import box_spans
from reward_fns.completions import completion_text

Think = Literal["optional", "required", "opened_by_prompt"]


class FormatReward:
    r"""Reward function for `GRPOTrainer` and its like: 1.0 for a completion in the expected format, else 0.0.

    Args:
        think: "optional" allows a completion without tags; "required" does not; "opened_by_prompt" is for chat
            templates whose prompt ends in `<think>`, so that the completion holds only `</think>`.
        trailing_characters: how many may follow the box, white space at the end not counted. The default leaves room
            for the end of a formula, a full stop or a unit, not for a second answer.

    Raises:
        ValueError: a parameter outside its range.
    """

    __name__: str

    def __init__(self, think: Think = "optional", trailing_characters: int = 32) -> None:
        if think not in get_args(Think):
            raise ValueError(f"think is {think!r}, but must be one of {list(get_args(Think))}.")
        if isinstance(trailing_characters, bool) or not isinstance(trailing_characters, int) or trailing_characters < 0:
            raise ValueError(f"trailing_characters is {trailing_characters!r}, but must be an integer of at least 0.")
        self.think = think
        self.trailing_characters = trailing_characters
        self.__name__ = "format_reward"

    def __call__(self, completions: Sequence[object], **kwargs: object) -> list[float]:
        """Rewards of a batch.

        Args:
            completions: B strings, or B lists of messages.
            **kwargs: whatever else the trainer passes; unused.

        Returns:
            B floats, 1.0 or 0.0.
        """
        return [float(self._has_format(completion_text(completion))) for completion in completions]

    def _has_format(self, text: str) -> bool:
        presented = self._without_reasoning(text)
        if presented is None or presented.count("\\boxed") != 1:
            return False
        spans = box_spans(presented)
        if len(spans) != 1:
            return False
        start, end = spans[0]
        trailing = presented[end + 1 :].rstrip()
        return bool(presented[start:end].strip()) and len(trailing) <= self.trailing_characters

    def _without_reasoning(self, text: str) -> str | None:
        """What follows the reasoning, None where the reasoning is not as expected."""
        opened, closed = text.count("<think>"), text.count("</think>")
        if self.think == "optional" and opened == closed == 0:
            return text
        if self.think == "opened_by_prompt":
            return text.partition("</think>")[2] if (opened, closed) == (0, 1) else None
        if (opened, closed) != (1, 1) or not text.lstrip().startswith("<think>"):
            return None
        return text.partition("</think>")[2]

    def __repr__(self) -> str:
        return f"FormatReward(think={self.think!r}, trailing_characters={self.trailing_characters})"


format_reward = FormatReward()
