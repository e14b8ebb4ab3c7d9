"""ALP, the adaptive length penalty (arXiv 2506.05256): tokens cost more on prompts that are solved more often."""

from typing import Any

from reward_fns.accuracy import accuracy_reward
from reward_fns.length_term import Call, Completion, LengthReward, by_prompt
from reward_fns.settings import check_number


class ALPReward(LengthReward):
    """Length term of ALP, for correct and wrong completions alike, with K completions of the prompt:

        -beta * L * max(share of correct completions, 1/K)

    UNVERIFIED: our source for the formula is secondary and inconsistent (it may have lost the factor L, and has a
    normalisation constant that it does not define); this is the intended form, from memory.

    Args:
        correctness: reward function that says what is correct.
        beta: per token; 1e-7 in our source, which others tuned between 1e-9 and 1e-7. Such values matter only where
            the trainer divides by the standard deviation of a group whose completions are all equally correct.

    Raises:
        ValueError: a setting outside its range.
    """

    def __init__(self, correctness: Any = accuracy_reward, beta: float = 1e-7) -> None:
        super().__init__("alp_reward", correctness)
        self.beta = check_number("beta", beta, "a penalty per token")

    def terms(self, completions: list[Completion], call: Call) -> list[float]:
        terms = [0.0] * len(completions)
        for members in by_prompt(completions).values():
            solved = max(1, sum(completions[index].correct for index in members)) / len(members)
            for index in members:
                terms[index] = -self.beta * completions[index].tokens * solved
        return terms
