"""How much of the variance of the length return any critic could explain.

The policy draws its tokens at random, so even a critic that knows the policy cannot know the remaining length. Several
continuations from the same state show how much is left to chance: their spread is what no value of that state explains.
"""

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lenvm_rl.length import remaining_to_value
from lenvm_rl.progress import progress_bar
from lenvm_rl.sampling import SamplingSettings, sample_completions, seeded


def explained_variance_ceiling(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rollouts: Dataset,
    settings: SamplingSettings,
    gamma: float,
    *,
    states: int = 500,
    continuations: int = 16,
    batch_size: int = 512,
    seed: int = 0,
) -> float:
    """Nested-sampling estimate of the best explained variance of G over the states of these rollouts.

    Args:
        model, tokenizer, settings: the policy, sampled as for the rollouts.
        rollouts: columns ``prompt_ids``, ``completion_ids``.
        gamma: discount of the returns.
        states: states drawn uniformly from all states before a completion token.
        continuations: completions from each of them.
        batch_size: continuations sampled at once.
        seed: of states and continuations; torch's random state is left as it was.

    Returns:
        1 - mean over states of Var[G | state] / Var[G], nan where all continuations are equally long. Completions that
        reach the token limit count as ending there.

    Raises:
        ValueError: no states, or less than two continuations of each, which show no spread.
    """
    if states < 1 or continuations < 2:
        raise ValueError(
            f"A ceiling needs at least one state and two continuations of each, got {states} and {continuations}."
        )
    rng = np.random.default_rng(seed)
    lengths = np.array([len(ids) for ids in rollouts["completion_ids"]])
    rows = rng.choice(len(lengths), size=states, p=lengths / lengths.sum())
    times = rng.integers(0, lengths[rows])
    prefixes = []
    for row, time in zip(rows.tolist(), times.tolist(), strict=True):
        rollout = rollouts[row]
        prefixes += [rollout["prompt_ids"] + rollout["completion_ids"][:time]] * continuations
    with seeded(seed, model.device), progress_bar("ceiling", total=len(prefixes)) as advance:
        completions = sample_completions(model, tokenizer, prefixes, settings, batch_size=batch_size, on_batch=advance)
    remaining = torch.tensor([float(len(completion.ids)) for completion in completions], dtype=torch.float64)
    returns = remaining_to_value(remaining, gamma).view(states, continuations)
    return 1.0 - (returns.var(1, unbiased=True).mean() / returns.var(unbiased=True)).item()
