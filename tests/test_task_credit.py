import math

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from lenvm_rl.advantages import gae, whiten
from lenvm_rl.advantages.statistics import row_moments
from lenvm_rl.task_credit import (
    fit_of,
    kl_penalties,
    length_adaptive_lambda,
    terminal_rewards,
    value_loss,
)


def same(sums):
    return sums


# Rewards


def test_the_reward_lies_on_the_last_own_token_and_a_row_without_one_gets_none():
    mask = tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]).bool()
    expected = [[0.0, 0.0, 0.0, 2.0], [0.0, 3.0, 0.0, 0.0], [0.0, 0.0, 5.0, 0.0], [0.0] * 4]
    assert_close(terminal_rewards(tensor([2.0, 3.0, 5.0, 7.0]), mask), tensor(expected))


def test_the_penalty_for_leaving_the_reference():
    logps, reference = tensor([[-1.0, -2.0, math.nan]]), tensor([[-1.5, -1.0, 0.0]])
    mask = tensor([[True, True, False]])
    assert_close(kl_penalties(logps, reference, mask, "k1"), tensor([[0.5, -1.0, 0.0]]))
    k3 = [math.exp(-0.5) - 1 + 0.5, math.exp(1.0) - 1 - 1.0, 0.0]
    assert_close(kl_penalties(logps, reference, mask, "k3"), tensor([k3]))


# lambda


def test_vapos_lambda_grows_with_the_length_and_is_never_negative():
    tokens = tensor([0, 1, 10, 20, 40, 200])
    # alpha 0.05: 1 - 20/l
    assert_close(length_adaptive_lambda(tokens, 0.05), tensor([0.0, 0.0, 0.0, 0.0, 0.5, 0.9]))


def test_vapos_lambda_gives_its_trace_the_length_it_asks_for():
    lam = length_adaptive_lambda(tensor([1000]), 0.05).double()
    assert_close((lam ** torch.arange(100_000)).sum(), tensor(50.0, dtype=torch.float64), atol=1e-3, rtol=0)


# GAE


def textbook(rewards, values, gamma, lam):
    """A_t = sum over k of (gamma lam)^k delta_{t+k}, each sum by itself."""
    length = len(rewards)
    after = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * after[t] - values[t] for t in range(length)]
    return [sum((gamma * lam) ** k * deltas[t + k] for k in range(length - t)) for t in range(length)]


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5), (0.99, 0.0)])
def test_gae_of_terminal_rewards_is_the_textbooks(gamma, lam):
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 7, 40, 63]
    values = torch.randn(4, 64, generator=generator)
    mask = torch.arange(64) < tensor(lengths)[:, None]
    rewards = terminal_rewards(tensor([1.0, 0.0, 0.5, -1.0]), mask)
    advantages, returns = gae(rewards, values, torch.zeros(4), mask, gamma=gamma, lam=lam)
    for row, length in enumerate(lengths):
        expected = textbook(rewards[row, :length].tolist(), values[row, :length].tolist(), gamma, lam)
        assert_close(advantages[row, :length].double(), tensor(expected, dtype=torch.float64), atol=1e-6, rtol=1e-6)
        assert_close(returns[row, :length], advantages[row, :length] + values[row, :length])
        assert not advantages[row, length:].any()


def test_each_completion_may_have_its_own_lambda():
    values, mask = tensor([[0.2, 0.4], [0.2, 0.4]]), torch.ones(2, 2, dtype=torch.bool)
    advantages, _ = gae(
        terminal_rewards(tensor([1.0, 1.0]), mask), values, torch.zeros(2), mask, gamma=1.0, lam=tensor([0.0, 0.5])
    )
    # deltas .2 and .6
    assert_close(advantages, tensor([[0.2, 0.6], [0.5, 0.6]]))


# The value loss


def test_a_value_that_left_its_old_one_too_far_gives_no_gradient():
    values = tensor([[1.0, 0.05, -0.4]], requires_grad=True)
    old, returns = torch.zeros(1, 3), tensor([[2.0, 2.0, 2.0]])
    found = value_loss(values, old, returns, torch.ones(1, 3, dtype=torch.bool), clip=0.2)
    # towards the target and beyond 0.2: held at 0.2; within: as it is; away from the target: its own error is larger
    assert_close(found.loss, tensor(0.5 * (1.8**2 + 1.95**2 + 2.4**2)))
    assert found.clipped == 1
    found.loss.backward()
    assert_close(values.grad, tensor([[0.0, -1.95, -2.4]]))


def test_without_a_clip_it_is_half_the_squared_error_of_own_tokens():
    values = tensor([[1.0, math.nan], [3.0, 4.0]], requires_grad=True)
    mask = tensor([[True, False], [True, True]])
    found = value_loss(values, torch.zeros(2, 2), tensor([[0.0, math.nan], [1.0, 1.0]]), mask, clip=None)
    assert_close(found.loss, tensor(0.5 * (1 + 4 + 9)))
    found.loss.backward()
    assert_close(values.grad, tensor([[1.0, 0.0], [2.0, 3.0]]))


# Statistics


def test_moments_of_rows_whiten_the_batch():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 8, generator=generator) * 2 + 5
    mask = torch.arange(8) < tensor([3, 8, 0])[:, None]
    white = whiten(x, mask, mask.sum(1), row_moments(x, mask))
    chosen = x[mask]
    assert_close(white[mask], (chosen - chosen.mean()) / chosen.std(), atol=1e-5, rtol=1e-5)
    assert not white[~mask].any()


def test_the_fit_is_that_of_all_tokens():
    generator = torch.Generator().manual_seed(2)
    values, returns = torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator)
    mask = torch.rand(4, 6, generator=generator) < 0.6
    halves = [slice(0, 1), slice(1, 4)]
    sent = []
    for half in halves:
        fit_of(values[half], returns[half], mask[half], lambda sums: sent.append(sums) or sums)
    found = fit_of(values[halves[0]], returns[halves[0]], mask[halves[0]], lambda _: sent[0] + sent[1])
    g, v = returns[mask].double(), values[mask].double()
    assert found.explained_variance == pytest.approx((1 - (g - v).var() / g.var()).item())
    assert found.mean_return == pytest.approx(g.mean().item()) and found.mean_value == pytest.approx(v.mean().item())
    assert found.return_std == pytest.approx(g.std(correction=0).item())
    assert math.isnan(fit_of(values, torch.ones(4, 6), mask, same).explained_variance)
    assert math.isnan(fit_of(values, returns, torch.zeros_like(mask), same).mean_return)
