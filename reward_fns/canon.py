"""CANON, conditional advantage estimation (arXiv 2509.23962), by length.

It acts on advantages, so it is a function and no reward: compute them where the trainer does, for each group.
"""

import math
from collections.abc import Sequence

from reward_fns.settings import check_number


def canon_length_advantages(
    rewards: Sequence[float], lengths: Sequence[int], mu: float = 0.5, alpha: float = 0.96
) -> list[float]:
    """Advantages of one group: each half, by length, against the mean of the other half and of its own.

        long half:  mu * (alpha * R - mean_short) + (1 - mu) * (R - mean_long)
        short half: mu * (R - alpha * mean_long) + (1 - mu) * (R - mean_short)

    Args:
        rewards: R of the G completions of a prompt, G at least 2.
        lengths: tokens of each. The first G // 2 of them in order of length are the short half; of equal lengths the
            one that comes first counts as shorter.
        mu: share of the comparison with the other half.
        alpha: what a reward in the long half is worth there. CANON-Eff takes less than 1 (0.96 published); with 1, and
            mu = 0.5 and an even G, this is the reward minus the mean of the group (Dr. GRPO).

    Returns:
        G advantages. The authors divide by the constant maximum length, which TRL's `loss_type="dr_grpo"` does too.

    Raises:
        ValueError: fewer than two completions, not one length per reward, or a reward that is not finite.
    """
    if len(rewards) != len(lengths) or len(rewards) < 2:
        raise ValueError(
            f"there are {len(rewards)} rewards and {len(lengths)} lengths, but CANON needs one of each for every "
            "completion of a group, and two completions at least."
        )
    for row, reward in enumerate(rewards):
        if reward is None or not math.isfinite(reward):
            raise ValueError(f"the reward of completion {row} is {reward}: leave out what could not be scored.")
    check_number("mu", mu, "a share", at_most=1.0)
    check_number("alpha", alpha, "1 treats both halves alike")
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    short, long = order[: len(order) // 2], order[len(order) // 2 :]
    mean_short = sum(rewards[index] for index in short) / len(short)
    mean_long = sum(rewards[index] for index in long) / len(long)
    advantages = [0.0] * len(rewards)
    for index in long:
        advantages[index] = mu * (alpha * rewards[index] - mean_short) + (1 - mu) * (rewards[index] - mean_long)
    for index in short:
        advantages[index] = mu * (rewards[index] - alpha * mean_long) + (1 - mu) * (rewards[index] - mean_short)
    return advantages
