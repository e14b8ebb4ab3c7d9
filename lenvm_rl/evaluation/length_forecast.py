"""Forecasts of a length in tokens: fitted on recorded rollouts, and how far they and the critic's own length are off.

1. The critic stays frozen; `fit_distribution` trains a `LengthDistribution` on its hidden states, computed once.
2. The bias is mean forecast minus mean length. That of the length that V(s_0) stands for is negative even for a
   perfect critic (LenVM appendix F); that of the distribution's mean should not be.
3. An interval is judged by how often it holds the length, quantiles by their pinball loss, beside those of the lengths
   of other prompts, which know nothing of this one.

Completions that were cut enter as ones of the limit's length.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from lenvm_rl.critic import TOKEN_BUDGET
from lenvm_rl.eval_mode import eval_mode
from lenvm_rl.evaluation.state_logits import for_each_rollout
from lenvm_rl.length import check_gamma, logit_to_remaining
from lenvm_rl.length_distribution import LengthDistribution, length_edges
from lenvm_rl.model import LengthValueModel
from lenvm_rl.pretraining.data import completion_lengths
from lenvm_rl.sampling import seeded

LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Quantiles that are judged; the outer two make the 80 % interval."""


@dataclass(frozen=True)
class ForecastScores:
    """Forecasts at the prompt, against the length of each completion."""

    mean_length: float
    value_length: float
    """Mean of the lengths that V(s_0) stands for."""
    forecast_length: float
    """Mean of the distribution's means."""
    coverage: float
    """Share of lengths within the 10 % and 90 % quantiles; 0.8 if these are right."""
    width: float
    """Mean width of that interval, in tokens."""
    pinball: float
    """Mean pinball loss over `LEVELS`, in tokens."""
    pinball_constant: float
    """The same of the quantiles of the lengths that the head was fitted to."""
    completions: int

    @property
    def value_bias(self) -> float:
        """Of the length that V stands for, relative to the mean length."""
        return self.value_length / self.mean_length - 1

    @property
    def forecast_bias(self) -> float:
        """Of the distribution's mean, relative to the mean length."""
        return self.forecast_length / self.mean_length - 1

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "value_bias": self.value_bias, "forecast_bias": self.forecast_bias}


def fit_distribution(
    critic: LengthValueModel,
    rollouts: Dataset,
    *,
    bins: int = 64,
    states: int = 100_000,
    steps: int = 1_500,
    batch_size: int = 512,
    learning_rate: float = 2e-3,
    token_budget: int = TOKEN_BUDGET,
    seed: int = 0,
) -> LengthDistribution:
    """A head on the critic's hidden states that says how the remaining length is distributed.

    Args:
        critic: frozen, on its device.
        rollouts: columns ``prompt_ids``, ``completion_ids``, ``finished``; not those that it will be judged by.
        bins: of the distribution, at most.
        states: states to learn from; of more, a random choice that holds the prompts.
        steps, batch_size, learning_rate: of AdamW, with a cosine schedule to 0.
        token_budget: tokens of one forward of the critic, padding included.
        seed: of the choice, the head and the batches; torch's random state is left as it was.
    """
    hidden, remaining, known = _states(critic, rollouts, states, token_budget, seed)
    with seeded(seed, torch.device("cpu")):
        head = LengthDistribution(hidden.shape[1], length_edges(int(remaining.max()), bins))
        optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            rows = torch.randint(len(hidden), (min(batch_size, len(hidden)),))
            loss = head.loss(head(hidden[rows]), remaining[rows], known[rows]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return head.eval().requires_grad_(False)


@torch.no_grad()
def forecast_prompts(
    critic: LengthValueModel,
    head: LengthDistribution,
    rollouts: Dataset,
    levels: Sequence[float] = LEVELS,
    *,
    token_budget: int = TOKEN_BUDGET,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is forecast at the prompt of each rollout.

    Returns:
        (N,) length that V(s_0) stands for, (N,) mean and (N, len(levels)) quantiles of the distribution, in tokens.
    """
    prompts = torch.zeros(len(rollouts), critic.config.hidden_size)

    def read(row: int, tokens: int, hidden: Tensor) -> None:
        prompts[row] = hidden[0].float().cpu()

    _for_each_hidden(critic, rollouts, read, token_budget)
    logits = critic.v_head(prompts.to(critic.device)).double().cpu()
    forecast = head.cpu().forecast(head(prompts), torch.tensor(levels))
    remaining = logit_to_remaining(logits, check_gamma(critic.config.gamma))
    return remaining.numpy(), forecast.mean.numpy(), forecast.quantiles.numpy()


def score_forecast(
    critic: LengthValueModel,
    head: LengthDistribution,
    rollouts: Dataset,
    fitted_to: Dataset,
    *,
    token_budget: int = TOKEN_BUDGET,
) -> ForecastScores:
    """Forecasts at the prompt, by the critic's value and by a distribution, against what came.

    Args:
        critic, head: frozen.
        rollouts: of prompts that neither was trained on.
        fitted_to: the rollouts of the head, for the constant forecast.
        token_budget: tokens of one forward of the critic, padding included.
    """
    values, means, quantiles = forecast_prompts(critic, head, rollouts, token_budget=token_budget)
    lengths = completion_lengths(rollouts)[0].astype(float)
    constant = np.quantile(completion_lengths(fitted_to)[0], LEVELS)
    inside = (lengths >= quantiles[:, 0]) & (lengths <= quantiles[:, -1])
    return ForecastScores(
        mean_length=float(lengths.mean()),
        value_length=float(values.mean()),
        forecast_length=float(means.mean()),
        coverage=float(inside.mean()),
        width=float((quantiles[:, -1] - quantiles[:, 0]).mean()),
        pinball=pinball_loss(quantiles, lengths),
        pinball_constant=pinball_loss(np.broadcast_to(constant, quantiles.shape), lengths),
        completions=len(lengths),
    )


def pinball_loss(quantiles: np.ndarray, lengths: np.ndarray, levels: Sequence[float] = LEVELS) -> float:
    """Mean over levels and completions of (L - q) * level above q, (q - L) * (1 - level) below.

    Args:
        quantiles: (N, len(levels)).
        lengths: (N,).
        levels: of the quantiles.
    """
    error, level = lengths[:, None] - quantiles, np.asarray(levels)
    return float(np.maximum(level * error, (level - 1) * error).mean())


def _states(
    critic: LengthValueModel, rollouts: Dataset, most: int, token_budget: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (N, H), remaining tokens (N,) and whether nothing else followed (N,), N at most `most`."""
    lengths, finished = completion_lengths(rollouts)
    # every prompt, and of the other states each with the same probability
    share = max(0.0, most - len(lengths)) / max(1, int(lengths.sum()))
    rng = np.random.default_rng(seed)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def read(row: int, tokens: int, hidden: Tensor) -> None:
        chosen = rng.random(tokens + 1) < share
        chosen[0] = True
        if not finished[row]:
            chosen[-1] = tokens == 0  # where it was cut, nothing is known at all
        times = torch.from_numpy(np.flatnonzero(chosen))
        parts.append((hidden[times].float().cpu(), tokens - times, torch.full((len(times),), bool(finished[row]))))

    _for_each_hidden(critic, rollouts, read, token_budget)
    hidden, remaining, known = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return hidden, remaining, known


@torch.no_grad()
def _for_each_hidden(critic: LengthValueModel, rollouts: Dataset, read: Any, token_budget: int) -> None:
    with eval_mode(critic):
        for_each_rollout(
            lambda ids: critic.model(input_ids=ids).last_hidden_state,
            rollouts,
            read,
            device=critic.device,
            token_budget=token_budget,
        )
