"""The length reward of Kimi k1.5 (arXiv 2501.12599): where a completion lies between the shortest and the longest."""

from typing import Any

from reward_fns.accuracy import accuracy_reward
from reward_fns.length_term import Call, Completion, LengthReward, by_prompt
from reward_fns.settings import check_count, check_number


class KimiLengthReward(LengthReward):
    """Length term of Kimi k1.5, over the completions of a prompt, wrong ones included:

        f = 0.5 - (L - L_min) / (L_max - L_min);  correct: f;  wrong: min(0, f);  0 if L_max = L_min

    Args:
        correctness: reward function that says what is correct.
        weight: of the term. That of the report is not verified; a re-implementation (Laser's) uses 0.4.
        warmup_steps: training steps without length term, from the report, which gives no number.

    Raises:
        ValueError: a setting outside its range.
    """

    def __init__(self, correctness: Any = accuracy_reward, weight: float = 1.0, warmup_steps: int = 0) -> None:
        super().__init__("kimi_length_reward", correctness)
        self.weight = check_number("weight", weight, "the published reward is never negated")
        self.warmup_steps = check_count("warmup_steps", warmup_steps, "0 applies the term from the start", at_least=0)

    def terms(self, completions: list[Completion], call: Call) -> list[float]:
        terms = [0.0] * len(completions)
        if self.warmup_steps and call.step_for("warmup_steps") < self.warmup_steps:
            return terms
        for members in by_prompt(completions).values():
            lengths = [completions[index].tokens for index in members]
            shortest, longest = min(lengths), max(lengths)
            if shortest == longest:
                continue
            for index in members:
                f = 0.5 - (completions[index].tokens - shortest) / (longest - shortest)
                terms[index] = self.weight * (f if completions[index].correct else min(0.0, f))
        return terms
