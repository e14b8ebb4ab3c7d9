"""From sequence rewards to what PPO needs of a token: its reward, its lambda, and the loss of the task critic.

1. The reward of a completion belongs to its last own token, after which the episode has ended, whether the policy ended
   it or the token limit did. A penalty for leaving the reference policy may be taken from every token.
2. lambda of the policy's advantages may depend on the length of the completion (VAPO, arXiv 2504.05118): the weights
   lambda^k add up to 1 / (1 - lambda), which is set to alpha times the length. The critic's targets keep a lambda of
   their own, 1 by default: the Monte-Carlo return.
3. The value loss is clipped around the values that the rollouts were judged with, as in PPO2.

GAE itself is in `lenvm_rl.advantages`. Shapes: B completions, T tokens; masks are (B, T) bool, the policy's own tokens.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lenvm_rl.advantages.statistics import explained_variance_of_sums

KLEstimator = Literal["k1", "k3"]


def terminal_rewards(rewards: Tensor, mask: Tensor) -> Tensor:
    """(B, T) float32: the reward (B,) of each completion on its last own token; none for a row without tokens."""
    places = torch.arange(1, mask.size(1) + 1, device=mask.device)
    last = mask & (places == (mask * places).amax(1, keepdim=True))
    return torch.where(last, rewards.float()[:, None], 0.0)


def kl_penalties(logps: Tensor, reference_logps: Tensor, mask: Tensor, estimator: str = "k1") -> Tensor:
    """What each token costs for leaving the reference policy, before its coefficient.

    Args:
        logps: (B, T) log-probabilities of the tokens under the policy that sampled them.
        reference_logps: (B, T) under the reference.
        mask: (B, T).
        estimator: "k1", log p - log q, whose sum over a completion is unbiased; "k3", q/p - 1 - log q/p, which is never
            negative and has less variance.

    Returns:
        (B, T), 0 where the mask is 0.
    """
    difference = torch.where(mask, logps.float() - reference_logps.float(), 0.0)
    return difference if estimator == "k1" else torch.exp(-difference) - 1.0 + difference


def length_adaptive_lambda(tokens: Tensor, alpha: float) -> Tensor:
    """(B,) float32: VAPO's 1 - 1 / (alpha * l) for completions of l tokens, at least 0.

    Args:
        tokens: (B,) own tokens of each completion.
        alpha: positive. Completions of up to 1 / alpha tokens get lambda 0; VAPO has 0.05.
    """
    return (1.0 - 1.0 / (alpha * tokens.clamp(min=1).float())).clamp(min=0.0)


class ValueLoss(NamedTuple):
    """Sums over tokens, to be divided by the tokens of all processes."""

    loss: Tensor
    """0-dim, with gradient: half of the squared error, the larger of the clipped and the unclipped one."""
    clipped: Tensor
    """0-dim: tokens whose clipped error was the larger one, so that they gave no gradient."""


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float | None) -> ValueLoss:
    """Regression of the task critic on its targets.

    Args:
        values: (B, T) of the critic now.
        old_values: (B, T) of the critic when the rollouts were made.
        returns: (B, T) targets.
        mask: (B, T).
        clip: how far a value may move from the old one before its error stops counting; None does not clip.
    """
    values, returns = torch.where(mask, values.float(), 0.0), torch.where(mask, returns, 0.0)
    errors = (values - returns).square()
    if clip is None:
        return ValueLoss(0.5 * errors.sum(), torch.zeros((), device=values.device))
    old_values = torch.where(mask, old_values, 0.0)
    within = old_values + (values - old_values).clamp(-clip, clip)
    held_back = (within - returns).square()
    return ValueLoss(0.5 * torch.maximum(errors, held_back).sum(), (held_back > errors).sum().float())


class Fit(NamedTuple):
    """How well a task critic knew rollouts before it learned from them, over all processes."""

    explained_variance: float
    """1 - Var[G - V] / Var[G]; nan where G does not vary."""
    mean_return: float
    mean_value: float
    return_std: float


def fit_of(values: Tensor, returns: Tensor, mask: Tensor, reduce: Callable[[Tensor], Tensor]) -> Fit:
    """The fit of values to targets, from sums over all processes.

    Args:
        values, returns: (B, T).
        mask: (B, T).
        reduce: adds up a (5,) tensor over processes.
    """
    v, g = values[mask].double(), returns[mask].double()
    sums = [torch.ones_like(v).sum(), g.sum(), g.square().sum(), (g - v).sum(), (g - v).square().sum()]
    count, g1, g2, e1, e2 = reduce(torch.stack(sums)).tolist()
    if not count:
        return Fit(*(float("nan"),) * 4)
    return Fit(
        explained_variance=explained_variance_of_sums(count, g1, g2, e1, e2),
        mean_return=g1 / count,
        mean_value=(g1 - e1) / count,
        return_std=max(g2 / count - (g1 / count) ** 2, 0.0) ** 0.5,
    )
