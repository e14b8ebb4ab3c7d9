"""What a critic says of every state of recorded rollouts: one pass, sorted by length, little padding."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from lenvm_rl.critic import TOKEN_BUDGET, micro_batches
from lenvm_rl.eval_mode import eval_mode
from lenvm_rl.model import LengthValueModel
from lenvm_rl.pretraining.data import LengthValueCollator, rollout_lengths

Reader = Callable[[int, int, Tensor], None]


@torch.no_grad()
def for_each_rollout(
    compute: Callable[[Tensor], Tensor], rollouts: Dataset, read: Reader, *, device: torch.device, token_budget: int
) -> None:
    """Run a causal model over rollouts and hand out what it says of the states s_0 .. s_T of each one.

    Args:
        compute: (B, S) token ids, padded on the right -> (B, S, ...), one entry for each state.
        rollouts: columns ``prompt_ids``, ``completion_ids``, ``finished``.
        read: called with the row of a rollout, its number of completion tokens T, and its (T + 1, ...) entries.
        device: where the ids go.
        token_budget: tokens of one forward, padding included.
    """
    rows_of, collate = rollouts.with_format("numpy"), LengthValueCollator(0)
    for rows in micro_batches(rollout_lengths(rollouts).tolist(), token_budget):
        batch = rows_of[rows]
        members = [{name: column[i] for name, column in batch.items()} for i in range(len(rows))]
        computed = compute(collate(members)["input_ids"].to(device))
        for i, (row, member) in enumerate(zip(rows, members, strict=True)):
            first, tokens = len(member["prompt_ids"]) - 1, len(member["completion_ids"])
            read(row, tokens, computed[i, first : first + tokens + 1])


def state_logits(model: LengthValueModel, rollouts: Dataset, *, token_budget: int = TOKEN_BUDGET) -> list[np.ndarray]:
    """Head outputs of the states of rollouts: for each one (T + 1,) float64, of the states s_0 .. s_T.

    Args:
        model: the critic, on its device; its training mode is restored.
        rollouts: columns ``prompt_ids``, ``completion_ids``, ``finished``.
        token_budget: tokens of one forward, padding included.
    """
    found: list[np.ndarray] = [np.zeros(0)] * len(rollouts)

    def read(row: int, tokens: int, logits: Tensor) -> None:
        found[row] = logits.double().cpu().numpy()

    with eval_mode(model):
        for_each_rollout(
            lambda ids: model(input_ids=ids).logits, rollouts, read, device=model.device, token_budget=token_budget
        )
    return found


@torch.no_grad()
def prompt_logits(
    model: LengthValueModel, prompt_ids: Sequence[Sequence[int]], *, token_budget: int = TOKEN_BUDGET
) -> np.ndarray:
    """Head outputs at the last token of prompts, (prompts,) float64, in their order.

    Raises:
        ValueError: an empty prompt.
    """
    for row, ids in enumerate(prompt_ids):
        if not len(ids):
            raise ValueError(f"prompt {row} has no tokens, so there is no state to predict a length from.")
    found = np.zeros(len(prompt_ids))
    with eval_mode(model):
        for rows in micro_batches([len(ids) for ids in prompt_ids], token_budget):
            width = max(len(prompt_ids[row]) for row in rows)
            padded = [[*prompt_ids[row], *[0] * (width - len(prompt_ids[row]))] for row in rows]
            logits = model(input_ids=torch.tensor(padded, device=model.device)).logits
            last = torch.tensor([len(prompt_ids[row]) - 1 for row in rows], device=logits.device)
            found[rows] = logits.gather(1, last[:, None]).squeeze(1).double().cpu().numpy()
    return found
