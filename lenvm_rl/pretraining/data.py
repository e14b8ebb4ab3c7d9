"""From rollouts to batches: one row per completion, labelled with the tokens that remained after each state.

A label is the remaining length of a state: the last prompt token, or any completion token, the end token included.
States without a known target carry -100: the prompt before its last token, padding, and the last state of a completion
that was cut, whose own value stands in for the tail. So a row has a label 0 if and only if its completion finished.
"""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

NO_TARGET = -100
COLUMNS = ("prompt_ids", "completion_ids", "finished")


class LengthValueCollator:
    """Pads rollouts on the right, to ``input_ids`` and ``labels``, both (B, S).

    A causal model never sees what is to its right, so the rows need no attention mask.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rollouts: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        width = max(len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rollouts)
        input_ids = torch.full((len(rollouts), width), self.pad_token_id)
        labels = torch.full((len(rollouts), width), NO_TARGET)
        for i, row in enumerate(rollouts):
            prompt, completion = row["prompt_ids"], row["completion_ids"]
            end = len(prompt) + len(completion)
            input_ids[i, :end] = torch.tensor([*prompt, *completion])
            labels[i, len(prompt) - 1 : end] = torch.arange(len(completion), -1, -1)
            if not row["finished"]:
                labels[i, end - 1] = NO_TARGET
        return {"input_ids": input_ids, "labels": labels}


def check_rollouts(rollouts: Dataset, vocab_size: int) -> None:
    """Refuse rollouts that no critic of this vocabulary can learn from.

    Raises:
        ValueError: a missing column, no rows, an empty prompt or completion, or an id outside the vocabulary; names
            the row.
    """
    missing = [name for name in COLUMNS if name not in rollouts.column_names]
    if missing:
        raise ValueError(f"Rollouts need the columns {', '.join(COLUMNS)}, but have no {' and no '.join(missing)}.")
    if len(rollouts) == 0:
        raise ValueError("There are no rollouts to train on.")
    for row, (prompt, completion) in enumerate(zip(rollouts["prompt_ids"], rollouts["completion_ids"], strict=True)):
        if not prompt or not completion:
            raise ValueError(f"Rollout {row} has an empty {'completion' if prompt else 'prompt'}: drop it.")
        if not 0 <= min(*prompt, *completion) <= max(*prompt, *completion) < vocab_size:
            raise ValueError(
                f"Rollout {row} holds a token id outside the critic's vocabulary of {vocab_size}: critic and policy "
                "must share a tokenizer."
            )
