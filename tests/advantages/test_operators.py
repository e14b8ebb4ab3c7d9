"""The operators as PyTorch's compiler sees them."""

import pytest
import torch
from torch.testing import assert_close

from lenvm_rl.advantages import TaskSignal, compute_advantages, gae, length_advantages, operators
from lenvm_rl.advantages.types import empty_advantages


def rollout(B=3, T=50):
    rng = torch.Generator().manual_seed(0)
    values, rewards = -torch.rand(B, T, generator=rng), torch.randn(B, T, generator=rng)
    return values, -torch.rand(B, generator=rng), torch.rand(B, T, generator=rng) < 0.9, rewards


def operator_arguments(token_task):
    values, bootstrap, mask, rewards = rollout()
    out = empty_advantages(values, token_task=token_task)
    task = (None, rewards, values, bootstrap, 1.0, 0.95, None, 0.3)
    sequence = (bootstrap, None, None, None, 1.0, 1.0, None, 0.0)
    buffers = (out.total, out.length, out.task, out.returns, out.stats.table, out.task_returns)
    length = (0.99, 0.95, 1.0, None, 1.0, None, False, "torch")
    return (values, bootstrap, mask, *(task if token_task else sequence), *length, *buffers)


@pytest.mark.parametrize("token_task", [False, True])
def test_the_operator_keeps_what_its_schema_promises(token_task):
    torch.library.opcheck(operators.compute_advantages, operator_arguments(token_task))


@pytest.mark.parametrize("token_task", [False, True])
def test_a_compiled_trainer_step_takes_the_computation_whole(token_task):
    values, bootstrap, mask, rewards = rollout()

    def step(values, bootstrap, mask, rewards):
        task = TaskSignal(rewards, values, bootstrap, 1.0, 0.95) if token_task else bootstrap
        advantages = compute_advantages(values * 0.5, bootstrap, mask, task, gamma=0.99, lam=0.95, coef=1.0)
        return advantages.total * 2, advantages.stats.tokens

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert_close(compiled(values, bootstrap, mask, rewards), step(values, bootstrap, mask, rewards))


def test_the_parts_compile_too():
    values, bootstrap, mask, rewards = rollout()

    def step(values, bootstrap, mask, rewards):
        length = length_advantages(values, bootstrap, mask, gamma=0.99, lam=1.0)
        advantages, returns = gae(rewards, values, bootstrap, mask, gamma=1.0, lam=0.95)
        return length + advantages, returns

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert_close(compiled(values, bootstrap, mask, rewards), step(values, bootstrap, mask, rewards))


def test_gradients_end_at_the_advantages():
    values, bootstrap, mask, _ = rollout()
    result = compute_advantages(values.requires_grad_(), bootstrap, mask, bootstrap, gamma=0.99, lam=0.95, coef=1.0)
    assert not result.total.requires_grad


def test_a_buffer_that_does_not_fit_is_named():
    values, bootstrap, mask, _ = rollout()
    given = {"gamma": 0.9, "lam": 1.0, "coef": 1.0}
    wrong = compute_advantages(values[:, :49], bootstrap, mask[:, :49], bootstrap, **given)
    with pytest.raises(ValueError, match=r"out holds a \(3, 49\) buffer .* but \(3, 50\)"):
        compute_advantages(values, bootstrap, mask, bootstrap, **given, out=wrong)
    other_kind = compute_advantages(values, bootstrap, mask, TaskSignal(values, values, bootstrap, 1.0, 1.0), **given)
    with pytest.raises(ValueError, match="out comes from the other kind of task"):
        compute_advantages(values, bootstrap, mask, bootstrap, **given, out=other_kind)


def test_transposed_rows_are_refused_with_the_fix():
    values, bootstrap, mask, _ = rollout()
    transposed = values.T.contiguous().T
    with pytest.raises(ValueError, match=r"values has strides \(1, 3\).*Call .contiguous\(\)"):
        compute_advantages(transposed, bootstrap, mask, bootstrap, gamma=0.9, lam=1.0, coef=1.0)
