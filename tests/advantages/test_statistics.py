import pytest
import torch
from torch.testing import assert_close

from lenvm_rl.advantages import TaskSignal, compute_advantages, explained_variance, pooled


def rollout(B=6, T=90, seed=0):
    rng = torch.Generator().manual_seed(seed)
    mask = torch.arange(T) < torch.randint(0, T + 1, (B, 1), generator=rng)
    mask[0], mask[1] = False, True
    values, rewards, task_values = (torch.randn(B, T, generator=rng) for _ in range(3))
    zeros = torch.zeros(B)
    task = TaskSignal(rewards, task_values, zeros, gamma=1.0, lam=0.9)
    return mask, compute_advantages(-torch.sigmoid(values), zeros, mask, task, gamma=0.97, lam=0.9, coef=1.0)


def test_pooled_moments_are_those_of_all_tokens_together():
    mask, result = rollout()
    for name in ("length", "returns", "task", "total", "task_returns"):
        tokens = getattr(result, name)[mask].double()
        count, mean, variance = pooled(result.stats.tokens, getattr(result.stats, name))
        assert count == mask.sum()
        assert_close(mean, tokens.mean(), atol=1e-6, rtol=1e-6)
        assert_close(variance, tokens.var(correction=0), atol=1e-6, rtol=1e-5)


def test_rows_without_tokens_are_left_out_even_if_broken():
    mask, result = rollout()
    tokens = result.stats.tokens.clone()
    tokens[1] = 0
    result.stats.length.mean[1] = float("nan")
    kept = result.length[2:][mask[2:]].double()
    assert_close(pooled(tokens, result.stats.length).variance, kept.var(correction=0), atol=1e-6, rtol=1e-5)


def test_explained_variance_is_one_minus_the_unexplained_share():
    mask, result = rollout()
    stats = result.stats
    for error, returns in (("length", "returns"), ("task", "task_returns")):
        shares = [getattr(result, name)[mask].double().var(correction=0) for name in (error, returns)]
        actual = explained_variance(stats.tokens, getattr(stats, error), getattr(stats, returns))
        assert_close(actual, 1 - shares[0] / shares[1], atol=1e-5, rtol=0)


def test_processes_of_different_width_pool_to_what_one_process_computes():
    (left_mask, left), (right_mask, right) = rollout(T=90, seed=0), rollout(T=40, seed=1)
    tokens = torch.cat([left.length[left_mask], right.length[right_mask]]).double()
    sent = []
    pooled(right.stats.tokens, right.stats.length, reduce=lambda sums: sent.append(sums) or sums)
    assert sent[0].shape == (3,)
    count, mean, variance = pooled(left.stats.tokens, left.stats.length, reduce=lambda sums: sums + sent[0])
    assert count == len(tokens)
    assert_close(mean, tokens.mean(), atol=1e-6, rtol=1e-6)
    assert_close(variance, tokens.var(correction=0), atol=1e-6, rtol=1e-5)


def test_explained_variance_of_returns_that_do_not_vary_is_nan():
    # one completion of one token: its return is -(1 - gamma), there is nothing to explain
    one = torch.ones(1, 1, dtype=torch.bool)
    stats = compute_advantages(
        torch.tensor([[-0.3]]), torch.zeros(1), one, torch.zeros(1), gamma=0.9, lam=1.0, coef=1.0
    ).stats
    assert stats.returns.mean.item() == pytest.approx(-0.1)
    assert explained_variance(stats.tokens, stats.length, stats.returns).isnan()


def test_an_empty_batch_pools_to_zeros():
    empty = torch.zeros(0)
    stats = compute_advantages(
        torch.zeros(0, 4), empty, torch.zeros(0, 4, dtype=torch.bool), empty, gamma=0.9, lam=1.0, coef=1.0
    ).stats
    assert [x.item() for x in pooled(stats.tokens, stats.length)] == [0.0, 0.0, 0.0]
