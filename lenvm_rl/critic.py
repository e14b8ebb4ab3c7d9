"""A frozen Length Value Model that scores the rollouts of a policy.

1. Rows are stripped of padding, sorted by length and cut into micro-batches by a token budget: what a critic computes
   depends on the tokens there are, not on the longest completion of the batch.
2. Stripped rows are right-padded. A causal model never looks ahead, so they need no attention mask.
3. Every process runs the same number of forwards: those of a sharded critic are collective.
4. The terminal rule is applied here: the value after the last token is 0 where the completion finished and what the
   critic says where it was cut.

A vision-language critic is not supported; `LengthValueModel` refuses to load one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lenvm_rl.advantages.statistics import explained_variance_of_sums
from lenvm_rl.length import remaining_to_value, value_to_remaining

TOKEN_BUDGET = 16_384
"""Tokens of one critic forward, padding included; a single longer sequence still runs alone."""


class CriticOutput(NamedTuple):
    """What the critic says of a batch of rollouts."""

    values: Tensor
    """(B, T) float32: V(s_t), the state before completion token t; 0 beyond the completion."""
    bootstrap: Tensor
    """(B,) float32: value of the state after the last token; 0 where the completion finished."""


@dataclass(frozen=True)
class Calibration:
    """How well a critic fits the policy whose rollouts it scored, over all processes, on finished completions."""

    explained_variance: float
    """1 - Var[G - V] / Var[G] over tokens: 1 is perfect, 0 no better than a constant; nan where G does not vary."""
    predicted_tokens: float
    """Mean remaining length predicted at the prompt."""
    true_tokens: float
    """Mean length of the finished completions, EOS included."""
    relative_error: float
    """Mean of |predicted - true| / true at the prompt, against each completion's own length."""
    completions: int
    """Finished completions it rests on."""

    @property
    def bias_tokens(self) -> float:
        """Mean predicted minus mean true length. Below 0 even for a perfect critic (LenVM appendix F)."""
        return self.predicted_tokens - self.true_tokens


class LengthCritic:
    """Scores rollouts with a frozen Length Value Model under accelerate.

    Args:
        model: the critic on its device, or anything that is called like it, such as a sharded one.
        accelerator: the trainer's accelerator.
        gamma: the critic's discount.
        token_budget: tokens of one forward, padding included.

    Raises:
        ValueError: a token budget below 1.
    """

    def __init__(
        self, model: nn.Module, accelerator: Accelerator, *, gamma: float, token_budget: int = TOKEN_BUDGET
    ) -> None:
        if token_budget < 1:
            raise ValueError(f"token_budget must be at least 1, got {token_budget}.")
        self.model = model.requires_grad_(False).eval()
        self.accelerator = accelerator
        self.gamma = gamma
        self.token_budget = token_budget

    @torch.no_grad()
    def score(
        self, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor, finished: Tensor
    ) -> CriticOutput:
        """Values of the states that a batch of rollouts went through.

        Args:
            prompt_ids, prompt_mask: (B, P), padded on the left.
            completion_ids, completion_mask: (B, T), padded on the right; tool tokens count as tokens here.
            finished: (B,) bool, the completion ended with an EOS.

        Raises:
            ValueError: an empty prompt; there is no state to score before its first token.
        """
        ids, prompt_lengths, lengths = without_padding(prompt_ids, prompt_mask, completion_ids, completion_mask)
        values = self._values(ids, prompt_lengths + lengths)

        offsets = torch.arange(completion_ids.size(1), device=ids.device)
        before = before_tokens(values, prompt_lengths, completion_ids.size(1))
        before = before.masked_fill(offsets >= lengths[:, None], 0.0)
        after_last = values.gather(1, (prompt_lengths + lengths - 1)[:, None]).squeeze(1)
        return CriticOutput(before, after_last.masked_fill(finished, 0.0))

    def calibration(self, values: Tensor, mask: Tensor, finished: Tensor) -> Calibration:
        """How well the critic predicts these rollouts. Collective: every process calls it.

        Args:
            values: (B, T) of `score`.
            mask: (B, T) bool, the policy's own tokens.
            finished: (B,) bool; cut completions have no known length and are left out.
        """
        known = mask & finished[:, None]
        remaining = known.flip(1).cumsum(1).flip(1)
        returns = remaining_to_value(remaining.double(), self.gamma)
        errors = returns - values.double()
        length = known.sum(1)
        kept = length > 0
        # before any token is generated, so that a completion opened by a tool message is read at its first own token
        first = known.to(torch.uint8).argmax(1, keepdim=True)
        predicted = value_to_remaining(values.double().gather(1, first).squeeze(1), self.gamma)
        sums = torch.stack(
            [
                known.sum().double(),
                *_moments(returns, known),
                *_moments(errors, known),
                kept.sum().double(),
                predicted[kept].sum(),
                length[kept].sum().double(),
                ((predicted - length).abs() / length)[kept].sum(),
            ]
        )
        tokens, g1, g2, e1, e2, completions, predicted_sum, true_sum, relative = self.accelerator.reduce(sums).tolist()
        if not completions:
            return Calibration(*(float("nan"),) * 4, completions=0)
        return Calibration(
            explained_variance=explained_variance_of_sums(tokens, g1, g2, e1, e2),
            predicted_tokens=predicted_sum / completions,
            true_tokens=true_sum / completions,
            relative_error=relative / completions,
            completions=int(completions),
        )

    def _values(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """(B, P+T) values of right-padded rows, 0 beyond their lengths."""
        values = -torch.sigmoid(outputs_of(self.model, ids, lengths, self.accelerator, self.token_budget))
        beyond = torch.arange(ids.size(1), device=ids.device) >= lengths[:, None]
        return values.masked_fill(beyond, 0.0)


def outputs_of(
    model: Callable[..., Any], ids: Tensor, lengths: Tensor, accelerator: Accelerator, token_budget: int
) -> Tensor:
    """(B, S) float32 outputs of a critic for right-padded ids (B, S), whatever beyond their lengths (B,).

    In micro-batches by token budget, as many on every process. Collective.
    """
    outputs = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
    batches = micro_batches(lengths.tolist(), token_budget)
    forwards = torch.tensor([len(batches)], device=ids.device)
    most = int(accelerator.gather(forwards).max()) if accelerator.num_processes > 1 else len(batches)
    for turn in range(most):
        rows = batches[min(turn, len(batches) - 1)]  # a rank that is done repeats its last one, to keep in step
        width = int(lengths[rows].max())
        outputs[rows, :width] = model(input_ids=ids[rows, :width]).logits.float().view(len(rows), width)
    return outputs


def without_padding(
    prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Prompt and completion of each row side by side, padded on the right only.

    Returns:
        (B, P + T) ids, (B,) tokens of the prompt, (B,) tokens of the completion.

    Raises:
        ValueError: an empty prompt; there is no state to score before its first token.
    """
    prompt_lengths, lengths = prompt_mask.sum(1), completion_mask.sum(1)
    if (prompt_lengths == 0).any():
        row = int((prompt_lengths == 0).nonzero()[0])
        raise ValueError(f"prompt {row} of the batch is empty: a length critic needs at least one prompt token.")
    present = torch.cat([prompt_mask, completion_mask], 1).bool()
    order = (~present).to(torch.uint8).argsort(dim=1, stable=True)  # present tokens first, in their order
    return torch.cat([prompt_ids, completion_ids], 1).gather(1, order), prompt_lengths, lengths


def before_tokens(outputs: Tensor, prompt_lengths: Tensor, tokens: int) -> Tensor:
    """(B, T) outputs of the states before each completion token, of right-padded rows; anything beyond their ends."""
    # s_0 is the last prompt token
    places = prompt_lengths[:, None] - 1 + torch.arange(tokens, device=outputs.device)
    return outputs.gather(1, places.clamp(max=outputs.size(1) - 1))


def micro_batches(lengths: list[int], token_budget: int) -> list[list[int]]:
    """Rows grouped by similar length, so that rows times the longest of them stays within the budget.

    Args:
        lengths: tokens of each row.
        token_budget: tokens of one micro-batch, padding included. A row that is longer makes one of its own.

    Returns:
        Row numbers of each micro-batch, longest rows first: if memory does not suffice, the first forward says so.
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= token_budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    kept = x[mask]
    return kept.sum(), kept.square().sum()
