"""What must hold of any rollout, by algebra: checked on random ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from lenvm_rl.advantages import TaskSignal, compute_advantages, gae, length_advantages

gammas = st.sampled_from([0.9, 0.97, 0.999, 0.9998, 0.99999])
lambdas = st.sampled_from([0.0, 0.3, 0.95, 1.0])
seeds = st.integers(0, 2**31 - 1)
lengths = st.lists(st.integers(0, 150), min_size=1, max_size=4)
both_backends = pytest.mark.parametrize("backend", ["torch", "reference"])
prop = settings(max_examples=30, deadline=None)


def random_values(lengths: list[int], seed: int) -> tuple[Tensor, Tensor, Tensor, torch.Generator]:
    rng = torch.Generator().manual_seed(seed)
    T = max(lengths)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    values = torch.where(mask, -torch.rand(len(lengths), T, generator=rng), torch.nan)
    return values, -torch.rand(len(lengths), generator=rng), mask, rng


def random_task(mask: Tensor, rng: torch.Generator, **settings) -> TaskSignal:
    rewards, values = (torch.where(mask, torch.randn(mask.shape, generator=rng), torch.nan) for _ in range(2))
    return TaskSignal(rewards, values, torch.randn(len(mask), generator=rng), **settings)


def close(actual: Tensor, expected: Tensor, atol: float = 2e-6) -> None:
    assert_close(actual.double(), expected.double(), atol=atol, rtol=0)


@both_backends
@prop
@given(lengths, seeds, gammas)
def test_lambda_one_is_the_discounted_end_minus_the_value(backend, lengths, seed, gamma):
    # G_t - V_t: 1 + G_t = gamma^(L - t) * (1 + bootstrap)
    values, bootstrap, mask, _ = random_values(lengths, seed)
    to_go = (torch.tensor(lengths)[:, None] - torch.arange(max(lengths))).double()
    closed_form = gamma**to_go * (1 + bootstrap.double())[:, None] - (1 + values.double())
    actual = length_advantages(values, bootstrap, mask, gamma=gamma, lam=1.0, backend=backend)
    close(actual, torch.where(mask, closed_form, 0))


@both_backends
@prop
@given(lengths, seeds, gammas)
def test_lambda_zero_is_the_one_step_residual(backend, lengths, seed, gamma):
    values, bootstrap, mask, _ = random_values(lengths, seed)
    after = torch.cat([values.double()[:, 1:], torch.full((len(lengths), 1), torch.nan)], 1)[:, : values.shape[1]]
    last = torch.arange(max(lengths)) == torch.tensor(lengths)[:, None] - 1
    after = torch.where(last, bootstrap.double()[:, None], after)
    delta = -(1 - gamma) + gamma * after - values.double()
    actual = length_advantages(values, bootstrap, mask, gamma=gamma, lam=0.0, backend=backend)
    close(actual, torch.where(mask, delta, 0))


@both_backends
@prop
@given(lengths, gammas, lambdas)
def test_a_perfect_critic_leaves_no_length_advantage(backend, lengths, gamma, lam):
    to_go = (torch.tensor(lengths)[:, None] - torch.arange(max(lengths))).double()
    mask = to_go > 0
    values = torch.where(mask, gamma**to_go - 1, torch.nan)
    bootstrap = torch.zeros(len(lengths), dtype=torch.float64)
    result = compute_advantages(values, bootstrap, mask, bootstrap, gamma=gamma, lam=lam, coef=1.0, backend=backend)
    close(result.length, torch.zeros(mask.shape))
    close(result.returns, torch.where(mask, values, 0))


@both_backends
@prop
@given(lengths, seeds, gammas, lambdas)
def test_the_sum_of_advantages_and_values_is_the_target(backend, lengths, seed, gamma, lam):
    values, bootstrap, mask, rng = random_values(lengths, seed)
    task = random_task(mask, rng, gamma=0.99, lam=lam)
    result = compute_advantages(values, bootstrap, mask, task, gamma=gamma, lam=lam, coef=1.0, backend=backend)
    close(result.returns, torch.where(mask, result.length + values, 0))
    assert_close(result.task_returns, torch.where(mask, result.task + task.values, 0), atol=1e-4, rtol=1e-5)


@both_backends
@prop
@given(st.integers(1, 200), seeds, gammas, lambdas, st.floats(0.05, 0.95))
def test_deleting_holes_changes_nothing(backend, tokens, seed, gamma, lam, density):
    rng = torch.Generator().manual_seed(seed)
    width = int(tokens / density)
    where = torch.randperm(width, generator=rng)[:tokens].sort().values
    mask = torch.zeros(1, width, dtype=torch.bool)
    mask[0, where] = True
    values, bootstrap = (
        torch.where(mask, -torch.rand(1, width, generator=rng), torch.nan),
        -torch.rand(1, generator=rng),
    )
    task = random_task(mask, rng, gamma=0.99, lam=lam, potential_coef=0.7)
    packed_task = TaskSignal(
        task.rewards[:, where], task.values[:, where], task.bootstrap, gamma=0.99, lam=lam, potential_coef=0.7
    )
    given = {"gamma": gamma, "lam": lam, "coef": 0.5, "backend": backend}
    with_holes = compute_advantages(values, bootstrap, mask, task, **given)
    packed = compute_advantages(values[:, where], bootstrap, mask[:, where], packed_task, **given)
    for name in ("total", "length", "task", "returns", "task_returns"):
        expected = getattr(packed, name)
        largest = 0.0 if name in ("length", "returns") else expected.abs().max().item()
        close(getattr(with_holes, name)[:, where], expected, atol=1e-5 * (1 + largest) if largest else 2e-6)
        assert (getattr(with_holes, name)[~mask] == 0).all()
    assert torch.equal(with_holes.stats.tokens, packed.stats.tokens)
    assert_close(with_holes.stats.total.m2, packed.stats.total.m2, atol=1e-4, rtol=1e-4)


@both_backends
@prop
@given(lengths, seeds, gammas, lambdas, st.integers(0, 70), st.integers(0, 70))
def test_padding_on_either_side_changes_nothing(backend, lengths, seed, gamma, lam, left, right):
    values, bootstrap, mask, _ = random_values(lengths, seed)
    plain = length_advantages(values, bootstrap, mask, gamma=gamma, lam=lam, backend=backend)
    wide = [
        torch.nn.functional.pad(x, (left, right), value=fill) for x, fill in ((values, float("inf")), (mask, False))
    ]
    padded = length_advantages(wide[0], bootstrap, wide[1], gamma=gamma, lam=lam, backend=backend)
    close(padded[:, left : left + mask.shape[1]], plain)
    assert (padded[:, :left] == 0).all() and (padded[:, left + mask.shape[1] :] == 0).all()


@both_backends
@prop
@given(lengths, seeds, gammas, lambdas)
def test_the_order_of_the_batch_does_not_matter(backend, lengths, seed, gamma, lam):
    values, bootstrap, mask, rng = random_values(lengths, seed)
    order = torch.randperm(len(lengths), generator=rng)
    one = length_advantages(values, bootstrap, mask, gamma=gamma, lam=lam, backend=backend)
    other = length_advantages(values[order], bootstrap[order], mask[order], gamma=gamma, lam=lam, backend=backend)
    close(other, one[order])


@both_backends
@prop
@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from([0.9, 0.97, 0.99]), seeds)
def test_a_longer_remainder_lowers_every_return(backend, tokens, more, gamma, seed):
    values, _, mask, _ = random_values([tokens, tokens + more], seed)
    zeros = torch.zeros(2)
    returns = compute_advantages(values, zeros, mask, zeros, gamma=gamma, lam=1.0, coef=1.0, backend=backend).returns
    assert (returns[1, :tokens] < returns[0, :tokens]).all()
    assert (returns[mask] > -1).all() and (returns[mask] < 0).all()


@both_backends
@prop
@given(lengths, seeds, st.floats(-3, 3), st.floats(0.01, 10))
def test_total_is_task_plus_coefficient_times_gate_times_length_over_scale(backend, lengths, seed, coef, scale):
    values, bootstrap, mask, rng = random_values(lengths, seed)
    gate, task = torch.rand(len(lengths), generator=rng), torch.randn(len(lengths), generator=rng)
    given = {"gamma": 0.97, "lam": 0.95, "backend": backend}
    result = compute_advantages(values, bootstrap, mask, task, **given, coef=coef, gate=gate, scale=scale)
    expected = task[:, None] * mask + coef * gate[:, None] * result.length / scale
    assert_close(result.total, expected, atol=1e-5, rtol=1e-5)
    as_tensor = compute_advantages(
        values, bootstrap, mask, task, **given, coef=coef, gate=gate, scale=torch.tensor(scale, dtype=torch.float64)
    )
    assert torch.equal(as_tensor.total, result.total)


@both_backends
def test_gate_zero_keeps_the_task_advantage_and_a_bool_gate_is_zero_or_one(backend):
    values, bootstrap, mask, rng = random_values([50, 50], seed=0)
    task = torch.randn(2, generator=rng)
    given = {"gamma": 0.97, "lam": 0.95, "coef": 2.0, "backend": backend}
    gated = compute_advantages(values, bootstrap, mask, task, **given, gate=torch.tensor([True, False])).total
    everywhere = compute_advantages(values, bootstrap, mask, task, **given).total
    assert torch.equal(gated[0], everywhere[0])
    assert torch.equal(gated[1], task[1].expand(50))


@both_backends
@prop
@given(lengths, seeds, st.sampled_from([0.9, 0.99, 1.0]), lambdas, st.floats(-2, 2))
def test_a_task_critic_that_knows_the_potential_undoes_the_shaping(backend, lengths, seed, gamma, lam, beta):
    # spec section 3 (e): shaped rewards with values V_task - beta * Phi have the advantages of the plain task
    values, bootstrap, mask, rng = random_values(lengths, seed)
    plain = random_task(mask, rng, gamma=gamma, lam=lam)
    shaped = TaskSignal(
        plain.rewards, plain.values - beta * values, plain.bootstrap, gamma=gamma, lam=lam, potential_coef=beta
    )
    given = {"gamma": 0.97, "lam": 1.0, "coef": 0.0, "backend": backend}
    result = compute_advantages(values, bootstrap, mask, shaped, **given)
    expected, _ = gae(plain.rewards, plain.values, plain.bootstrap, mask, gamma=gamma, lam=lam, backend=backend)
    assert_close(result.task, expected, atol=1e-4, rtol=1e-5)


@both_backends
@prop
@given(lengths, seeds, st.sampled_from([0.9, 0.99, 1.0]), st.floats(-2, 2))
def test_shaping_adds_minus_beta_times_the_potential_to_the_reward_to_go(backend, lengths, seed, gamma, beta):
    # it telescopes from every state on, and the potential after the end is 0 whatever the bootstrap says
    values, bootstrap, mask, rng = random_values(lengths, seed)
    plain = random_task(mask, rng, gamma=gamma, lam=1.0)
    shaped = TaskSignal(plain.rewards, plain.values, plain.bootstrap, gamma=gamma, lam=1.0, potential_coef=beta)
    given = {"gamma": 0.97, "lam": 1.0, "coef": 0.0, "backend": backend}
    difference = (
        compute_advantages(values, bootstrap, mask, shaped, **given).task
        - compute_advantages(values, bootstrap, mask, plain, **given).task
    )
    assert_close(difference, torch.where(mask, -beta * values, 0), atol=1e-4, rtol=0)
