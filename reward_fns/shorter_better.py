"""ShorterBetter (arXiv 2504.21370): as near as possible to the shortest correct completion of the group."""

from typing import Any

from reward_fns.accuracy import accuracy_reward
from reward_fns.length_term import Call, Completion, LengthReward, by_prompt
from reward_fns.settings import check_number


class ShorterBetterReward(LengthReward):
    """Length term of ShorterBetter, for correct and wrong completions alike:

        -beta * |L - SOL|, with SOL the least length of a correct completion of the prompt, or, where none is correct,
        the mean length of all

    Args:
        correctness: reward function that says what is correct.
        beta: per token; published 0.001, for completions of up to 6000 tokens.

    Raises:
        ValueError: a setting outside its range.

    The published reward weighs correctness by 2: set `reward_weights=[2.0, 1.0]` in the trainer.
    """

    def __init__(self, correctness: Any = accuracy_reward, beta: float = 0.001) -> None:
        super().__init__("shorter_better_reward", correctness)
        self.beta = check_number("beta", beta, "a penalty per token")

    def terms(self, completions: list[Completion], call: Call) -> list[float]:
        terms = [0.0] * len(completions)
        for members in by_prompt(completions).values():
            lengths = [completions[index].tokens for index in members]
            correct = [completions[index].tokens for index in members if completions[index].correct]
            optimal = min(correct) if correct else sum(lengths) / len(lengths)
            for index, length in zip(members, lengths, strict=True):
                terms[index] = -self.beta * abs(length - optimal)
        return terms
