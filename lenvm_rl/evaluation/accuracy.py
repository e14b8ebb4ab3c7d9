"""Accuracy and tokens of a policy on problems with verifiable answers."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lenvm_rl.progress import progress_bar
from lenvm_rl.sampling import SamplingSettings, prompt_token_ids, sample_completions, seeded


@dataclass(frozen=True)
class Score:
    """What a policy achieves with one sampled completion per problem."""

    accuracy: float
    """Share of correct completions, in [0, 1]."""
    accuracy_low: float
    accuracy_high: float
    """Ends of the 95 % Wilson interval of the accuracy over problems."""
    completion_tokens: float
    """Mean completion length in tokens, the end token included; completions that were cut count as the limit."""
    tokens_per_correct: float | None
    """All completion tokens divided by the number of correct completions; None without a correct one."""
    finished: float
    """Share of completions that ended before the token limit."""
    problems: int

    def to_dict(self) -> dict[str, float | int | None]:
        return asdict(self)


def evaluate_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Dataset,
    reward_func: Callable[..., Any],
    settings: SamplingSettings,
    *,
    threshold: float = 1.0,
    accelerator: Accelerator | None = None,
    batch_size: int = 256,
    seed: int = 0,
    name: str = "evaluate",
) -> Score:
    """Sample one completion per problem, as in training, and score it.

    Args:
        model, tokenizer: the policy.
        problems: column ``prompt`` and whatever the reward function takes.
        reward_func: a TRL reward function; None counts as not correct.
        settings: how to sample.
        threshold: reward from which a completion is correct.
        accelerator: shares the problems over its processes; every process gets the whole score. Collective: all of them
            call `generate` equally often, as sharded policies need it.
        batch_size: problems sampled at once on each process.
        seed: of the sampling; torch's random state is left as it was.

    Raises:
        ValueError: no problems.
    """
    if len(problems) == 0:
        raise ValueError("There are no problems to evaluate on.")
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    own = problems.select(range(rank, len(problems), world))
    most = math.ceil(len(problems) / world)  # problems of the first process, which has the most
    sums = torch.zeros(4, dtype=torch.float64)
    with seeded(seed + rank, model.device), progress_bar(name, total=len(own), visible=rank == 0) as advance:
        for start in range(0, most, batch_size):
            if start >= len(own):
                keep_in_step = prompt_token_ids(tokenizer, [problems[0]["prompt"]])
                sample_completions(model, tokenizer, keep_in_step, settings)
                continue
            rows = own.select(range(start, min(start + batch_size, len(own)))).to_dict()
            prompts = rows.pop("prompt")
            ids = prompt_token_ids(tokenizer, prompts)
            sampled = sample_completions(model, tokenizer, ids, settings, batch_size=batch_size, on_batch=advance)
            texts = tokenizer.batch_decode([completion.ids for completion in sampled], skip_special_tokens=True)
            completions = [
                text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
                for prompt, text in zip(prompts, texts, strict=True)
            ]
            rewards = reward_func(
                prompts=prompts,
                completions=completions,
                completion_ids=[completion.ids for completion in sampled],
                **rows,
            )
            sums += torch.tensor(
                [
                    sum(reward is not None and reward >= threshold for reward in rewards),
                    sum(len(completion.ids) for completion in sampled),
                    sum(completion.finished for completion in sampled),
                    len(sampled),
                ],
                dtype=torch.float64,
            )
    if accelerator:
        sums = accelerator.reduce(sums.to(accelerator.device))
    correct, tokens, finished, count = sums.tolist()
    low, high = wilson_interval(correct, count)
    return Score(
        accuracy=correct / count,
        accuracy_low=low,
        accuracy_high=high,
        completion_tokens=tokens / count,
        tokens_per_correct=tokens / correct if correct else None,
        finished=finished / count,
        problems=int(count),
    )


def wilson_interval(successes: float, trials: float, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion (95 % at the default z); never leaves [0, 1]."""
    rate = successes / trials
    centre = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials)) / (1 + z * z / trials)
    return max(0.0, centre - half), min(1.0, centre + half)
