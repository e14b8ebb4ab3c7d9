"""Rollouts from transformers' ``generate``."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lenvm_rl.sampling import Completion, SamplingSettings, sample_completions


class TransformersGenerator:
    """Samples in process, from torch's random state, which each call sets to its seed.

    Args:
        model: any causal language model, on its device.
        tokenizer: its tokenizer.
        batch_size: completions of one ``generate`` call. With the seed it decides which completions are drawn.
        name: how the policy is called; by default where the model came from.
    """

    backend = "transformers"

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 256, name: str | None = None
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.name = name or model.config.name_or_path or type(model).__name__
        self.completions_per_shard = batch_size

    def __call__(
        self,
        prompt_ids: Sequence[list[int]],
        settings: SamplingSettings,
        seed: int,
        on_batch: Callable[[int, int], None] = lambda completions, tokens: None,
    ) -> list[Completion]:
        """See `Generator`. Afterwards torch's random state is where sampling left it."""
        torch.manual_seed(seed)
        return sample_completions(
            self.model, self.tokenizer, prompt_ids, settings, batch_size=self.batch_size, on_batch=on_batch
        )

    def notes(self) -> list[str]:
        return []
