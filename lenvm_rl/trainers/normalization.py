"""From the rewards of whole groups to sequence advantages: TRL's way, and the two readings of DLER's equation 3.

Shapes: N completions of all processes, groups one after the other; F reward functions. nan is a reward that was not
given; such completions take no part in any statistic and get the advantage 0.

    trl                        TRL's own, by `scale_rewards` and `multi_objective_aggregation`
    group_centred_batch_std    A = R - mean_group(R);  (A - mean(A)) / std(A) over sequences    (DLER, arXiv 2510.15110)
    group_centred_token_std    the same over tokens, so that long completions count more        (DLER's released code)

TRL's `scale_rewards="batch"` is neither: it divides by the standard deviation of the rewards before they are centred,
which the difference between easy and hard prompts inflates.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from trl.trainer.utils import nanstd

from lenvm_rl.advantages import pooled
from lenvm_rl.advantages.types import Moments

AdvantageNormalization = Literal["trl", "group_centred_batch_std", "group_centred_token_std"]

SMALLEST_VARIANCE = 1e-8
"""Added to the variance, as in DLER's released code: a batch without any difference gets advantages 0, not nan."""


def combined_rewards(rewards: Tensor, weights: Tensor) -> Tensor:
    """(N,) weighted sum of the rewards (N, F) that were given, as TRL sums them; nan where there was none at all."""
    total = (rewards * weights.to(rewards.device)).nansum(dim=1)
    return total.masked_fill(rewards.isnan().all(dim=1), torch.nan)


def group_centred(rewards: Tensor, group_size: int) -> Tensor:
    """(N,) rewards minus the mean of their group, in float64: equal rewards then give exactly 0."""
    dtype = torch.float32 if rewards.device.type == "mps" else torch.float64
    groups = rewards.to(dtype).view(-1, group_size)
    return (groups - groups.nanmean(dim=1, keepdim=True)).flatten()


def group_centred_batch_std(rewards: Tensor, group_size: int) -> Tensor:
    """Advantages of DLER's equation 3, over sequences.

    Args:
        rewards: (N,) of all processes.
        group_size: completions per prompt.

    Returns:
        (N,) float32: mean 0 and (population) standard deviation 1 over the completions that were scored.
    """
    centred = group_centred(rewards, group_size)
    variance = (centred - centred.nanmean()).square().nanmean()
    return ((centred - centred.nanmean()) * (variance + SMALLEST_VARIANCE).rsqrt()).nan_to_num(nan=0.0).float()


def group_centred_token_std(
    rewards: Tensor,
    group_size: int,
    tokens: Tensor,
    *,
    own: slice = slice(None),
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Tensor:
    """Advantages of DLER's released code: mean and (Bessel-corrected) variance over all response tokens.

    Args:
        rewards: (N,) of all processes.
        group_size: completions per prompt.
        tokens: (B,) response tokens of this process's completions.
        own: where these are among the N.
        reduce: adds up a (3,) tensor over processes. Nothing else travels.

    Returns:
        (B,) float32. Completions without an advantage over their group get one other than 0: minus the mean.
    """
    centred = group_centred(rewards, group_size)[own]
    tokens = tokens.masked_fill(centred.isnan(), 0)
    constant = Moments(centred.nan_to_num(nan=0.0), torch.zeros_like(centred))  # a row's tokens share one advantage
    batch = pooled(tokens, constant, reduce)
    return ((centred - batch.mean) * (batch.unbiased_variance + SMALLEST_VARIANCE).rsqrt()).nan_to_num(nan=0.0).float()


def trl_advantages(
    rewards: Tensor,
    weights: Tensor,
    group_size: int,
    *,
    scale_rewards: str = "group",
    aggregation: str = "sum_then_normalize",
) -> Tensor:
    """TRL 1.16's own advantages, for a batch that TRL has not seen as a whole (`group_sampling.py`).

    Args:
        rewards: (N, F) of all processes.
        weights: (F,) of the reward functions.
        group_size: completions per prompt.
        scale_rewards, aggregation: as `GRPOConfig` has them.

    Returns:
        (N,), bit for bit what `GRPOTrainer` computes from the same rewards.
    """
    if aggregation == "normalize_then_sum":
        functions = rewards.view(-1, group_size, rewards.size(1))
        mean, std = functions.nanmean(dim=1, keepdim=True), nanstd(functions, dim=1, keepdim=True)
        rewards = ((functions - mean) / (std + 1e-4)).view(-1, rewards.size(1))
        total = combined_rewards(rewards, weights)
        return ((total - total.nanmean()) / (nanstd(total) + 1e-4)).nan_to_num(nan=0.0)
    total = combined_rewards(rewards, weights)
    groups = total.view(-1, group_size)
    advantages = total - groups.nanmean(dim=1).repeat_interleave(group_size)
    if scale_rewards == "batch":
        advantages = advantages / (nanstd(total) + 1e-4)
    elif scale_rewards == "group":
        advantages = advantages / (nanstd(groups, dim=1).repeat_interleave(group_size) + 1e-4)
    return advantages.nan_to_num(nan=0.0)
