"""Sampling with and without guidance under the same settings, for comparisons that mean something.

1. Every completion, guided or not, of this policy or of a trained one, is drawn from the same truncated candidates: a
   guided run that may only choose among five tokens is compared with an unguided one that may, too.
2. A bias of the end token is the baseline that needs no critic: b is added to its raw score, before truncation.
3. The random state is seeded for each call and left as it was.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from lenvm_rl.decoding.guide import Controls, LengthGuide, guided_completions
from lenvm_rl.model import LengthValueModel
from lenvm_rl.progress import progress_bar
from lenvm_rl.sampling import Completion, seeded

__all__ = ["EndBias", "SteeredSampler", "correct_completions"]


class EndBias(LogitsProcessor):
    """Adds a constant to the scores of the end tokens.

    Args:
        bias: added to the raw scores; positive ends completions earlier.
        end_token_ids: ids that end a completion.
    """

    def __init__(self, bias: float, end_token_ids: Sequence[int]) -> None:
        self.bias, self.end_token_ids = bias, list(end_token_ids)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        biased = scores.clone()
        biased[:, self.end_token_ids] += self.bias
        return biased


class _BiasedGuide(LengthGuide):
    bias = 0.0

    def generate(self, model: Any, *args: Any, **options: Any) -> Any:
        if not self.bias:
            return super().generate(model, *args, **options)
        return super().generate(model, *args, logits_processor=[EndBias(self.bias, self._end_ids(model))], **options)


@dataclass(frozen=True)
class SteeredSampler:
    """Draws completions, all from the same truncated candidates."""

    policy: Any
    critic: LengthValueModel
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 5
    """Candidates of a step, guided or not; 0 is no limit, and then all that top_p leaves are scored."""
    top_p: float = 1.0
    min_p: float = 0.0
    """Candidates less probable than this share of the most probable one are left out."""
    batch_size: int = 256

    def __post_init__(self) -> None:
        if self.top_k < 0:
            raise ValueError(f"top_k must be a number of candidates, or 0 for all of them, got {self.top_k}.")

    def __call__(
        self,
        prompt_ids: Sequence[list[int]],
        controls: Controls = None,
        *,
        end_bias: float = 0.0,
        policy: Any = None,
        seed: int = 0,
        name: str = "sample",
    ) -> list[Completion]:
        """One completion for each prompt, in their order.

        Args:
            prompt_ids: token ids of each prompt. Repeat one to sample it several times.
            controls: one for all, or one for each; None only truncates.
            end_bias: added to the score of the end token.
            policy: another policy of the same tokenizer.
            seed: of the draws.
            name: what is sampled, beside the progress bar.

        Raises:
            ValueError: a target beyond `max_new_tokens`, or beyond the positions of policy or critic.
        """
        guide = _BiasedGuide(
            self.critic,
            self.tokenizer,
            num_candidates=self.top_k or None,
            temperature=self.temperature,
            top_k=self.top_k or None,
            top_p=self.top_p,
            min_p=self.min_p,
        )
        guide.bias = end_bias
        model = self.policy if policy is None else policy
        with seeded(seed, model.device), progress_bar(name, total=len(prompt_ids)) as advance:
            return guided_completions(
                model,
                guide,
                prompt_ids,
                controls,
                max_new_tokens=self.max_new_tokens,
                batch_size=self.batch_size,
                on_batch=advance,
            )


@torch.no_grad()
def correct_completions(
    tokenizer: PreTrainedTokenizerBase,
    problems: Dataset,
    completions: Sequence[Completion],
    reward_func: Callable[..., Any],
    *,
    threshold: float = 1.0,
) -> np.ndarray:
    """Which completions are correct: (N,) bool.

    Args:
        tokenizer: of the completions.
        problems: column ``prompt`` and whatever the reward function takes, one row for each completion.
        completions: N of them.
        reward_func: a TRL reward function; None counts as not correct.
        threshold: reward from which a completion is correct.
    """
    rows = problems.to_dict()
    prompts = rows.pop("prompt")
    texts = tokenizer.batch_decode([completion.ids for completion in completions], skip_special_tokens=True)
    answers = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    rewards = reward_func(prompts=prompts, completions=answers, completion_ids=[c.ids for c in completions], **rows)
    return np.array([reward is not None and reward >= threshold for reward in rewards])
