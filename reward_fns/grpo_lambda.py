"""GRPO-lambda, "Stable RL for Efficient Reasoning" (arXiv 2505.18086): length pressure on the best-solved prompts only.

Not the GRPO-lambda of credit assignment (2510.00194), nor lambda-GRPO (2510.06870).
"""

import math
from typing import Any

from reward_fns.accuracy import accuracy_reward
from reward_fns.arora_zanette import write_sigmoid_terms
from reward_fns.length_term import Call, Completion, LengthReward, by_prompt
from reward_fns.settings import check_number


class GRPOLambdaReward(LengthReward):
    """Length term of GRPO-lambda: the sigmoid penalty for the prompts with the highest share of correct completions.

        -alpha * sigmoid((L - mean) / std) * correctness if correct and the prompt is among the top share; else 0

    Args:
        correctness: reward function that says what is correct.
        top_share: lambda, the share of the batch's prompts that feel the length; published 0.2. It is rounded up, and
            among equal shares the prompt that comes first in the batch wins: both are choices made here.
        alpha: from 0 to 1. The paper's value is not verified; 0.6 is that of a third-party write-up.

    Raises:
        ValueError: a setting outside its range.

    The formula is known from secondary sources only. The batch is one call in all processes, a generation batch.
    """

    def __init__(self, correctness: Any = accuracy_reward, top_share: float = 0.2, alpha: float = 0.6) -> None:
        super().__init__("grpo_lambda_reward", correctness)
        self.top_share = check_number("top_share", top_share, "a share of the batch's prompts", at_most=1.0)
        self.alpha = check_number("alpha", alpha, "above 1 a wrong answer would earn more", at_most=1.0)

    def terms(self, completions: list[Completion], call: Call) -> list[float]:
        terms = [0.0] * len(completions)
        groups = list(by_prompt(completions).values())
        groups.sort(key=lambda members: -sum(completions[index].correct for index in members) / len(members))
        # 0.2 * 15 is a little more than 3 in floating point
        for members in groups[: math.ceil(self.top_share * len(groups) - 1e-9)]:
            write_sigmoid_terms(terms, completions, members, self.alpha)
        return terms
