"""Targets, shaping and the finish of the length signal; invariance on a tree of completions that is small enough to
enumerate."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor
from torch.testing import assert_close

from lenvm_rl.advantages import compute_advantages
from lenvm_rl.credit import LengthCredit
from lenvm_rl.length_signal import finished_signal, length_signal, shaping_to_go, target_signal

GAMMA = 0.9
VALUES = tensor([[-0.40, -0.35, -0.20, -0.15]])
ALL = torch.ones(1, 4, dtype=torch.bool)
RETURNS = tensor([[-0.3439, -0.271, -0.19, -0.1]])  # of a completion that finished after four tokens


def test_a_target_rewards_coming_nearer_than_expected():
    # two tokens wanted: the states are worth -0.19, -0.1, 0, 0 by the target
    signal = target_signal(VALUES, RETURNS, ALL, tensor([2.0]), GAMMA)
    assert_close(signal, tensor([[0.21 - 0.1539, 0.25 - 0.171, 0.2 - 0.19, 0.15 - 0.1]]))


def test_a_target_beyond_the_end_lengthens():
    # ten tokens wanted, -(1 - 0.9^10) = -0.6513 at the first: the completion ended too early, and earlier than expected
    signal = target_signal(VALUES, RETURNS, ALL, tensor([10.0]), GAMMA)
    assert_close(signal[0, 0], tensor((0.651322 - 0.40) - (0.651322 - 0.3439)))
    assert signal[0, 0] < 0


def test_a_target_of_nothing_is_the_length_advantage_and_one_without_limit_its_negative():
    bootstrap = tensor([0.0])
    advantages = compute_advantages(VALUES, bootstrap, ALL, tensor([0.0]), gamma=GAMMA, lam=1.0, coef=1.0)
    shorten = target_signal(VALUES, advantages.returns, ALL, tensor([0.0]), GAMMA)
    lengthen = target_signal(VALUES, advantages.returns, ALL, tensor([1e6]), GAMMA)
    assert_close(shorten, advantages.length)
    assert_close(lengthen, -advantages.length)


def test_tokens_of_tools_do_not_count_towards_a_target():
    values = tensor([[-0.40, float("nan"), -0.35, -0.20, -0.15]])
    mask = tensor([[True, False, True, True, True]])
    returns = tensor([[-0.3439, 0.0, -0.271, -0.19, -0.1]])
    signal = target_signal(values, returns, mask, tensor([2.0]), GAMMA)
    without = target_signal(VALUES, RETURNS, ALL, tensor([2.0]), GAMMA)
    assert_close(signal[mask], without[0])
    assert signal[0, 1] == 0


def test_undiscounted_shaping_to_go_is_minus_the_potential():
    assert_close(shaping_to_go(VALUES, ALL, GAMMA, discounted=False), -VALUES)


def test_discounted_shaping_to_go_adds_up_the_worked_example():
    # F = 0.085, 0.17, 0.065, 0.15: what is still to come of it, undiscounted
    signal = shaping_to_go(VALUES, ALL, GAMMA, discounted=True)
    assert_close(signal, tensor([[0.47, 0.385, 0.215, 0.15]]))


@given(st.integers(0, 2**20), st.booleans())
@settings(max_examples=40, deadline=None)
def test_shaping_to_go_is_the_sum_of_the_rewards_one_by_one(seed, discounted):
    generator = torch.Generator().manual_seed(seed)
    values = -torch.rand(3, 6, generator=generator)
    mask = torch.rand(3, 6, generator=generator) < 0.7
    values = values.masked_fill(~mask, float("nan"))
    signal = shaping_to_go(values, mask, GAMMA, discounted=discounted)
    for row in range(3):
        own = [t for t in range(6) if mask[row, t]]
        potential = [values[row, t].double().item() for t in own] + [0.0]
        factor = GAMMA if discounted else 1.0
        rewards = [factor * after - before for before, after in itertools.pairwise(potential)]
        for number, t in enumerate(own):
            assert signal[row, t].item() == pytest.approx(sum(rewards[number:]), abs=1e-6)
    assert not signal[~mask].any()


# A tree of completions: two decisions between "stop" and "go on", then the end. A policy is the chances to go on.
COMPLETIONS = {(): 0.55, (1,): 0.6, (1, 1): 0.5}
"""Decisions to go on -> task reward."""
POTENTIAL = {(): -0.5, (1,): -0.3, (1, 1): -0.2}
"""Length values of the states in which something is decided, or in which the end token follows."""
POLICIES = [(a, b) for a in (0.1, 0.5, 0.9) for b in (0.2, 0.6, 0.95)]


def outcomes(policy):
    """(probability, states that were gone through, task reward) of each completion."""
    first, second = policy
    yield 1 - first, [()], COMPLETIONS[()]
    yield first * (1 - second), [(), (1,)], COMPLETIONS[(1,)]
    yield first * second, [(), (1,), (1, 1)], COMPLETIONS[(1, 1)]


def shaped_objective(policy, coef, *, discounted=False, gate=lambda reward: 1.0, weight=lambda tokens: 1.0):
    """Expected task reward plus shaping rewards from the first state on, as the trainer's signal has them."""
    total = 0.0
    for probability, states, reward in outcomes(policy):
        values = tensor([[POTENTIAL[state] for state in states]], dtype=torch.float64)
        to_go = shaping_to_go(values, torch.ones_like(values, dtype=torch.bool), GAMMA, discounted=discounted)
        total += probability * weight(len(states)) * (reward + coef * gate(reward) * to_go[0, 0].item())
    return total


def order(objective):
    return sorted(POLICIES, key=objective)


def test_shaping_leaves_the_order_of_policies_as_it_is():
    plain = {policy: shaped_objective(policy, 0.0) for policy in POLICIES}
    for coef in (0.5, 5.0):
        for policy in POLICIES:  # every policy gains the same: the potential of the prompt
            assert shaped_objective(policy, coef) == pytest.approx(plain[policy] + coef * 0.5)
        assert order(lambda policy, coef=coef: shaped_objective(policy, coef)) == order(plain.get)


@pytest.mark.parametrize(
    "broken",
    [{"discounted": True}, {"gate": lambda reward: float(reward > 0.52)}, {"weight": lambda tokens: 1 / tokens}],
    ids=["a discount that the objective does not have", "a gate", "tokens weighed by their completion's length"],
)
def test_without_a_condition_the_order_of_policies_changes(broken):
    assert order(lambda policy: shaped_objective(policy, 5.0, **broken)) != order(
        lambda policy: shaped_objective(policy, 0.0)
    )


def test_as_a_baseline_shaping_changes_no_gradient():
    # d/d logit of the objective, by the score function over all completions, each decision with its own reward-to-go
    logits = torch.tensor([0.3, -0.4], dtype=torch.float64, requires_grad=True)

    def gradient(coef):
        first, second = torch.sigmoid(logits)
        log_probs = {  # of the decision taken in each state
            (): {False: torch.log(1 - first), True: torch.log(first)},
            (1,): {False: torch.log(1 - second), True: torch.log(second)},
        }
        surrogate = torch.zeros((), dtype=torch.float64)
        for probability, states, reward in outcomes((first.item(), second.item())):
            values = tensor([[POTENTIAL[state] for state in states]], dtype=torch.float64)
            to_go = shaping_to_go(values, torch.ones_like(values, dtype=torch.bool), GAMMA, discounted=False)[0]
            for number, state in enumerate(states):
                if state in log_probs:
                    went_on = number + 1 < len(states)
                    surrogate = surrogate + probability * (reward + coef * to_go[number]) * log_probs[state][went_on]
        return torch.autograd.grad(surrogate, logits)[0]

    assert_close(gradient(3.0), gradient(0.0), check_dtype=False, atol=1e-6, rtol=0)


SIGNAL = tensor([[0.4, -0.2, 0.0], [0.1, 0.3, -0.6]])
MASK = tensor([[True, True, False], [True, True, True]])
GATE = tensor([1.0, 0.5])


def test_a_clip_bounds_each_token():
    finished = finished_signal(SIGNAL * MASK, MASK, GATE, LengthCredit(clip=0.25))
    assert_close(finished, tensor([[0.25, -0.2, 0.0], [0.05, 0.125, -0.125]]))


def test_a_completion_shares_the_mean_of_its_tokens():
    finished = finished_signal(SIGNAL * MASK, MASK, GATE, LengthCredit(resolution="completion"))
    mean = (0.1 + 0.3 - 0.6) / 3
    assert_close(finished, tensor([[0.1, 0.1, 0.0], [0.5 * mean, 0.5 * mean, 0.5 * mean]]))


def test_a_batch_shares_the_mean_of_the_tokens_that_feel_it():
    signal, mask = torch.cat([SIGNAL, tensor([[9.0, 9.0, 9.0]])]), torch.cat([MASK, tensor([[True, True, True]])])
    finished = finished_signal(signal * mask, mask, tensor([1.0, 0.5, 0.0]), LengthCredit(resolution="batch"))
    mean = (0.4 - 0.2 + 0.1 + 0.3 - 0.6) / 5
    assert_close(finished[:, 0], tensor([mean, 0.5 * mean, 0.0]))


def test_scale_and_clip_come_in_this_order():
    std = torch.tensor([0.4, -0.2, 0.1, 0.3, -0.6]).std(correction=0)
    finished = finished_signal(SIGNAL * MASK, MASK, torch.ones(2), LengthCredit(scale="std", clip=1.0))
    assert_close(finished, (SIGNAL * MASK / std).clamp(-1.0, 1.0))


def test_the_scale_is_that_of_all_processes():
    credit = LengthCredit(scale="std")
    whole = finished_signal(SIGNAL * MASK, MASK, torch.ones(2), credit)
    # two processes with one row each, whose sums are recorded first and then added up
    sums: list[list] = [[], []]
    parts = [((SIGNAL * MASK)[row : row + 1], MASK[row : row + 1], torch.ones(1), credit) for row in (0, 1)]
    for row, part in enumerate(parts):
        finished_signal(*part, lambda own, row=row: sums[row].append(own) or own)
    for row, part in enumerate(parts):
        added = map(sum, zip(*sums, strict=True))
        assert_close(finished_signal(*part, lambda own, added=added: next(added)), whole[row : row + 1])


def test_the_mode_of_the_credit_chooses_the_signal():
    advantages = compute_advantages(VALUES, tensor([0.0]), ALL, tensor([0.0]), gamma=GAMMA, lam=1.0, coef=0.0)
    additive = length_signal(advantages, VALUES, ALL, LengthCredit(), gamma=GAMMA, target=None)
    shaping = length_signal(advantages, VALUES, ALL, LengthCredit(mode="shaping"), gamma=GAMMA, target=None)
    targeted = length_signal(advantages, VALUES, ALL, LengthCredit(targeted=True), gamma=GAMMA, target=tensor([2.0]))
    assert_close(additive, advantages.length)
    assert_close(shaping, -VALUES)
    assert_close(targeted, target_signal(VALUES, advantages.returns, ALL, tensor([2.0]), GAMMA))
