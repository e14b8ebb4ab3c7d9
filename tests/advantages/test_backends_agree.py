"""Every backend against the float64 loop, on padding and holes poisoned with NaN and infinity."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lenvm_rl.advantages import TaskSignal, compute_advantages, gae, length_advantages

BACKENDS_UNDER_TEST = ["torch"]
every_backend = pytest.mark.parametrize("backend", BACKENDS_UNDER_TEST)

GAMMAS = [0.9, 0.99, 0.997, 0.9998, 0.99999]
LAMBDAS = [0.0, 0.95, 1.0]


def with_lengths(T: int, lengths: list[int]) -> Tensor:
    return torch.arange(T) < torch.tensor(lengths)[:, None]


def with_hole_runs(mask: Tensor, rng: torch.Generator) -> Tensor:
    """Tool output: runs of 1 to 256 masked tokens, scattered and longer than a chunk of any backend."""
    mask = mask.clone()
    for row in mask:
        t = 0
        while t < len(row):
            t += int(torch.randint(1, 200, (), generator=rng))
            run = int(2 ** (8 * torch.rand((), generator=rng)))
            row[t : t + run] = False
            t += run
    return mask


def poisoned(x: Tensor, mask: Tensor) -> Tensor:
    poison = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30]).to(x.dtype)
    return torch.where(mask, x, poison.repeat(x.numel() // 4 + 1)[: x.numel()].view_as(x))


def rollout(mask: Tensor, seed: int, dtype: torch.dtype = torch.float32):
    """Length values as of a trained critic (noisy, in (-1, 0)), N(0, 1) on the task side, every other row cut."""
    rng = torch.Generator().manual_seed(seed)
    B, T = mask.shape
    remaining = (mask.sum(1, keepdim=True) - torch.arange(T)).clamp(min=0) * torch.empty(B, T).uniform_(
        0.3, 2.0, generator=rng
    )
    values = poisoned((-(1 - 0.9995**remaining)).to(dtype), mask)
    bootstrap = (-torch.rand(B, generator=rng) * (torch.arange(B) % 2)).to(dtype)
    rewards, task_values = (poisoned(torch.randn(B, T, generator=rng).to(dtype), mask) for _ in range(2))
    return values, bootstrap, rewards, task_values, torch.randn(B, generator=rng).to(dtype)


def assert_backend_agrees(mask, backend, *, gamma, lam, seed=0, dtype=torch.float32, task_lam=0.95, beta=0.3):
    values, bootstrap, rewards, task_values, sequence = rollout(mask, seed, dtype)
    gate = torch.rand(len(mask), generator=torch.Generator().manual_seed(seed))
    task = TaskSignal(rewards, task_values, sequence, gamma=1.0, lam=task_lam, potential_coef=beta)
    for signal in (sequence, task):
        settings = {"gamma": gamma, "lam": lam, "coef": 0.7, "gate": gate, "scale": 0.5}
        actual = compute_advantages(values, bootstrap, mask, signal, **settings, backend=backend)
        expected = compute_advantages(values, bootstrap, mask, signal, **settings, backend="reference")
        names = ["length", "returns", "task", "total"] + (["task_returns"] if signal is task else [])
        for name in names:
            result, wanted = getattr(actual, name), getattr(expected, name)
            shape = (len(mask), 1) if name == "task" and signal is sequence else mask.shape
            live = mask.any(1, keepdim=True) if name == "task" and signal is sequence else mask
            assert result.dtype == torch.float32 and result.shape == shape
            assert (result[~live] == 0).all(), f"{name} is not 0 where the mask is 0"
            largest = wanted.abs().max() if wanted.numel() else 0.0
            tolerance = 2e-6 if name in ("length", "returns") else 1e-5 * (1 + largest)
            assert_close(result, wanted, atol=float(tolerance), rtol=0, msg=lambda text, name=name: f"{name}: {text}")
        for name in ("tokens", "nonfinite", "task_nonfinite"):
            assert torch.equal(getattr(actual.stats, name), getattr(expected.stats, name))
        for name in names:
            moments, wanted = getattr(actual.stats, name), getattr(expected.stats, name)
            assert_close(moments.mean, wanted.mean, atol=1e-5, rtol=1e-5)
            assert_close(moments.m2, wanted.m2, atol=1e-5, rtol=1e-4)
    assert torch.equal(length_advantages(values, bootstrap, mask, gamma=gamma, lam=lam, backend=backend), actual.length)


@every_backend
@pytest.mark.parametrize("T", [*range(1, 70, 2), 127, 128, 129])
def test_short_completions_of_every_length_agree(T, backend):
    mask = with_lengths(T, [0, 1, T, T // 2, max(T - 1, 0)])
    for gamma, lam in zip(GAMMAS, [0.0, 0.95, 1.0, 0.95, 1.0], strict=True):
        assert_backend_agrees(mask, backend, gamma=gamma, lam=lam, seed=T)


@every_backend
@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_a_thousand_tokens_agree_at_every_discount(gamma, lam, backend):
    mask = with_lengths(1000, [0, 1, 1000, 513])
    assert_backend_agrees(mask, backend, gamma=gamma, lam=lam, task_lam=lam)


@every_backend
@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("gamma", [0.9, 0.9998, 0.99999])
def test_long_completions_agree(gamma, lam, backend):
    mask = with_lengths(4096, [4096, 3001])
    assert_backend_agrees(mask, backend, gamma=gamma, lam=lam, beta=0.0)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_is_read_exactly(dtype, backend):
    mask = with_hole_runs(with_lengths(777, [777, 500, 1]), torch.Generator().manual_seed(1))
    assert_backend_agrees(mask, backend, gamma=0.9998, lam=0.95, dtype=dtype)


@every_backend
@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("T", [65, 300, 1000, 2048])
def test_runs_of_holes_are_stepped_over(T, lam, backend):
    rng = torch.Generator().manual_seed(T)
    mask = with_hole_runs(with_lengths(T, [T, T, T - 7, T // 2]), rng)
    mask = torch.cat([mask, torch.rand(2, T, generator=rng) < 0.5, mask.flip(1)])  # also single holes, and left padding
    assert_backend_agrees(mask, backend, gamma=0.9998, lam=lam)


@every_backend
def test_a_lambda_per_row_agrees(backend):
    mask = with_lengths(300, [300, 1, 150, 0])
    assert_backend_agrees(mask, backend, gamma=0.997, lam=1.0, task_lam=torch.tensor([0.0, 0.5, 0.99, 1.0]))


@every_backend
def test_gae_agrees_at_the_ends_of_its_ranges(backend):
    mask = with_lengths(200, [200, 77])
    _, _, rewards, values, bootstrap = rollout(mask, seed=3)
    for gamma, lam in [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1, 1), (0.5, 0.5)]:
        actual = gae(rewards, values, bootstrap, mask, gamma=gamma, lam=lam, backend=backend)
        expected = gae(rewards, values, bootstrap, mask, gamma=gamma, lam=lam, backend="reference")
        assert_close(actual, expected, atol=2e-5, rtol=1e-6)


@every_backend
def test_one_hundred_thousand_tokens_stay_exact(backend):
    mask = with_lengths(131_072, [131_072, 100_001])
    values, bootstrap, *_ = rollout(mask, seed=4)
    for lam in (1.0, 0.999):
        actual = length_advantages(values, bootstrap, mask, gamma=0.99999, lam=lam, backend=backend)
        expected = length_advantages(values, bootstrap, mask, gamma=0.99999, lam=lam, backend="reference")
        assert_close(actual, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("backend", [*BACKENDS_UNDER_TEST, "reference"])
@pytest.mark.parametrize(("B", "T"), [(0, 7), (3, 0), (0, 0)])
def test_an_empty_batch_gives_empty_results(B, T, backend):
    values, mask = torch.zeros(B, T), torch.ones(B, T, dtype=torch.bool)
    zeros = torch.zeros(B)
    for task in (zeros, TaskSignal(values, values, zeros, gamma=1.0, lam=0.95, potential_coef=0.5)):
        result = compute_advantages(values, zeros, mask, task, gamma=0.9, lam=0.95, coef=1.0, backend=backend)
        assert result.total.shape == result.length.shape == result.returns.shape == (B, T)
        assert result.task.shape == ((B, 1) if task is zeros else (B, T))
        assert result.stats.tokens.tolist() == [0] * B
        assert result.stats.length.mean.tolist() == result.stats.total.m2.tolist() == [0.0] * B
    assert length_advantages(values, zeros, mask, gamma=0.9, lam=0.5, backend=backend).shape == (B, T)
    assert gae(values, values, zeros, mask, gamma=0.9, lam=0.5, backend=backend)[1].shape == (B, T)


@pytest.mark.parametrize("backend", [*BACKENDS_UNDER_TEST, "reference"])
def test_a_row_without_tokens_gives_zeros_whatever_its_numbers(backend):
    nan = float("nan")
    values, mask = torch.full((2, 5), nan), torch.zeros(2, 5, dtype=torch.bool)
    poison = torch.tensor([nan, float("inf")])
    for task in (poison, TaskSignal(values, values, poison, gamma=1.0, lam=0.95, potential_coef=0.5)):
        result = compute_advantages(
            values, poison, mask, task, gamma=0.9, lam=0.95, coef=1.0, gate=poison, backend=backend
        )
        for name in ("total", "length", "task", "returns"):
            assert (getattr(result, name) == 0).all(), name
        for name in ("total", "length", "task", "returns"):
            moments = getattr(result.stats, name)
            assert moments.mean.tolist() == moments.m2.tolist() == [0.0, 0.0], name
        assert result.stats.nonfinite.tolist() == result.stats.task_nonfinite.tolist() == [0, 0]


@pytest.mark.parametrize("backend", [*BACKENDS_UNDER_TEST, "reference"])
def test_non_finite_values_are_counted_and_stay_in_their_row(backend):
    nan, inf = float("nan"), float("inf")
    clean = torch.full((4, 70), -0.2)
    values, mask = clean.clone(), with_lengths(70, [70, 70, 40, 70])
    values[1, [3, 50]] = torch.tensor([nan, -inf])
    values[2, 60] = nan  # padding: not counted
    bootstrap = torch.tensor([0.0, nan, 0.0, 0.0])
    task, gate = torch.tensor([1.0, 1.0, inf, 1.0]), torch.tensor([1.0, 1.0, nan, 1.0])
    result = compute_advantages(
        values, bootstrap, mask, task, gamma=0.9, lam=0.95, coef=1.0, gate=gate, backend=backend
    )
    assert result.stats.nonfinite.tolist() == [0, 3, 0, 0]
    assert result.stats.task_nonfinite.tolist() == [0, 0, 2, 0]
    assert result.total[1].isnan().any() and result.length[1, 0].isnan()
    assert (result.total[2, 40:] == 0).all()
    expected = length_advantages(clean, torch.zeros(4), mask, gamma=0.9, lam=0.95, backend=backend)
    assert torch.equal(result.length[[0, 2, 3]], expected[[0, 2, 3]])

    rewards, zeros = torch.zeros(4, 70), torch.zeros(4)
    rewards[0, 5], rewards[2, 50] = nan, nan
    signal = TaskSignal(rewards, torch.zeros(4, 70), torch.tensor([0.0, inf, 0.0, 0.0]), gamma=1.0, lam=0.95)
    stats = compute_advantages(clean, zeros, mask, signal, gamma=0.9, lam=0.95, coef=1.0, backend=backend).stats
    assert stats.task_nonfinite.tolist() == [1, 1, 0, 0] and stats.nonfinite.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("backend", [*BACKENDS_UNDER_TEST, "reference"])
def test_coefficient_zero_is_the_task_advantage_bit_for_bit_even_beside_a_broken_critic(backend):
    mask = with_lengths(70, [70, 33])
    *_, task = rollout(mask, seed=5)
    values = torch.full((2, 70), float("nan"))
    result = compute_advantages(values, torch.zeros(2), mask, task, gamma=0.9, lam=1.0, coef=0.0, backend=backend)
    assert torch.equal(result.total, task[:, None] * mask)
    assert result.stats.nonfinite.tolist() == [70, 33]


@every_backend
def test_results_are_new_tensors_without_gradient_and_inputs_are_left_alone(backend):
    mask = with_lengths(40, [40, 20])
    values, bootstrap, rewards, task_values, sequence = rollout(mask, seed=6)
    values.requires_grad_()
    inputs = [values, bootstrap, mask, rewards, task_values, sequence]
    before = [x.detach().clone() for x in inputs]
    task = TaskSignal(rewards, task_values, sequence, gamma=1.0, lam=0.9, potential_coef=0.1)
    result = compute_advantages(values, bootstrap, mask, task, gamma=0.9, lam=1.0, coef=0.0, backend=backend)
    tensors = [result.total, result.length, result.task, result.returns, result.task_returns]
    assert not any(x.requires_grad for x in tensors)
    assert len({x.data_ptr() for x in [*tensors, *inputs]}) == len(tensors) + len(inputs)
    for x, kept in zip(inputs, before, strict=True):
        assert_close(x.detach(), kept, equal_nan=True, rtol=0, atol=0)


@every_backend
def test_rows_and_numbers_may_lie_apart_in_memory(backend):
    mask = with_lengths(90, [90, 41, 1])
    values, bootstrap, *_ = rollout(mask, seed=7)
    wide = torch.full((6, 100), float("nan"))
    wide[::2, 5:95] = values
    table = torch.stack([bootstrap, bootstrap], 1)
    strided, strided_bootstrap = wide[::2, 5:95], table[:, 0]
    assert not strided.is_contiguous() and not strided_bootstrap.is_contiguous()
    actual = length_advantages(strided, strided_bootstrap, mask, gamma=0.99, lam=0.95, backend=backend)
    copies = length_advantages(values, bootstrap, mask, gamma=0.99, lam=0.95, backend=backend)
    assert torch.equal(actual, copies)


@every_backend
@pytest.mark.parametrize("token_task", [False, True])
def test_a_promise_of_right_padding_changes_nothing_where_it_is_true(token_task, backend):
    mask = with_lengths(300, [300, 170, 0, 1])
    values, bootstrap, rewards, task_values, sequence = rollout(mask, seed=9)
    task = TaskSignal(rewards, task_values, sequence, gamma=1.0, lam=0.95) if token_task else sequence
    given = {"gamma": 0.997, "lam": 0.9, "coef": 0.5, "backend": backend}
    promised = compute_advantages(values, bootstrap, mask, task, right_padded=True, **given)
    looked_at = compute_advantages(values, bootstrap, mask, task, **given)
    for name in ("total", "length", "task", "returns"):
        assert_close(getattr(promised, name), getattr(looked_at, name), atol=1e-6, rtol=1e-6)
    assert_close(promised.stats.table, looked_at.stats.table, atol=1e-5, rtol=1e-5)


@every_backend
def test_an_earlier_result_gives_its_memory_to_the_next(backend):
    mask = with_lengths(130, [130, 99])
    values, bootstrap, rewards, task_values, sequence = rollout(mask, seed=10)
    settings = {"gamma": 0.99, "lam": 0.95, "coef": 1.0, "backend": backend}
    for task in (sequence, TaskSignal(rewards, task_values, sequence, gamma=1.0, lam=0.95)):
        fresh = compute_advantages(values, bootstrap, mask, task, **settings)
        used = compute_advantages(values * 0.5, bootstrap, mask, task, **settings)
        address = used.total.data_ptr()
        again = compute_advantages(values, bootstrap, mask, task, **settings, out=used)
        assert again is used and used.total.data_ptr() == address
        for name in ("total", "length", "task", "returns"):
            assert torch.equal(getattr(again, name), getattr(fresh, name))
        assert torch.equal(again.stats.table, fresh.stats.table)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_backend
def test_a_gpu_agrees_with_tf32_allowed_and_without_waiting(backend, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    mask = with_hole_runs(with_lengths(3000, [3000, 2000, 0, 1]), torch.Generator().manual_seed(8))
    values, bootstrap, *_, task = rollout(mask, seed=8)
    expected = compute_advantages(values, bootstrap, mask, task, gamma=0.9998, lam=0.95, coef=1.0, backend="reference")
    on_device = [x.cuda() for x in (values, bootstrap, mask, task)]
    settings = {"gamma": 0.9998, "lam": 0.95, "coef": 1.0, "backend": backend}
    compute_advantages(*on_device, **settings)  # fills the caches, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = compute_advantages(*on_device, **settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_close(actual.length.cpu(), expected.length, atol=2e-6, rtol=0)
    assert_close(actual.total.cpu(), expected.total, atol=1e-5, rtol=1e-5)
