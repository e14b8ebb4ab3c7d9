"""O1-Pruner (arXiv 2501.12570): weights for off-policy training on samples of a reference model.

It acts on the weights of fixed samples, so it is a function and no reward.
"""

import math

from reward_fns.settings import check_number


def o1_pruner_weight(
    tokens: int,
    correct: bool,
    reference_tokens: float,
    reference_accuracy: float,
    alpha: float = 5.0,
    least: float = -2.0,
    most: float = 4.0,
) -> float:
    """clip((reference_tokens - tokens) / tokens + alpha * (correct - reference_accuracy), least, most).

    Args:
        tokens: length of the sample, at least 1.
        correct: whether it is right.
        reference_tokens: mean length of the reference model's samples for the problem.
        reference_accuracy: share of them that are right.
        alpha: weight of being right, published 5 (with 12 samples for a problem, two of which are trained on).
        least, most: bounds, published -2 and 4.

    Raises:
        ValueError: an argument outside its range.

    The authors turn the weights into z-scores over the data set. Without alpha's part and the bounds this is the length
    term of the paper's objective, reference_tokens / tokens - 1, which we know from memory only.
    """
    if tokens < 1:
        raise ValueError(
            f"tokens is {tokens!r}, but a sample has at least its end token: count that, or drop the sample."
        )
    check_number("reference_tokens", reference_tokens, "the mean length of the reference's samples")
    check_number("reference_accuracy", reference_accuracy, "the share of them that are right", at_most=1.0)
    check_number("alpha", alpha, "the weight of being right")
    if not (math.isfinite(least) and math.isfinite(most) and least <= most):
        raise ValueError(f"the bounds are {least!r} and {most!r}: give two finite numbers, the lower one first.")
    weight = (reference_tokens - tokens) / tokens + alpha * (float(correct) - reference_accuracy)
    return min(most, max(least, weight))
