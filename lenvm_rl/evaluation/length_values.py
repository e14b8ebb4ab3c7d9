"""How well a Length Value Model predicts remaining lengths, on rollouts that it has not seen: one pass, all metrics.

A predicted length is a lower bound on the expected one, since the value is concave in it (LenVM appendix F).
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from lenvm_rl.critic import TOKEN_BUDGET, micro_batches
from lenvm_rl.eval_mode import eval_mode
from lenvm_rl.evaluation.length_scores import LengthValueScores, LengthValueStatistics
from lenvm_rl.evaluation.prompt_scores import PromptScores, baseline_values, prompt_lengths, prompt_scores
from lenvm_rl.length import check_gamma
from lenvm_rl.model import LengthValueModel
from lenvm_rl.pretraining.data import (
    LengthValueCollator,
    check_rollouts,
    completion_lengths,
    prompt_groups,
    rollout_lengths,
)


@dataclass(frozen=True)
class ValueCurve:
    """One completion and what the critic said of it."""

    prompt_ids: list[int]
    completion_ids: list[int]
    finished: bool
    logits: np.ndarray
    """(T + 1,) of the states s_0 .. s_T."""

    @property
    def true(self) -> np.ndarray:
        """(T + 1,) remaining tokens; of a cut completion, until the cut."""
        return np.arange(len(self.completion_ids), -1, -1)


@dataclass(frozen=True)
class LengthEvaluation:
    """All that is said of a critic."""

    gamma: float
    scores: LengthValueScores
    prompt: PromptScores
    baselines: dict[str, PromptScores]
    """By names of `prompt_scores.BASELINES`."""
    lengths: np.ndarray = field(repr=False)
    """(rollouts,) tokens of each completion."""
    finished: np.ndarray = field(repr=False)
    predicted: np.ndarray = field(repr=False)
    """(prompts,) length that V(s_0) stands for."""
    true: np.ndarray = field(repr=False)
    """(prompts,) length that the completions of the prompt stand for."""
    curves: tuple[ValueCurve, ...] = field(default=(), repr=False)
    """Some completions, drawn at random."""

    def to_dict(self) -> dict[str, Any]:
        """Numbers only, for JSON."""
        return {
            "gamma": self.gamma,
            "rollouts": len(self.lengths),
            "cut": float((~self.finished).mean()),
            **self.scores.metrics(),
            "prompt": {**self.prompt.metrics(), "prompts": self.prompt.prompts},
            "baselines": {name: scores.metrics() for name, scores in self.baselines.items()},
        }


@torch.no_grad()
def evaluate_lenvm(
    model: LengthValueModel,
    rollouts: Dataset,
    *,
    fit_on: Dataset | None = None,
    policy: PreTrainedModel | None = None,
    token_budget: int = TOKEN_BUDGET,
    curves: int = 200,
    seed: int = 0,
) -> LengthEvaluation:
    """How good a critic is on rollouts of its policy, beside predictions that need no critic.

    Args:
        model: the critic, on its device.
        rollouts: columns ``prompt_ids``, ``completion_ids``, ``finished``, of prompts that it was not trained on, with
            several completions of each.
        fit_on: rollouts of other prompts, to which the baselines are fitted. Without them each half of the prompts is
            predicted from the other half.
        policy: its first-token entropies make the third baseline, which is left out without it.
        token_budget: tokens of one forward, padding included.
        curves: completions whose values are kept, for figures.
        seed: of the choice of curves, of the noise floor and of the halves.

    Raises:
        ValueError: rollouts that the critic cannot read.
    """
    rollouts = check_rollouts(rollouts, model.config.vocab_size)
    gamma = check_gamma(model.config.gamma)
    lengths, finished = completion_lengths(rollouts)
    groups = prompt_groups(rollouts)
    rng = np.random.default_rng(seed)
    kept = set(rng.permutation(len(rollouts))[:curves].tolist())
    rows_of, collate = rollouts.with_format("numpy"), LengthValueCollator(0)
    statistics, values, kept_curves = LengthValueStatistics(gamma), np.empty(len(rollouts)), {}
    with eval_mode(model):
        for rows in micro_batches(rollout_lengths(rollouts).tolist(), token_budget):
            batch = rows_of[rows]
            members = [{name: column[i] for name, column in batch.items()} for i in range(len(rows))]
            tensors = collate(members)
            logits = model(input_ids=tensors["input_ids"].to(model.device)).logits.float().cpu()
            statistics.add(logits, tensors["labels"])
            for i, (row, member) in enumerate(zip(rows, members, strict=True)):
                first = len(member["prompt_ids"]) - 1
                values[row] = -torch.sigmoid(logits[i, first].double()).item()
                if row in kept:
                    z = logits[i, first : first + len(member["completion_ids"]) + 1].numpy()
                    prompt, completion = (member[name].tolist() for name in ("prompt_ids", "completion_ids"))
                    kept_curves[row] = ValueCurve(prompt, completion, bool(member["finished"]), z)
    true, predicted = prompt_lengths(values, lengths, groups, gamma)
    temperature = model.config.temperature or 1.0
    baselines = baseline_values(rollouts, groups, gamma, fit_on, policy, temperature, rng)
    return LengthEvaluation(
        gamma=gamma,
        scores=statistics.scores(),
        prompt=prompt_scores(values, lengths, groups, gamma, seed=seed),
        baselines={
            name: prompt_scores(guess[groups], lengths, groups, gamma, seed=seed) for name, guess in baselines.items()
        },
        lengths=lengths,
        finished=finished,
        predicted=predicted,
        true=true,
        curves=tuple(kept_curves[row] for row in sorted(kept_curves)),
    )
