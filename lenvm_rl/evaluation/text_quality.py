"""What a length that was forced costs the text: repetition, and how unlikely a language model finds it.

1. Repetition is the share of n-grams of tokens that stood in the same completion before.
2. The perplexity is that of the tokens before the end, under the full distribution of a model: no truncation, no
   guidance. Text that was sampled from few candidates is more likely than text of the whole distribution, so compare
   runs of equal truncation.
3. The end token is kept apart: to stop in mid-sentence is one improbable token among many probable ones.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from lenvm_rl.critic import TOKEN_BUDGET, micro_batches
from lenvm_rl.eval_mode import eval_mode
from lenvm_rl.sampling import Completion, left_padded

NGRAM = 4


@dataclass(frozen=True)
class TextQuality:
    """Means over completions; nan where there is nothing to average."""

    repeated: float
    """Share of repeated n-grams, in [0, 1)."""
    perplexity: float
    """exp of the mean over all tokens before the end of -log p."""
    end_surprise: float
    """Mean -log p of the end token, in nats, over the completions that ended."""
    finished: float
    """Share of completions that ended before the token limit."""

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def repeated_share(ids: Sequence[int], n: int = NGRAM) -> float:
    """1 - different n-grams / n-grams; 0 of a text that is shorter than one.

    Raises:
        ValueError: n below 1.
    """
    if n < 1:
        raise ValueError(f"An n-gram has at least one token, got n = {n}.")
    ngrams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


@torch.no_grad()
def surprises(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    *,
    temperature: float = 1.0,
    token_budget: int = TOKEN_BUDGET,
) -> list[np.ndarray]:
    """-log p of each token of each completion, in nats, under the model's whole distribution.

    Args:
        model: any causal language model; its training mode is restored.
        prompt_ids: of each completion.
        completions: at least one token each, or they get an empty array.
        temperature: of the distribution.
        token_budget: tokens of one forward, padding included.
    """
    rows = [[*prompt, *c.ids] for prompt, c in zip(prompt_ids, completions, strict=True)]
    found: list[np.ndarray] = [np.zeros(0)] * len(rows)
    with eval_mode(model):
        for batch in micro_batches([len(row) for row in rows], token_budget):
            most = max(len(completions[i].ids) for i in batch)
            # on the left, so that the completions stand together at the right end, where alone logits are needed
            ids, mask = left_padded([rows[i] for i in batch], 0, model.device)
            logits = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                logits_to_keep=most + 1,
            ).logits[:, :-1]
            for number, i in enumerate(batch):
                count = len(completions[i].ids)
                if count:
                    log_p = torch.log_softmax(logits[number, -count:].float() / temperature, -1)
                    found[i] = -log_p.gather(1, ids[number, -count:, None]).squeeze(1).double().cpu().numpy()
    return found


def text_quality(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    *,
    temperature: float = 1.0,
    ngram: int = NGRAM,
    token_budget: int = TOKEN_BUDGET,
) -> TextQuality:
    """Repetition of completions and their perplexity under a model, usually the policy without guidance.

    Args:
        model: any causal language model with the tokenizer of the completions.
        prompt_ids: of each completion.
        completions: what to judge.
        temperature: of the model's distribution.
        ngram: tokens of what may repeat.
        token_budget: tokens of one forward, padding included.

    Raises:
        ValueError: no completions.
    """
    if not completions:
        raise ValueError("There are no completions to judge.")
    found = surprises(model, prompt_ids, completions, temperature=temperature, token_budget=token_budget)
    bodies = [nats[: len(nats) - c.finished] for nats, c in zip(found, completions, strict=True)]
    ends = [nats[-1] for nats, c in zip(found, completions, strict=True) if c.finished]
    tokens = sum(map(len, bodies))
    return TextQuality(
        repeated=float(np.mean([repeated_share(c.ids[: len(c.ids) - c.finished], ngram) for c in completions])),
        perplexity=math.exp(sum(float(body.sum()) for body in bodies) / tokens) if tokens else math.nan,
        end_surprise=float(np.mean(ends)) if ends else math.nan,
        finished=float(np.mean([c.finished for c in completions])),
    )
