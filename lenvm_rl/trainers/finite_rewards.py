"""Reward functions guarded against non-finite rewards.

TRL reads None as "cannot be scored" and stores it as NaN, so a NaN that a reward function computed by mistake passes
for one; an inf poisons the advantages of its whole group. Both are caught where they arise, while they have a name.
"""

import math
from collections.abc import Callable
from typing import Any

from torch import nn
from trl.trainer.utils import get_callable_name, is_async_callable

Rewards = list[float | None]


class FiniteReward:
    """A reward function whose rewards are finite, or None.

    Args:
        reward_func: any synchronous TRL reward function that is not a model.

    Raises:
        ValueError: on a call that returned NaN or an infinite reward; names the function and the row.
    """

    def __init__(self, reward_func: Callable[..., Any]) -> None:
        self.reward_func = reward_func
        self.__name__ = get_callable_name(reward_func)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._checked(self.reward_func(*args, **kwargs))

    def _checked(self, rewards: Rewards) -> Rewards:
        for row, reward in enumerate(rewards):
            if reward is not None and not math.isfinite(reward):
                raise ValueError(
                    f"The reward function '{self.__name__}' returned {reward} for row {row} of the batch. Rewards must "
                    "be finite; return None for a completion that cannot be scored."
                )
        return rewards


class AsyncFiniteReward(FiniteReward):
    """The same for an ``async def`` reward function, which TRL awaits."""

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._checked(await self.reward_func(*args, **kwargs))


def guard(reward_func: Any) -> Any:
    """The reward function with the guard around it; reward models (a path or a module) pass through."""
    if isinstance(reward_func, str | nn.Module):
        return reward_func
    return AsyncFiniteReward(reward_func) if is_async_callable(reward_func) else FiniteReward(reward_func)
