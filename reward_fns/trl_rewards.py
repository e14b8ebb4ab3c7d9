"""The length rewards that TRL ships (1.16), under one roof with ours. TRL is imported when one is made.

`get_cosine_scaled_reward` judges correctness itself, with TRL's math-verify call, which no time limit bounds: an answer
such as `9^{9^9}` can hang the training. Prefer another length reward beside `accuracy_reward`.
"""

from typing import Any


def get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int) -> Any:
    """DAPO's soft overlong punishment, see `trl.rewards.get_soft_overlong_punishment`."""
    from trl.rewards import get_soft_overlong_punishment as build

    return build(max_completion_len=max_completion_len, soft_punish_cache=soft_punish_cache)


def get_cosine_scaled_reward(
    max_len: int,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
) -> Any:
    """Correctness scaled by a cosine of the length, see `trl.rewards.get_cosine_scaled_reward`.

    The defaults are TRL's; published are -10, 0, 1 and 2, and -10 beyond `max_len`.
    """
    from trl.rewards import get_cosine_scaled_reward as build

    return build(max_len, min_value_wrong, max_value_wrong, min_value_correct, max_value_correct)


def get_repetition_penalty_reward(ngram_size: int = 3, max_penalty: float = -1.0) -> Any:
    """Penalty on repeated n-grams of tokens, see `trl.rewards.get_repetition_penalty_reward`.

    The defaults are TRL's; published are 40 and -0.05 (from a secondary source).
    """
    from trl.rewards import get_repetition_penalty_reward as build

    return build(ngram_size=ngram_size, max_penalty=max_penalty)
