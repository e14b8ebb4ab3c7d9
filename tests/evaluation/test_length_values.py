import math
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import tensor
from transformers import AutoModelForCausalLM

from lenvm_rl.evaluation.length_values import (
    LengthValueStatistics,
    evaluate_lenvm,
    first_token_entropy,
    linear_prediction,
    noise_floor,
    prompt_scores,
)
from lenvm_rl.model import LengthValueModel
from lenvm_rl.pretraining.data import LengthValueCollator

GAMMA = 0.9


def rollout(prompt, length, finished=True, seed=0):
    rng = random.Random(f"{seed} {prompt} {length}")
    return {
        "prompt_ids": prompt,
        "completion_ids": [rng.randint(2, 100) for _ in range(length)],
        "finished": finished,
    }


ROLLOUTS = [rollout([5, 6], 3), rollout([7], 9), rollout([5, 6], 4, finished=False), rollout([8, 8, 8], 1)]
ROLLOUTS += [rollout([7], 6), rollout([9, 4], 11), rollout([9, 4], 2), rollout([8, 8, 8], 5)]


def batch_of(rollouts, seed=0):
    labels = LengthValueCollator(0)(rollouts)["labels"]
    return torch.randn(labels.shape, generator=torch.Generator().manual_seed(seed)), labels


def statistics_of(batches):
    statistics = LengthValueStatistics(GAMMA)
    for logits, labels in batches:
        statistics.add(logits, labels)
    return statistics


def states(logits, labels):
    """(remaining, V, predicted length, share done) of all states that count, one after the other."""
    for row_z, row_labels in zip(logits.tolist(), labels.tolist(), strict=True):
        if 0 not in row_labels:
            continue
        length = max(row_labels)
        for z, left in zip(row_z, row_labels, strict=True):
            if left > 0:
                u = 1 / (1 + math.exp(-z))
                yield left, -u, math.log(1 - u) / math.log(GAMMA), (length - left) / length


def test_token_metrics_are_means_over_the_states_of_finished_completions():
    logits, labels = batch_of(ROLLOUTS)
    scores = statistics_of([(logits, labels)]).scores()
    rows = list(states(logits, labels))
    returns = [GAMMA**left - 1 for left, *_ in rows]
    errors = [g - v for g, (_, v, _, _) in zip(returns, rows, strict=True)]
    off = [abs(predicted - left) for left, _, predicted, _ in rows]
    assert scores.states == len(rows) == 3 + 9 + 1 + 6 + 11 + 2 + 5
    assert (scores.completions, scores.cut) == (7, 1)
    assert scores.mean_squared_error == pytest.approx(np.mean(np.square(errors)))
    assert scores.explained_variance == pytest.approx(1 - np.var(errors) / np.var(returns))
    assert scores.length_error_tokens == pytest.approx(np.mean(off), rel=1e-6)
    relative = [x / left for x, (left, *_) in zip(off, rows, strict=True)]
    assert scores.length_error_relative == pytest.approx(np.mean(relative), rel=1e-6)


def test_errors_by_position_are_those_of_one_state_of_each_completion():
    logits, labels = batch_of(ROLLOUTS)
    scores = statistics_of([(logits, labels)]).scores()
    for error, position in zip(scores.positions, (0, 0.25, 0.5, 0.75), strict=True):
        off, relative = [], []
        for row_z, row in zip(logits, ROLLOUTS, strict=True):
            if not row["finished"]:
                continue
            length = len(row["completion_ids"])
            time = int(position * length)
            z = row_z[len(row["prompt_ids"]) - 1 + time].item()
            predicted = math.log(1 + math.exp(z)) / -math.log(GAMMA)
            off.append(abs(predicted - (length - time)))
            relative.append(off[-1] / (length - time))
        assert error.position == position
        assert (error.tokens, error.relative) == pytest.approx((np.mean(off), np.mean(relative)), rel=1e-5)


def test_slices_hold_all_states_by_how_much_was_there():
    logits, labels = batch_of(ROLLOUTS)
    scores = statistics_of([(logits, labels)]).scores()
    for error in scores.slices:
        low, high = error.position - 0.025, error.position + 0.025
        off = [abs(p - left) for left, _, p, done in states(logits, labels) if low - 1e-9 <= done < high - 1e-9]
        assert error.tokens == pytest.approx(np.mean(off), rel=1e-5)


def test_batches_and_padding_change_nothing():
    logits, labels = batch_of(ROLLOUTS)
    whole = statistics_of([(logits, labels)])
    widths = [len(row["prompt_ids"]) + len(row["completion_ids"]) for row in ROLLOUTS]
    parts = statistics_of((logits[i : i + 1, :width], labels[i : i + 1, :width]) for i, width in enumerate(widths))
    assert whole.scores().metrics() == pytest.approx(parts.scores().metrics(), rel=1e-9)
    assert whole.first_values() == pytest.approx(parts.first_values())
    first = [-torch.sigmoid(z[len(row["prompt_ids"]) - 1]).item() for z, row in zip(logits, ROLLOUTS, strict=True)]
    assert whole.first_values() == pytest.approx(first, rel=1e-6)


def test_calibration_compares_tenths_of_the_states():
    rollouts = [rollout([5], random.Random(i).randint(1, 40)) for i in range(300)]
    logits, labels = batch_of(rollouts)
    scores = statistics_of([(logits, labels)]).scores()
    rows = sorted((v, GAMMA**left - 1) for left, v, _, _ in states(logits, labels))
    tenths = np.array_split(np.array(rows), 10)
    assert sum(b.states for b in scores.calibration) == len(rows)
    for found, tenth in zip(scores.calibration, tenths, strict=True):
        assert found.states == pytest.approx(len(tenth), abs=10)
        assert (found.predicted, found.true) == pytest.approx(tuple(tenth.mean(0)), abs=2e-3)
    expected = np.mean([abs(tenth[:, 0].mean() - tenth[:, 1].mean()) for tenth in tenths])
    assert scores.calibration_error == pytest.approx(expected, abs=1e-3)


def test_a_perfect_critic_is_perfect():
    _, labels = batch_of(ROLLOUTS)
    z = torch.log(torch.expm1(-math.log(GAMMA) * labels.clamp(min=1).double()))
    scores = statistics_of([(z, labels)]).scores()
    assert scores.explained_variance == pytest.approx(1) and scores.length_error_tokens == pytest.approx(0, abs=1e-9)
    assert scores.calibration_error == pytest.approx(0, abs=1e-9)


def test_what_nothing_is_known_of_is_not_a_number():
    scores = statistics_of([batch_of([rollout([5], 4, finished=False)])]).scores()
    assert math.isnan(scores.explained_variance) and scores.cut == 1 and scores.completions == 0
    assert statistics_of([]).scores().states == 0
    same = statistics_of([batch_of([rollout([5], 1), rollout([6], 1)])]).scores()
    assert math.isnan(same.explained_variance) and same.mean_squared_error > 0
    assert math.isnan(prompt_scores(*[np.zeros(0)] * 2, np.zeros(0, bool), np.zeros(0, int), GAMMA).relative_error)


def test_the_error_at_the_prompt_is_that_of_the_paper():
    # LenVM eq. 13-15, by hand: prompts of (2, 4) and (3,) tokens, predicted at lengths 3 and 6
    lengths, groups = np.array([2, 3, 4]), np.array([7, 1, 7])
    values = np.array([0.9**3 - 1, 0.9**6 - 1, 0.9**3 - 1])
    scores = prompt_scores(values, lengths, np.ones(3, bool), groups, GAMMA)
    true = math.log((0.9**2 + 0.9**4) / 2) / math.log(0.9)
    assert scores.relative_error == pytest.approx(
        ((3 - true) / true * -1 + 1.0) / 2 if true > 3 else ((3 - true) / true + 1.0) / 2
    )
    g = np.array([0.9**2 - 1, 0.9**3 - 1, 0.9**4 - 1])
    assert scores.explained_variance == pytest.approx(1 - np.var(g - values) / np.var(g))
    assert (scores.prompts, scores.completions) == (2, 3)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 16])
def test_a_critic_that_knows_the_truth_scores_the_noise_floor(count):
    rng = np.random.default_rng(count)
    stop = rng.uniform(0.03, 0.3, 4000)  # prompts whose completions end with these probabilities at each token
    groups = np.repeat(np.arange(4000), count)
    lengths = rng.geometric(stop[groups])
    known = -(1 - GAMMA) / (1 - GAMMA * (1 - stop))
    order = rng.permutation(len(groups))
    scores = prompt_scores(known[groups][order], lengths[order], np.ones(len(groups), bool), groups[order], GAMMA)
    # a difference of few lengths is not distributed as a mean of all: the floor is an estimate
    assert scores.noise_floor == pytest.approx(scores.relative_error, rel=0.15)


def test_one_completion_of_each_prompt_shows_no_noise():
    assert math.isnan(noise_floor(np.array([3, 5]), np.array([0, 1]), GAMMA))
    # equal ones show that there is none, and a single one says nothing
    assert noise_floor(np.array([3, 3, 5]), np.array([0, 0, 1]), GAMMA) == pytest.approx(0, abs=1e-12)


def test_a_line_through_other_prompts_predicts_new_ones():
    x = np.array([1.0, 2.0, 3.0])
    assert linear_prediction(x, -0.1 * x, np.array([1.5, 9.0])) == pytest.approx([-0.15, -0.3])  # kept in what was seen
    assert linear_prediction(np.zeros(3), -0.1 * x, np.zeros(2)) == pytest.approx([-0.2, -0.2])


def test_the_entropy_of_the_first_token_is_that_of_the_policys_distribution(policy_folder):
    policy = AutoModelForCausalLM.from_pretrained(policy_folder)
    prompts = [[5, 6, 7], [9], [20, 30, 40, 50, 60], [8, 8]]
    found = first_token_entropy(policy, prompts, temperature=0.7, batch_size=3)
    for ids, entropy in zip(prompts, found, strict=True):
        p = torch.softmax(policy(tensor([ids])).logits[0, -1] / 0.7, -1)
        assert entropy == pytest.approx(-(p * p.log()).sum().item(), rel=1e-4)


@pytest.fixture
def critic(critic_folder):
    return LengthValueModel.from_pretrained(critic_folder)


def many(prompts=12, completions=4, seed=0):
    rng = random.Random(seed)
    found = []
    for number in range(prompts):
        prompt = [rng.randint(2, 90) for _ in range(rng.randint(1, 6))]
        for sample in range(completions):
            found.append(rollout(prompt, rng.randint(1, 12), rng.random() < 0.8, seed=(number, sample)))
    return Dataset.from_list(found)


@pytest.mark.parametrize("token_budget", [20, 100_000])
def test_an_evaluation_scores_every_rollout_once_in_its_place(critic, token_budget):
    rollouts = many()
    evaluation = evaluate_lenvm(critic, rollouts, token_budget=token_budget, curves=5)
    batch = LengthValueCollator(0)(list(rollouts))
    logits = critic(batch["input_ids"]).logits
    expected = statistics_of([(logits, batch["labels"])]).scores()
    assert evaluation.scores.metrics() == pytest.approx(expected.metrics(), rel=1e-4)
    prompts = {}
    for row in rollouts:
        prompts.setdefault(tuple(row["prompt_ids"]), []).append(len(row["completion_ids"]))
    for (ids, lengths), predicted, true in zip(prompts.items(), evaluation.predicted, evaluation.true, strict=True):
        value = critic.values(tensor([ids]))[0, -1].item()
        assert predicted == pytest.approx(math.log(1 + value) / math.log(GAMMA), rel=1e-3)
        assert true == pytest.approx(math.log(np.mean([GAMMA**n for n in lengths])) / math.log(GAMMA), rel=1e-6)
    assert len(evaluation.curves) == 5
    for curve in evaluation.curves:
        alone = critic(tensor([curve.prompt_ids + curve.completion_ids])).logits[0, len(curve.prompt_ids) - 1 :]
        assert torch.from_numpy(curve.logits).allclose(alone, atol=1e-4)
        assert curve.true[0] == len(curve.completion_ids) and curve.true[-1] == 0


def test_baselines_are_fitted_to_other_prompts(critic, policy_folder):
    policy = AutoModelForCausalLM.from_pretrained(policy_folder)
    rollouts, others = many(), many(seed=1)
    evaluation = evaluate_lenvm(critic, rollouts, fit_on=others, policy=policy)
    assert list(evaluation.baselines) == ["mean length", "length of the prompt", "entropy of the first token"]
    # the mean over the other prompts, whatever is asked
    prompts = {}
    for row in others:
        prompts.setdefault(tuple(row["prompt_ids"]), []).append(GAMMA ** len(row["completion_ids"]) - 1)
    mean = np.mean([np.mean(values) for values in prompts.values()])
    length = math.log(1 + mean) / math.log(GAMMA)
    expected = np.mean(np.abs(length - evaluation.true) / evaluation.true)
    assert evaluation.baselines["mean length"].relative_error == pytest.approx(expected)
    assert list(evaluate_lenvm(critic, rollouts).baselines) == ["mean length", "length of the prompt"]
    assert evaluation.to_dict()["prompt"]["prompts"] == 12


def test_an_evaluation_leaves_the_model_as_it_was(critic):
    critic.train()
    evaluate_lenvm(critic, many(2))
    assert critic.training and all(parameter.requires_grad for parameter in critic.parameters())
