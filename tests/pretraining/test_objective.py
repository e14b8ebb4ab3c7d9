"""Targets and errors of a critic, against loops backwards through each completion."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rollouts import MIXED, countdown
from torch import tensor
from torch.testing import assert_close

from lenvm_rl.length import logit_to_remaining
from lenvm_rl.pretraining.data import LengthValueCollator
from lenvm_rl.pretraining.objective import length_value_loss, length_value_targets, remaining_targets
from lenvm_rl.pretraining.packing import PackingCollator

GAMMA, N = 0.9, -100


def test_targets_of_a_finished_completion():
    # spec.md section 2: G = -.3439, -.271, -.19, -.1, 0; a prompt of two tokens, and padding
    labels = tensor([[N, 4, 3, 2, 1, 0, N, N]])
    targets = length_value_targets(torch.full((1, 8), -0.7), labels, GAMMA)
    assert_close(targets, tensor([[0.0, -0.3439, -0.271, -0.19, -0.1, 0.0, 0.0, 0.0]]))


def test_targets_of_a_cut_completion_value_the_tail_by_the_critic():
    # spec.md section 4, with V = -.30 at the cut: -(1 - .9^l) + .9^l * -.30
    labels = tensor([[N, 4, 3, 2, 1, N, N]])
    values = tensor([[-0.9, -0.8, -0.8, -0.8, -0.8, -0.30, -0.9]])
    targets = length_value_targets(values, labels, GAMMA)
    assert_close(targets, tensor([[0.0, -0.54073, -0.4897, -0.433, -0.37, 0.0, 0.0]]))


def test_a_cut_at_the_end_of_a_row_and_a_finished_row_share_a_batch():
    labels = tensor([[2, 1, N], [N, 1, 0], [1, N, N]])
    values = tensor([[-0.5, -0.5, -0.2], [-0.5, -0.5, -0.5], [-0.5, -0.4, -0.9]])
    expected = tensor([[-0.352, -0.28, 0.0], [0.0, -0.1, 0.0], [-0.46, 0.0, 0.0]])
    assert_close(length_value_targets(values, labels, GAMMA), expected)


def test_targets_carry_no_gradient():
    values = tensor([[-0.5, -0.5, -0.2]], requires_grad=True)
    assert not length_value_targets(values, tensor([[2, 1, N]]), GAMMA).requires_grad


@given(st.integers(1, 5), st.integers(1, 8), st.booleans(), st.integers(0, 4), st.integers(0, 999))
@settings(max_examples=50, deadline=None)
def test_targets_solve_the_recursion_of_the_length_reward(prompt, completion, finished, padding, seed):
    row = {"prompt_ids": [5] * prompt, "completion_ids": [6] * completion, "finished": finished}
    longer = {"prompt_ids": [5] * prompt, "completion_ids": [6] * (completion + padding), "finished": True}
    labels = LengthValueCollator(0)([row, longer])["labels"]
    values = -torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    end = prompt + completion - 1
    value = 0.0 if finished else values[0, end].item()
    expected = [0.0] * labels.size(1)
    for column in range(end - 1, prompt - 2, -1):
        value = -(1 - GAMMA) + GAMMA * value  # r_t + gamma * V_{t+1}
        expected[column] = value
    assert length_value_targets(values, labels, GAMMA)[0].tolist() == pytest.approx(expected)


def batch_of(rollouts, layout=None):
    collator = LengthValueCollator(0) if layout is None else PackingCollator(0, layout)
    return collator(rollouts)


def random_logits(labels, seed=0, scale=2.0):
    return scale * torch.randn(labels.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def per_completion(labels, numbers):
    """{(first label, ordinal): numbers} of the completions of any layout, found by walking through the rows."""
    found = []
    for row_labels, row_numbers in zip(labels.tolist(), numbers.tolist(), strict=True):
        before = N
        for label, number in zip(row_labels, row_numbers, strict=True):
            if label > 0 and before != label + 1:
                found.append([])
            if label > 0 or (label == 0 and before == 1) or (label == N and before == 1):
                found[-1].append(number)
            before = label
    return found


@pytest.mark.parametrize("layout", [None, "rows", "one row"])
@pytest.mark.parametrize("td_lambda", [1.0, 0.9, 0.3, 0.0])
@pytest.mark.parametrize("space", ["value", "length"])
def test_targets_are_those_of_a_loop_backwards_through_each_completion(layout, td_lambda, space):
    labels = batch_of(MIXED, layout)["labels"]
    z = random_logits(labels)
    if space == "value":
        predictions, reward, gamma = -torch.sigmoid(z), -(1 - GAMMA), GAMMA
        targets = length_value_targets(predictions, labels, GAMMA, td_lambda=td_lambda)
    else:
        predictions, reward, gamma = logit_to_remaining(z, GAMMA), 1.0, 1.0
        targets = remaining_targets(predictions, labels, td_lambda=td_lambda)
    cuts = [label[-1] for label in per_completion(labels, labels)]
    seen = 0
    for values, found, cut in zip(
        per_completion(labels, predictions), per_completion(labels, targets), cuts, strict=True
    ):
        follows = target = 0.0 if cut == 0 else values[-1]
        for t in reversed(range(len(values) - 1)):
            target = reward + gamma * (td_lambda * target + (1 - td_lambda) * follows)
            follows = values[t]
            assert found[t] == pytest.approx(target, rel=1e-5, abs=1e-6)
            seen += 1
        assert cut != 0 or found[-1] == 0
    assert seen == 3 + 4 + 5 + 1 + 1


@pytest.mark.parametrize("layout", [None, "rows"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss": "bce"},
        {"parameterization": "length"},
        {"parameterization": "log_length"},
        {"censoring": "bound"},
        {"censoring": "bound", "parameterization": "length"},
        {"censoring": "bound", "loss": "bce"},
    ],
)
def test_the_loss_of_a_state_is_the_written_formula(layout, settings):
    labels = batch_of(MIXED, layout)["labels"]
    z = random_logits(labels)
    errors = length_value_loss(z, labels, GAMMA, **settings)
    assert (errors[labels == N] == 0).all()
    checked = 0
    for logits, left, found in zip(*(per_completion(labels, x) for x in (z, labels, errors)), strict=True):
        remaining = [math.log(1 + math.exp(x)) / -math.log(GAMMA) for x in logits]
        was_cut = left[-1] == N
        for x, length, label, error in zip(logits, remaining, left, found, strict=True):
            if label == N:
                continue
            target = label + (remaining[-1] if was_cut and settings.get("censoring") != "bound" else 0)
            u, predicted = 1 - GAMMA**target, 1 / (1 + math.exp(-x))
            if settings.get("loss") == "bce":
                expected = -u * math.log(predicted) - (1 - u) * math.log(1 - predicted)
            elif settings.get("parameterization") == "length":
                expected = (math.log(GAMMA) * (length - target)) ** 2
            elif settings.get("parameterization") == "log_length":
                expected = (math.log(1 + length) - math.log(1 + target)) ** 2
            else:
                expected = (predicted - u) ** 2
            if was_cut and settings.get("censoring") == "bound" and length >= target:
                expected = 0.0
            assert error == pytest.approx(expected, rel=1e-6, abs=1e-9)
            checked += 1
    assert checked == sum(1 for row in MIXED for _ in row["completion_ids"]) + 3


def test_every_parameterization_is_right_at_the_same_logits():
    # a head that knows the length is right whatever its error is measured on, and so all are saved and used alike
    labels = batch_of([countdown(8)])["labels"]
    remaining = labels.clamp(min=0).double() + 1e-9
    z = torch.log(torch.expm1(-math.log(GAMMA) * remaining))
    for parameterization in ("value", "length", "log_length"):
        assert length_value_loss(z, labels, GAMMA, parameterization=parameterization).max() < 1e-12
    assert_close(-torch.sigmoid(z)[labels > 0], GAMMA ** labels[labels > 0].double() - 1)


def test_bootstrapping_recovers_what_the_limit_hid_better_than_the_other_ways():
    # spec.md section 4: 30 % are cut; the state does not reveal its position, so one number is all a critic can say
    stop, gamma = 0.05, 0.96
    limit = round(math.log(0.3) / math.log(1 - stop))
    rng = random.Random(0)
    lengths = [math.ceil(math.log(1 - rng.random()) / math.log(1 - stop)) for _ in range(2_000)]
    assert sum(length > limit for length in lengths) / len(lengths) == pytest.approx(0.3, abs=0.02)
    # V = -(1 - gamma) + gamma * (1 - stop) * V
    truth = -(1 - gamma) / (1 - gamma * (1 - stop))
    settled = {name: settled_value(name, lengths, limit, gamma) for name in CENSORED}
    errors = {name: abs(value - truth) for name, value in settled.items()}
    assert errors["bootstrap"] < 0.01
    assert errors["bootstrap"] < 0.2 * min(errors["bound"], errors["official"], errors["drop"])
    assert errors["bound"] < errors["official"] < errors["drop"]


CENSORED = ("bootstrap", "bound", "official", "drop")


def settled_value(censoring, lengths, limit, gamma):
    """Where a critic of a single number ends, by gradient descent on `length_value_loss`."""
    rollouts = [
        {"prompt_ids": [5], "completion_ids": [6] * min(length, limit), "finished": length <= limit}
        for length in lengths
        if censoring != "drop" or length <= limit
    ]
    labels = LengthValueCollator(0, official=censoring == "official")(rollouts)["labels"]
    known = labels > 0  # the end can be told from the other states
    z = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.SGD([z], lr=10.0)
    for _ in range(60):
        optimizer.zero_grad()
        errors = length_value_loss(z.expand(labels.shape), labels, gamma, censoring=censoring)
        (errors[known].sum() / known.sum()).backward()
        optimizer.step()
    return -torch.sigmoid(z).item()
