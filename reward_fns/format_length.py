"""Surrogate signals from format and length (arXiv 2505.19439): a reward without gold answers.

The policy is paid for presenting an answer and for a length near half of the budget. It fails by design where format
and length say nothing about being right.
"""

from typing import Any

from reward_fns.format import format_reward
from reward_fns.length_term import Call, Completion, LengthReward
from reward_fns.settings import check_count, check_number


class FormatLengthReward(LengthReward):
    """Length term of Format-Length, with x = L / longest, no more than 1:

        f = 1 - (1 - x/p)^2 up to p, then 1 - 2 ((x - p)/(1 - p))^2;  f with the format, min(0, f) without

    Args:
        format_func: reward function that is positive for a completion in the expected format.
        peak: p, where the bump is, as a share of `longest`; published 0.5.
        longest: tokens, published 3072.

    Raises:
        ValueError: a setting outside its range.

    The published format part is 0.5: `reward_funcs=[format_reward, FormatLengthReward()]`, `reward_weights=[0.5, 1.0]`.
    Beyond `longest`, where the formula ends, f stays -1.
    """

    grouped = False

    def __init__(self, format_func: Any = format_reward, peak: float = 0.5, longest: int = 3072) -> None:
        super().__init__("format_length_reward", format_func)
        self.peak = check_number(
            "peak", peak, "a share of `longest`, with room on both sides", at_least=1e-6, at_most=0.999999
        )
        self.longest = check_count("longest", longest, "a number of tokens")

    def terms(self, completions: list[Completion], call: Call) -> list[float]:
        return [self._bump(c.tokens) if c.verdict > 0 else min(0.0, self._bump(c.tokens)) for c in completions]

    def _bump(self, tokens: int) -> float:
        x = min(1.0, tokens / self.longest)
        if x <= self.peak:
            return 1 - (1 - x / self.peak) ** 2
        return 1 - 2 * ((x - self.peak) / (1 - self.peak)) ** 2
