"""Rollouts of a policy, as a critic is pretrained on: token ids, never text that would be tokenised again."""

from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lenvm_rl.length import gamma_from_horizon
from lenvm_rl.progress import progress_bar
from lenvm_rl.sampling import Prompt, SamplingSettings, prompt_token_ids, sample_completions


def sample_rollouts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: SamplingSettings,
    *,
    completions_per_prompt: int,
    batch_size: int = 256,
    seed: int = 0,
) -> Dataset:
    """``completions_per_prompt`` completions of each prompt, from torch's random state set to ``seed``.

    Returns:
        Columns ``prompt_id`` (its position), ``prompt_ids``, ``completion_ids`` (end token included) and ``finished``.

    Raises:
        ValueError: no prompts, or less than one completion for each.
    """
    if not prompts or completions_per_prompt < 1:
        raise ValueError(f"{len(prompts)} prompts with {completions_per_prompt} completions each give no rollouts.")
    ids = [row for row in prompt_token_ids(tokenizer, prompts) for _ in range(completions_per_prompt)]
    torch.manual_seed(seed)
    with progress_bar("rollouts", total=len(ids)) as advance:
        completions = sample_completions(model, tokenizer, ids, settings, batch_size=batch_size, on_batch=advance)
    return Dataset.from_dict(
        {
            "prompt_id": [row // completions_per_prompt for row in range(len(ids))],
            "prompt_ids": ids,
            "completion_ids": [completion.ids for completion in completions],
            "finished": [completion.finished for completion in completions],
        }
    )


def choose_gamma(rollouts: Dataset, max_new_tokens: int) -> float:
    """The discount that gives these lengths the whole range of values (LenVM section 5.3).

    The horizon is the 99th percentile of the finished lengths; where more than 1 % of the completions were cut, the
    finished ones are a biased sample and the token limit takes its place.
    """
    lengths = np.array([len(ids) for ids in rollouts["completion_ids"]])
    finished = np.array(rollouts["finished"])
    if (~finished).mean() > 0.01:
        return gamma_from_horizon(max_new_tokens)
    return gamma_from_horizon(float(np.percentile(lengths[finished], 99)))
