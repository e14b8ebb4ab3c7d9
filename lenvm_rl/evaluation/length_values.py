"""How well a Length Value Model predicts remaining lengths, on rollouts that it has not seen.

1. Token metrics rest on finished completions, in the states before each token: after the end token there is nothing
   left to predict, and a cut completion has no known length. Sums are kept, not predictions.
2. The prompt metrics compare V(s_0) with the mean over several completions of the same prompt (LenVM eq. 13-15). A
   completion that was cut enters as one of the limit's length: with gamma chosen from the limit its value is within
   0.01 of the true one.
3. Beside the error at the prompt stands its noise floor, what a critic that knows the truth would still score, since
   the truth of a few completions is itself an estimate; and the same error of predictions that need no critic.
4. A predicted length is a lower bound on the expected one, since the value is concave in it (LenVM appendix F).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from lenvm_rl.advantages.statistics import explained_variance_of_sums
from lenvm_rl.critic import TOKEN_BUDGET, micro_batches
from lenvm_rl.length import check_gamma, logit_to_remaining, remaining_to_value
from lenvm_rl.model import LengthValueModel
from lenvm_rl.pretraining.data import (
    LengthValueCollator,
    check_rollouts,
    completion_lengths,
    prompt_groups,
    rollout_lengths,
)

__all__ = [
    "BASELINES",
    "CalibrationBin",
    "LengthEvaluation",
    "LengthValueScores",
    "LengthValueStatistics",
    "PositionError",
    "PromptScores",
    "ValueCurve",
    "evaluate_lenvm",
    "first_token_entropy",
    "linear_prediction",
    "noise_floor",
    "prompt_scores",
]

POSITIONS = (0.0, 0.25, 0.5, 0.75)
"""Shares of the completion at which errors are reported."""
SLICES = 20
"""Slices of the completion in the curve of errors over positions."""
VALUE_BINS = 4096
"""Bins of V in (-1, 0], from which deciles are made: quantiles to within 1 / 4096 of the range, in constant memory."""
SPLITS = 64
"""Random halvings that a noise floor averages over."""
BASELINES = ("mean length", "length of the prompt", "entropy of the first token")
"""Predictions at the prompt that need no critic."""


@dataclass(frozen=True)
class PositionError:
    """Mean error of the predicted remaining length."""

    position: float
    """Share of the completion that was there already."""
    tokens: float
    relative: float


@dataclass(frozen=True)
class CalibrationBin:
    """A tenth of the states, by predicted value."""

    predicted: float
    """Mean V."""
    true: float
    """Mean G."""
    states: int


@dataclass(frozen=True)
class LengthValueScores:
    """Token metrics, over the states before each token of finished completions; nan where there are none."""

    mean_squared_error: float
    """Of the value."""
    explained_variance: float
    """1 - Var[G - V] / Var[G]: 1 is perfect, 0 no better than a constant; nan where G does not vary."""
    length_error_tokens: float
    """Mean |predicted - true| remaining length."""
    length_error_relative: float
    """Mean |predicted - true| / true remaining length."""
    calibration_error: float
    """Mean |mean V - mean G| over the tenths of the states."""
    completions: int
    cut: int
    """Completions that were cut, and count nowhere here."""
    states: int
    positions: tuple[PositionError, ...] = ()
    """At `POSITIONS`, one state of each completion."""
    slices: tuple[PositionError, ...] = ()
    """All states, by the slice of the completion that they lie in."""
    calibration: tuple[CalibrationBin, ...] = ()

    def metrics(self) -> dict[str, float]:
        """As a flat table, for logs."""
        names = ("mean_squared_error", "explained_variance", "length_error_tokens", "length_error_relative")
        flat: dict[str, float] = {name: getattr(self, name) for name in (*names, "calibration_error")}
        for error in self.positions:
            flat[f"length_error_tokens_at_{error.position:.0%}".rstrip("%")] = error.tokens
            flat[f"length_error_relative_at_{error.position:.0%}".rstrip("%")] = error.relative
        return flat


@dataclass(frozen=True)
class PromptScores:
    """How well a length is predicted before anything was generated."""

    relative_error: float
    """MRE: mean |predicted - true| / true over the prompts, true being the length that the mean value stands for."""
    noise_floor: float
    """MRE that knowing the policy would still give, since true comes from a few completions; nan with one of each."""
    explained_variance: float
    """1 - Var[G - V] / Var[G] over completions; what is random after the prompt bounds it."""
    calibration_error: float
    """Mean |mean V - mean G| over tenths of the completions by V."""
    prompts: int
    completions: int

    def metrics(self) -> dict[str, float]:
        """As a flat table, for logs."""
        return {
            name: getattr(self, name)
            for name in ("relative_error", "noise_floor", "explained_variance", "calibration_error")
        }


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
    """By names of `BASELINES`."""
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


class LengthValueStatistics:
    """Sums over batches of completions, from which `LengthValueScores` are made.

    Args:
        gamma: discount of the critic.
    """

    def __init__(self, gamma: float) -> None:
        self.gamma = check_gamma(gamma)
        self._sums = np.zeros(7)  # states, G, G^2, G - V, (G - V)^2, |l - L|, |l - L| / L
        self._completions = self._cut = 0
        self._positions = np.zeros((len(POSITIONS), 2))
        self._slices = np.zeros((SLICES, 3))
        self._bins = np.zeros((VALUE_BINS, 3))
        self._first: list[np.ndarray] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch.

        Args:
            logits: (B, S) head outputs, one completion in each row.
            labels: (B, S) of `LengthValueCollator`.
        """
        remaining = labels.cpu().double().numpy()
        z = logits.detach().cpu().double()
        value, predicted = (-torch.sigmoid(z)).numpy(), logit_to_remaining(z, self.gamma).numpy()
        acting = remaining > 0
        rows = np.arange(len(remaining))
        first, length = acting.argmax(1), remaining.max(1)
        some = acting.any(1)
        finished = some & (remaining == 0).any(1)
        self._first.append(value[rows, first][some])
        self._completions += int(finished.sum())
        self._cut += int((some & ~finished).sum())

        known = acting & finished[:, None]
        left, v, guess = remaining[known], value[known], predicted[known]
        g = np.expm1(left * math.log(self.gamma))
        off = np.abs(guess - left)
        self._sums += [len(left), *_moments(g), *_moments(g - v), off.sum(), (off / left).sum()]
        whole = np.broadcast_to(length[:, None], known.shape)[known]
        _count(self._slices, ((whole - left) * SLICES // whole).astype(int), off, off / left)
        _count(self._bins, np.minimum((-v * VALUE_BINS).astype(int), VALUE_BINS - 1), v, g)

        rows, first, length = rows[finished], first[finished], length[finished]
        for position, sums in zip(POSITIONS, self._positions, strict=True):
            time = np.floor(position * length).astype(int)
            off = np.abs(predicted[rows, first + time] - (length - time))
            sums += [off.sum(), (off / (length - time)).sum()]

    def first_values(self) -> np.ndarray:
        """(completions,) V(s_0) of all that were added, in their order; empty completions are left out."""
        return np.concatenate(self._first) if self._first else np.zeros(0)

    def scores(self) -> LengthValueScores:
        """What the sums say."""
        states, g1, g2, e1, e2, off, relative = self._sums
        if not states:
            return LengthValueScores(*(math.nan,) * 5, completions=0, cut=self._cut, states=0)
        calibration = _tenths(self._bins)
        return LengthValueScores(
            mean_squared_error=e2 / states,
            explained_variance=explained_variance_of_sums(states, g1, g2, e1, e2),
            length_error_tokens=off / states,
            length_error_relative=relative / states,
            calibration_error=_calibration_error(calibration),
            completions=self._completions,
            cut=self._cut,
            states=int(states),
            positions=tuple(
                PositionError(position, *(sums / self._completions).tolist())
                for position, sums in zip(POSITIONS, self._positions, strict=True)
            ),
            slices=tuple(
                PositionError((i + 0.5) / SLICES, tokens / count, share / count)
                for i, (count, tokens, share) in enumerate(self._slices.tolist())
                if count
            ),
            calibration=calibration,
        )


def prompt_scores(
    values: np.ndarray, lengths: np.ndarray, finished: np.ndarray, groups: np.ndarray, gamma: float, *, seed: int = 0
) -> PromptScores:
    """Quality of predictions at the prompt (LenVM eq. 13-15).

    Args:
        values: (N,) V(s_0), once for each completion.
        lengths: (N,) tokens of each completion, at least 1.
        finished: (N,) bool; a cut completion counts with the length at which it was cut.
        groups: (N,) number of each completion's prompt.
        gamma: discount.
        seed: of the halvings behind the noise floor.
    """
    if len(values) == 0:
        return PromptScores(*(math.nan,) * 4, prompts=0, completions=0)
    values = values.astype(float)
    true, predicted = prompt_lengths(values, lengths, groups, gamma)
    g = np.expm1(lengths * math.log(gamma))
    bins = np.zeros((VALUE_BINS, 3))
    _count(bins, np.clip((-values * VALUE_BINS).astype(int), 0, VALUE_BINS - 1), values, g)
    return PromptScores(
        relative_error=float(np.mean(np.abs(predicted - true) / true)),
        noise_floor=noise_floor(lengths, groups, gamma, seed=seed),
        explained_variance=explained_variance_of_sums(len(g), *_moments(g), *_moments(g - values)),
        calibration_error=_calibration_error(_tenths(bins)),
        prompts=len(true),
        completions=len(values),
    )


def prompt_lengths(
    values: np.ndarray, lengths: np.ndarray, groups: np.ndarray, gamma: float
) -> tuple[np.ndarray, np.ndarray]:
    """True and predicted length of each prompt: those that the mean of 1 - gamma^L, and -V(s_0), stand for."""
    _, group = np.unique(groups, return_inverse=True)
    count = np.bincount(group)
    mean = np.bincount(group, np.expm1(lengths * math.log(gamma))) / count
    predicted = np.bincount(group, values) / count
    return np.log1p(mean) / math.log(gamma), np.log1p(predicted) / math.log(gamma)


def noise_floor(lengths: np.ndarray, groups: np.ndarray, gamma: float, *, seed: int = 0) -> float:
    """The relative error at the prompt that remains to a critic that knows the truth, by split halves.

    Args:
        lengths: (N,) tokens of each completion.
        groups: (N,) number of each completion's prompt.
        gamma: discount.
        seed: of the halvings.

    Returns:
        Mean over the prompts of |L_a - L_b| / L, L_a and L_b from two halves of the completions, times the ratio of the
        spread of a mean of all to that of a difference of halves: sqrt(1/n) / sqrt(1/a + 1/b), which is 1/2 where n is
        even. Prompts with one completion are left out; nan without others.
    """
    rng = np.random.default_rng(seed)
    _, group = np.unique(groups, return_inverse=True)
    count = np.bincount(group)
    several = count > 1
    if not several.any():
        return math.nan
    g, half = np.expm1(lengths * math.log(gamma)), count // 2
    starts = np.cumsum(count) - count
    ratio = np.sqrt(1 / count[several]) / np.sqrt(1 / half[several] + 1 / (count - half)[several])
    total = np.bincount(group, g)
    length = np.log1p(total / count)[several] / math.log(gamma)
    floors = []
    for _ in range(SPLITS):
        order = np.lexsort((rng.random(len(g)), group))
        rank = np.arange(len(g)) - starts[group[order]]
        chosen = rank < half[group[order]]
        first = np.bincount(group[order][chosen], g[order][chosen], minlength=len(count))
        a, b = first[several] / half[several], (total - first)[several] / (count - half)[several]
        split = np.abs(np.log1p(a) - np.log1p(b)) / -math.log(gamma)
        floors.append(np.mean(ratio * split / length))
    return float(np.mean(floors))


def linear_prediction(features: np.ndarray, values: np.ndarray, new_features: np.ndarray) -> np.ndarray:
    """Values at new prompts by a least-squares line through those of others, kept within what was seen there.

    A feature that does not vary gives the mean.
    """
    spread = features.var()
    slope = ((features - features.mean()) * (values - values.mean())).mean() / spread if spread > 0 else 0.0
    predicted = values.mean() + slope * (new_features - features.mean())
    return np.clip(predicted, values.min(), values.max())


@torch.no_grad()
def first_token_entropy(
    policy: PreTrainedModel, prompt_ids: Sequence[Sequence[int]], *, temperature: float = 1.0, batch_size: int = 32
) -> np.ndarray:
    """Entropy, in nats, of the policy's first token after each prompt: (prompts,).

    Args:
        policy: any causal language model.
        prompt_ids: token ids of each prompt.
        temperature: at which the policy is sampled.
        batch_size: prompts of one forward.
    """
    training = policy.training
    policy.eval()
    entropies = np.empty(len(prompt_ids))
    order = sorted(range(len(prompt_ids)), key=lambda row: -len(prompt_ids[row]))
    try:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            width = len(prompt_ids[rows[0]])
            ids = torch.tensor([[0] * (width - len(prompt_ids[r])) + list(prompt_ids[r]) for r in rows])
            mask = torch.tensor([[0] * (width - len(prompt_ids[r])) + [1] * len(prompt_ids[r]) for r in rows])
            logits = policy(
                input_ids=ids.to(policy.device),
                attention_mask=mask.to(policy.device),
                position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(policy.device),
                logits_to_keep=1,
            ).logits[:, -1]
            log_p = torch.log_softmax(logits.float() / temperature, -1)
            entropies[rows] = -(log_p.exp() * log_p).nan_to_num().sum(-1).cpu().numpy()
    finally:
        policy.train(training)
    return entropies


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
    training = model.training
    model.eval()
    try:
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
    finally:
        model.train(training)
    true, predicted = prompt_lengths(values, lengths, groups, gamma)
    temperature = model.config.temperature or 1.0
    baselines = _baseline_values(rollouts, groups, gamma, fit_on, policy, temperature, rng)
    return LengthEvaluation(
        gamma=gamma,
        scores=statistics.scores(),
        prompt=prompt_scores(values, lengths, finished, groups, gamma, seed=seed),
        baselines={
            name: prompt_scores(guess[groups], lengths, finished, groups, gamma, seed=seed)
            for name, guess in baselines.items()
        },
        lengths=lengths,
        finished=finished,
        predicted=predicted,
        true=true,
        curves=tuple(kept_curves[row] for row in sorted(kept_curves)),
    )


def _baseline_values(
    rollouts: Dataset,
    groups: np.ndarray,
    gamma: float,
    fit_on: Dataset | None,
    policy: PreTrainedModel | None,
    temperature: float,
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    """Predicted value of each prompt, in the order of the groups."""
    features, values = _features(rollouts, groups, gamma, policy, temperature)
    if fit_on is not None:
        fitted, fitted_values = _features(fit_on, prompt_groups(fit_on), gamma, policy, temperature)
        return {name: linear_prediction(fitted[name], fitted_values, features[name]) for name in features}
    half = rng.permutation(len(values)) < len(values) // 2
    predictions = {}
    for name, feature in features.items():
        predictions[name] = np.empty(len(values))
        for one, other in ((half, ~half), (~half, half)):
            source = other if other.any() else one
            predictions[name][one] = linear_prediction(feature[source], values[source], feature[one])
    return predictions


def _features(
    rollouts: Dataset, groups: np.ndarray, gamma: float, policy: PreTrainedModel | None, temperature: float
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    lengths, _ = completion_lengths(rollouts)
    _, first = np.unique(groups, return_index=True)
    prompts = [rollouts[int(row)]["prompt_ids"] for row in first]
    features = {BASELINES[0]: np.zeros(len(prompts)), BASELINES[1]: np.array([float(len(ids)) for ids in prompts])}
    if policy is not None:
        features[BASELINES[2]] = first_token_entropy(policy, prompts, temperature=temperature)
    g = remaining_to_value(torch.from_numpy(lengths.astype(float)), gamma).numpy()
    return features, np.bincount(groups, g) / np.bincount(groups)


def _count(table: np.ndarray, where: np.ndarray, *numbers: np.ndarray) -> None:
    """Add a one and the numbers to the rows of a table."""
    for column, weights in enumerate((None, *numbers)):
        table[:, column] += np.bincount(where, weights, minlength=len(table))


def _moments(x: np.ndarray) -> tuple[float, float]:
    return x.sum(), (x**2).sum()


def _tenths(bins: np.ndarray) -> tuple[CalibrationBin, ...]:
    """Tenths of the states by V, from the rows (count, sum of V, sum of G) of a histogram; equal V stay together."""
    bins = bins[bins[:, 0] > 0][::-1]  # from long to short
    if not len(bins):
        return ()
    middle = (bins[:, 0].cumsum() - bins[:, 0] / 2) / bins[:, 0].sum()
    tenths = [bins[(middle * 10).astype(int) == i].sum(0) for i in range(10)]
    return tuple(CalibrationBin(v / n, g / n, int(n)) for n, v, g in tenths if n)


def _calibration_error(bins: Sequence[CalibrationBin]) -> float:
    states = sum(b.states for b in bins)
    return sum(b.states * abs(b.predicted - b.true) for b in bins) / states
