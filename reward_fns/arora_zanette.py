"""Training language models to reason efficiently (Arora and Zanette, arXiv 2502.04463): a sigmoid of the z-score.

In the comparison of DRPO this reward is called RLOO-LP.
"""

import math
from collections.abc import Sequence
from typing import Any

from reward_fns.accuracy import accuracy_reward
from reward_fns.length_term import Call, Completion, LengthReward, by_prompt
from reward_fns.settings import check_number

_STD_FLOOR = 1e-7  # of the released code


class AroraZanetteReward(LengthReward):
    """Length term of `c * (1 - alpha * sigmoid((L - mean) / std))`, mean and std over the prompt's correct completions:

        -alpha * sigmoid((L - mean) / (std + 1e-7)) * correctness if correct, else 0

    Args:
        correctness: reward function that says what is correct.
        alpha: from 0 to 1; published default 0.1, swept up to 0.4.
        eos_token_ids: end tokens. With them a cut completion counts as wrong, and loses its correctness, as in the
            paper. None leaves cut completions to the correctness function.

    Raises:
        ValueError: a setting outside its range.

    The standard deviation is that of the population; which one the paper means is not verified.
    """

    def __init__(
        self,
        correctness: Any = accuracy_reward,
        alpha: float = 0.1,
        eos_token_ids: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__("arora_zanette_reward", correctness, eos_token_ids=eos_token_ids)
        self.alpha = check_number("alpha", alpha, "above 1 a wrong answer would earn more", at_most=1.0)

    def terms(self, completions: list[Completion], call: Call) -> list[float]:
        terms = [0.0 if completion.finished else -completion.verdict for completion in completions]
        for members in by_prompt(completions).values():
            write_sigmoid_terms(terms, completions, members, self.alpha)
        return terms


def write_sigmoid_terms(
    terms: list[float], completions: Sequence[Completion], members: Sequence[int], alpha: float
) -> None:
    """The terms of a group's correct and finished completions, among themselves; the others' are left as they are.

    Args:
        terms: of all completions, overwritten at those.
        completions: of all groups.
        members: indices of the group.
        alpha: weight of the penalty.
    """
    correct = [index for index in members if completions[index].correct and completions[index].finished]
    shares = sigmoid_of_z_scores([completions[index].tokens for index in correct])
    for index, share in zip(correct, shares, strict=True):
        terms[index] = -alpha * share * completions[index].verdict


def sigmoid_of_z_scores(lengths: Sequence[int]) -> list[float]:
    """1 / (1 + exp(-z)) for the z-score of each length, from 0 (short) to 1 (long); 0.5 where all are equal."""
    if not lengths:
        return []
    mean = sum(lengths) / len(lengths)
    std = math.sqrt(sum((length - mean) ** 2 for length in lengths) / len(lengths))
    # a z-score of n numbers is at most sqrt(n - 1), so the exponential cannot overflow
    return [1 / (1 + math.exp(-(length - mean) / (std + _STD_FLOOR))) for length in lengths]
