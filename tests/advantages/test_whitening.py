"""Whitening against a float64 computation over the tokens themselves."""

import pytest
import torch
from torch.testing import assert_close

from lenvm_rl.advantages.types import Moments
from lenvm_rl.advantages.whitening import whiten

conventions = pytest.mark.parametrize("unbiased", [True, False])


def batch(B=6, T=90, seed=0, dtype=torch.float32, offset=3.0):
    """Ragged rows with holes and a row without tokens; NaN where the mask is 0. Moments come from float64."""
    rng = torch.Generator().manual_seed(seed)
    mask = torch.rand(B, T, generator=rng) < 0.7
    mask[0], mask[1, 40:] = False, False
    x = (2.5 * torch.randn(B, T, generator=rng) + offset).to(dtype)
    rows = [row[kept].double() for row, kept in zip(x, mask, strict=True)]
    means = [row.mean() if len(row) else torch.tensor(0.0) for row in rows]
    m2 = [(row - mean).square().sum() for row, mean in zip(rows, means, strict=True)]
    moments = Moments(torch.stack(means).float(), torch.stack(m2).float())
    return x.masked_fill(~mask, float("nan")), mask, mask.sum(1), moments


def expected(x, mask, tokens, unbiased, eps=1e-8):
    """The textbook formula over `tokens`, all tokens of all processes, in float64."""
    tokens = tokens.double()
    variance = tokens.var(correction=1 if unbiased else 0)
    scale = (variance + eps).sqrt() if unbiased else variance.clamp(min=eps).sqrt()
    return torch.where(mask, (x.double() - tokens.mean()) / scale, 0).float()


@conventions
def test_whitened_tokens_have_mean_zero_and_variance_one(unbiased):
    x, mask, tokens, moments = batch()
    whitened = whiten(x, mask, tokens, moments, unbiased=unbiased)
    assert whitened.dtype == torch.float32
    assert whitened[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert whitened[mask].var(correction=int(unbiased)).item() == pytest.approx(1, abs=1e-5)


@conventions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_whitening_is_the_textbook_formula_and_masked_entries_are_zero(dtype, unbiased):
    x, mask, tokens, moments = batch(dtype=dtype)
    whitened = whiten(x, mask, tokens, moments, unbiased=unbiased)
    assert_close(whitened, expected(x, mask, x[mask], unbiased), atol=2e-6, rtol=0)
    assert (whitened[~mask] == 0).all()


def test_the_two_conventions_by_hand():
    # tokens 1 and 3: mean 2; variance 2 with Bessel's correction, 1 without
    x, mask = torch.tensor([[1.0, 3.0]]), torch.ones(1, 2, dtype=torch.bool)
    tokens, moments = torch.tensor([2]), Moments(torch.tensor([2.0]), torch.tensor([2.0]))
    assert_close(whiten(x, mask, tokens, moments), torch.tensor([[-0.70710678, 0.70710678]]))
    assert_close(whiten(x, mask, tokens, moments, unbiased=False), torch.tensor([[-1.0, 1.0]]))
    # eps is added to the variance in the one, and is the least variance in the other
    assert_close(whiten(x, mask, tokens, moments, eps=2.0), torch.tensor([[-0.5, 0.5]]))
    assert_close(whiten(x, mask, tokens, moments, unbiased=False, eps=4.0), torch.tensor([[-0.5, 0.5]]))


def test_without_the_shift_the_mean_stays():
    x, mask, tokens, moments = batch()
    scaled = whiten(x, mask, tokens, moments, shift_mean=False)
    mean = x[mask].double().mean().float()
    assert_close(scaled[mask], whiten(x, mask, tokens, moments)[mask] + mean, atol=1e-6, rtol=1e-6)
    assert scaled[mask].mean().item() == pytest.approx(mean.item(), abs=1e-5)
    assert (scaled[~mask] == 0).all()


@conventions
def test_two_processes_whiten_by_the_tokens_of_both(unbiased):
    left, right = batch(T=90, seed=0), batch(T=41, seed=1, offset=-1.0)
    tokens = torch.cat([x[mask] for x, mask, *_ in (left, right)])
    sent = {}

    def sums_of(name, x, mask, counts, moments):
        whiten(x, mask, counts, moments, reduce=lambda sums: sent.setdefault(name, sums))

    sums_of("left", *left)
    sums_of("right", *right)
    both = sent["left"] + sent["right"]
    for x, mask, counts, moments in (left, right):
        whitened = whiten(x, mask, counts, moments, unbiased=unbiased, reduce=lambda _: both)
        assert_close(whitened, expected(x, mask, tokens, unbiased), atol=2e-6, rtol=0)


@conventions
@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_batch_without_variance_becomes_zeros(count, unbiased):
    mask = torch.arange(5)[None] < count
    moments = Moments(torch.tensor([0.3 if count else 0.0]), torch.zeros(1))
    x = torch.full((1, 5), 0.3).masked_fill(~mask, float("nan"))
    whitened = whiten(x, mask, torch.tensor([count]), moments, unbiased=unbiased)
    assert_close(whitened, torch.zeros(1, 5), atol=1e-3, rtol=0)  # float32 rounds the mean, and 1 / sqrt(eps) is 1e4
    assert whitened.isfinite().all()


def test_a_large_common_offset_does_not_cost_precision():
    x, mask, tokens, moments = batch(offset=1000.0)
    assert_close(whiten(x, mask, tokens, moments), expected(x, mask, x[mask], True), atol=5e-5, rtol=0)


def test_a_buffer_is_filled_and_may_be_the_input():
    x, mask, tokens, moments = batch()
    wanted = whiten(x, mask, tokens, moments)
    wide = torch.full((6, 100), 777.0)
    assert whiten(x, mask, tokens, moments, out=wide[:, :90]).data_ptr() == wide.data_ptr()
    assert torch.equal(wide[:, :90], wanted) and (wide[:, 90:] == 777).all()
    assert whiten(x, mask, tokens, moments, out=x) is x
    assert torch.equal(x, wanted)


def test_an_empty_batch_stays_empty():
    none = torch.zeros(0)
    x, mask = torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.bool)
    assert whiten(x, mask, none.long(), Moments(none, none)).shape == (0, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"advantages": torch.zeros(3)}, r"advantages has shape \(3,\) and dtype torch.float32: it must be \(B, T\)"),
        ({"advantages": torch.zeros(2, 3, dtype=torch.int64)}, "dtype torch.int64"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, r"mask has shape \(2, 4\), but advantages has shape \(2, 3\)"),
        ({"mask": torch.ones(2, 3)}, r"mask has dtype torch.float32.*mask.bool\(\)"),
        ({"tokens": torch.ones(2, 1)}, r"tokens has shape \(2, 1\).*tokens needs \(2,\)"),
        ({"tokens": torch.ones(2, device="meta")}, "tokens is on meta, but advantages is on cpu"),
        ({"moments": Moments(torch.zeros(3), torch.zeros(2))}, r"moments.mean has shape \(3,\)"),
        ({"moments": Moments(torch.zeros(2), torch.zeros(()))}, r"moments.m2 has shape \(\)"),
        ({"out": torch.zeros(2, 2)}, r"out has shape \(2, 2\)"),
        ({"out": torch.zeros(2, 3, dtype=torch.float64)}, "out has dtype torch.float64"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"eps": float("nan")}, "eps is nan"),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_seen(changes, message):
    given = {
        "advantages": torch.zeros(2, 3),
        "mask": torch.ones(2, 3, dtype=torch.bool),
        "tokens": torch.tensor([3, 3]),
        "moments": Moments(torch.zeros(2), torch.zeros(2)),
    }
    with pytest.raises(ValueError, match=message):
        whiten(**(given | changes))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@conventions
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("T", [1, 90, 1024, 3001])
def test_on_a_gpu_whitening_is_that_of_the_cpu(T, shift_mean, unbiased):
    x, mask, tokens, moments = batch(T=T)
    options = {"shift_mean": shift_mean, "unbiased": unbiased}
    on_device = Moments(moments.mean.cuda(), moments.m2.cuda())
    actual = whiten(x.cuda(), mask.cuda(), tokens.cuda(), on_device, **options)
    assert_close(actual.cpu(), whiten(x, mask, tokens, moments, **options), atol=1e-5, rtol=1e-5)
