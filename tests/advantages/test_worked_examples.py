"""Numbers worked by hand: spec.md sections 2 and 3, V = [-.40, -.35, -.20, -.15], gamma .9."""

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from lenvm_rl.advantages import TaskSignal, compute_advantages, explained_variance, gae, length_advantages, pooled

VALUES = [-0.40, -0.35, -0.20, -0.15]
LENGTH_ADVANTAGES = {
    ("finished", 1.0): [0.0561, 0.079, 0.01, 0.05],
    ("finished", 0.95): [0.050515, 0.076626, 0.00775, 0.05],
    ("finished", 0.0): [-0.015, 0.07, -0.035, 0.05],
    ("cut", 1.0): [-0.14073, -0.1397, -0.233, -0.22],
    ("cut", 0.95): [-0.118242, -0.120751, -0.2231, -0.22],
    ("cut", 0.0): [-0.015, 0.07, -0.035, -0.22],
}
BOOTSTRAP = {"finished": 0.0, "cut": -0.30}
both_backends = pytest.mark.parametrize("backend", ["torch", "reference"])


def four_tokens(bootstrap=0.0):
    return tensor([VALUES]), tensor([bootstrap]), torch.ones(1, 4, dtype=torch.bool)


@both_backends
@pytest.mark.parametrize(("end", "lam"), LENGTH_ADVANTAGES)
def test_length_advantages_are_those_of_the_worked_example(end, lam, backend):
    advantages = length_advantages(*four_tokens(BOOTSTRAP[end]), gamma=0.9, lam=lam, backend=backend)
    assert_close(advantages, tensor([LENGTH_ADVANTAGES[end, lam]]), atol=1e-6, rtol=0)


@both_backends
@pytest.mark.parametrize(("end", "lam"), LENGTH_ADVANTAGES)
def test_all_worked_examples_come_out_of_one_batch_as_they_do_alone(end, lam, backend):
    values, mask = tensor([VALUES, VALUES]), torch.ones(2, 4, dtype=torch.bool)
    bootstrap, task = tensor([BOOTSTRAP["cut"], BOOTSTRAP["finished"]]), tensor([0.5, -0.5])
    result = compute_advantages(values, bootstrap, mask, task, gamma=0.9, lam=lam, coef=1.0, backend=backend)
    row = 0 if end == "cut" else 1
    assert_close(result.length[row], tensor(LENGTH_ADVANTAGES[end, lam]), atol=1e-6, rtol=0)
    assert_close(result.total[row], task[row] + tensor(LENGTH_ADVANTAGES[end, lam]), atol=1e-6, rtol=0)


@both_backends
def test_targets_of_a_finished_completion_are_its_length_returns(backend):
    result = compute_advantages(*four_tokens(), tensor([0.0]), gamma=0.9, lam=1.0, coef=1.0, backend=backend)
    assert_close(result.returns, tensor([[-0.3439, -0.271, -0.19, -0.1]]), atol=1e-6, rtol=0)
    assert result.task_returns is None


@both_backends
def test_total_adds_the_gated_scaled_length_advantage(backend):
    values, bootstrap, mask = four_tokens()
    result = compute_advantages(
        values,
        bootstrap,
        mask,
        tensor([2.0]),
        gamma=0.9,
        lam=1.0,
        coef=-3.0,
        gate=tensor([0.5]),
        scale=0.25,
        backend=backend,
    )
    # 2 - 3 * 0.5 / 0.25 * A_len = 2 - 6 * A_len
    assert_close(result.total, tensor([[1.6634, 1.526, 1.94, 1.7]]), atol=1e-5, rtol=0)
    assert_close(result.length, tensor([[0.0561, 0.079, 0.01, 0.05]]), atol=1e-6, rtol=0)
    assert_close(result.task, tensor([[2.0]]))  # the same on every token


@both_backends
@pytest.mark.parametrize("end", ["finished", "cut"])
def test_shaping_pays_the_change_of_potential_and_ends_at_zero_even_where_cut(end, backend):
    values, bootstrap, mask = four_tokens(BOOTSTRAP[end])
    zeros = torch.zeros(1, 4)
    # lambda 0 and a task critic that says 0 leave the shaped reward itself
    task = TaskSignal(zeros, zeros, zeros[:, 0], gamma=0.9, lam=0.0, potential_coef=1.0)
    shaping = compute_advantages(values, bootstrap, mask, task, gamma=0.9, lam=1.0, coef=0.0, backend=backend).task
    assert_close(shaping, tensor([[0.085, 0.17, 0.065, 0.15]]), atol=1e-6, rtol=0)
    assert (shaping * 0.9 ** torch.arange(4)).sum().item() == pytest.approx(0.4, abs=1e-6)  # -Phi(s_0)


@both_backends
@pytest.mark.parametrize("end", ["finished", "cut"])
def test_undiscounted_shaping_sums_to_minus_the_first_potential(end, backend):
    values, bootstrap, mask = four_tokens(BOOTSTRAP[end])
    zeros = torch.zeros(1, 4)
    task = TaskSignal(zeros, zeros, zeros[:, 0], gamma=1.0, lam=1.0, potential_coef=2.0)
    result = compute_advantages(values, bootstrap, mask, task, gamma=0.9, lam=1.0, coef=0.0, backend=backend)
    # the reward to go of the shaping is -2 Phi(s_t): a baseline
    assert_close(result.task, tensor([[0.8, 0.7, 0.4, 0.3]]), atol=1e-6, rtol=0)


@both_backends
def test_gae_of_a_terminal_reward_by_hand(backend):
    # gamma 1, lambda .5: delta = [.1, .2, .4], A_2 = .4, A_1 = .2 + .5*.4, A_0 = .1 + .5*.4
    rewards, values = tensor([[0.0, 0.0, 1.0]]), tensor([[0.3, 0.4, 0.6]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = gae(rewards, values, tensor([0.0]), mask, gamma=1.0, lam=0.5, backend=backend)
    assert_close(advantages, tensor([[0.3, 0.4, 0.4]]), atol=1e-6, rtol=0)
    assert_close(returns, tensor([[0.6, 0.8, 1.0]]), atol=1e-6, rtol=0)


@both_backends
def test_each_row_may_have_its_own_task_lambda(backend):
    rewards, values = tensor([[0.0, 0.0, 1.0]] * 3), tensor([[0.3, 0.4, 0.6]] * 3)
    mask, bootstrap = torch.ones(3, 3, dtype=torch.bool), torch.zeros(3)
    advantages, _ = gae(rewards, values, bootstrap, mask, gamma=1.0, lam=tensor([0.0, 0.5, 1.0]), backend=backend)
    assert_close(advantages, tensor([[0.1, 0.2, 0.4], [0.3, 0.4, 0.4], [0.7, 0.6, 0.4]]), atol=1e-6, rtol=0)


@both_backends
def test_tool_tokens_are_stepped_over(backend):
    # the finished example with two tool tokens inside: they cost nothing, and s_1 is followed by s_2
    values = tensor([[-0.40, -0.35, float("nan"), float("inf"), -0.20, -0.15]])
    mask = tensor([[True, True, False, False, True, True]])
    advantages = length_advantages(values, tensor([0.0]), mask, gamma=0.9, lam=0.95, backend=backend)
    assert_close(advantages, tensor([[0.050515, 0.076626, 0.0, 0.0, 0.00775, 0.05]]), atol=1e-6, rtol=0)


@both_backends
def test_statistics_of_the_worked_example(backend):
    stats = compute_advantages(*four_tokens(), tensor([2.0]), gamma=0.9, lam=1.0, coef=2.0, backend=backend).stats
    assert stats.tokens.tolist() == [4] and stats.nonfinite.tolist() == [0] and stats.task_nonfinite.tolist() == [0]
    # A_len: mean .195100/4, deviations .007325, .030225, -.038775, .001225
    assert_close(stats.length.mean, tensor([0.048775]), atol=1e-6, rtol=0)
    assert_close(stats.length.m2, tensor([0.00247221]), atol=1e-7, rtol=0)
    # G: mean -.9049/4, deviations -.117675, -.044775, .036225, .126225
    assert_close(stats.returns.mean, tensor([-0.226225]), atol=1e-6, rtol=0)
    assert_close(stats.returns.m2, tensor([0.03309719]), atol=1e-7, rtol=0)
    assert_close(stats.total.mean, tensor([2.09755]), atol=1e-6, rtol=0)
    assert_close(stats.total.m2, tensor([0.00988883]), atol=1e-7, rtol=0)
    assert_close(stats.task.mean, tensor([2.0]))
    assert_close(stats.task.m2, tensor([0.0]))
    assert stats.task_returns.mean.tolist() == [0.0]  # there is no task critic
    # 1 - .00247221 / .03309719
    assert explained_variance(stats.tokens, stats.length, stats.returns).item() == pytest.approx(0.925304, abs=1e-5)
    assert pooled(stats.tokens, stats.length).variance.item() == pytest.approx(0.00247221 / 4, abs=1e-8)
