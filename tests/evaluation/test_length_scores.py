import math
import random

import numpy as np
import pytest
import torch
from rollouts import rollout

from lenvm_rl.evaluation.length_scores import LengthValueStatistics
from lenvm_rl.pretraining.data import LengthValueCollator

GAMMA = 0.9


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
