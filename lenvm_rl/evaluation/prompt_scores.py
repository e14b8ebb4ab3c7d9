"""How well a length is predicted at the prompt, beside what no critic could do better and what needs none.

1. V(s_0) is compared with the mean over several completions of the same prompt (LenVM eq. 13-15). A completion that was
   cut enters as one of the limit's length: with gamma chosen from the limit its value is within 0.01 of the true one.
2. The noise floor is what a critic that knows the truth would still score, since the truth of a few completions is
   itself an estimate.
3. The baselines are the mean length and two lines, through the length of the prompt and the policy's first entropy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from lenvm_rl.advantages.statistics import explained_variance_of_sums
from lenvm_rl.eval_mode import eval_mode
from lenvm_rl.evaluation.calibration import ValueHistogram, calibration_error
from lenvm_rl.evaluation.length_scores import moments
from lenvm_rl.length import remaining_to_value
from lenvm_rl.pretraining.data import completion_lengths, prompt_groups
from lenvm_rl.sampling import left_padded

SPLITS = 64
"""Random halvings that a noise floor averages over."""
BASELINES = ("mean length", "length of the prompt", "entropy of the first token")
"""Predictions at the prompt that need no critic."""


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


def prompt_scores(
    values: np.ndarray, lengths: np.ndarray, groups: np.ndarray, gamma: float, *, seed: int = 0
) -> PromptScores:
    """Quality of predictions at the prompt (LenVM eq. 13-15).

    Args:
        values: (N,) V(s_0), once for each completion.
        lengths: (N,) tokens of each completion, at least 1; of a cut one, those at which it was cut.
        groups: (N,) number of each completion's prompt.
        gamma: discount.
        seed: of the halvings behind the noise floor.
    """
    if len(values) == 0:
        return PromptScores(*(math.nan,) * 4, prompts=0, completions=0)
    values = values.astype(float)
    true, predicted = prompt_lengths(values, lengths, groups, gamma)
    g = np.expm1(lengths * math.log(gamma))
    histogram = ValueHistogram()
    histogram.add(values, g)
    return PromptScores(
        relative_error=float(np.mean(np.abs(predicted - true) / true)),
        noise_floor=noise_floor(lengths, groups, gamma, seed=seed),
        explained_variance=explained_variance_of_sums(len(g), *moments(g), *moments(g - values)),
        calibration_error=calibration_error(histogram.tenths()),
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


def baseline_values(
    rollouts: Dataset,
    groups: np.ndarray,
    gamma: float,
    fit_on: Dataset | None,
    policy: PreTrainedModel | None,
    temperature: float,
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    """Values at the prompt that need no critic.

    Args:
        rollouts: whose prompts are predicted.
        groups: (rollouts,) number of each one's prompt, from 0.
        gamma: discount.
        fit_on: rollouts of other prompts to fit to; None predicts each half of the prompts from the other half.
        policy: for the entropy of the first token, which is left out without it.
        temperature: at which the policy was sampled.
        rng: of the halves.

    Returns:
        By names of `BASELINES`, (prompts,) in the order of the groups.
    """
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
    entropies = np.empty(len(prompt_ids))
    order = sorted(range(len(prompt_ids)), key=lambda row: -len(prompt_ids[row]))
    with eval_mode(policy):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            ids, mask = left_padded([prompt_ids[row] for row in rows], 0, policy.device)
            logits = policy(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                logits_to_keep=1,
            ).logits[:, -1]
            log_p = torch.log_softmax(logits.float() / temperature, -1)
            entropies[rows] = -(log_p.exp() * log_p).nan_to_num().sum(-1).cpu().numpy()
    return entropies


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
