"""Whitening: zero mean and unit variance over all tokens of the batch, on all processes, in one light pass.

The mean and the variance come out of the row statistics that the advantages were computed with, so the tokens are read
once, and nothing waits for the device.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lenvm_rl.advantages import triton_kernel
from lenvm_rl.advantages.statistics import pooled
from lenvm_rl.advantages.types import Moments


@torch.no_grad()
def whiten(
    advantages: Tensor,
    mask: Tensor,
    tokens: Tensor,
    moments: Moments,
    *,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
    unbiased: bool = True,
    eps: float = 1e-8,
    shift_mean: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """(advantages - mean) / standard deviation over all tokens of the batch.

    Args:
        advantages: (B, T), any float dtype. Anything where mask is 0.
        mask: (B, T) bool, 1 at the tokens of the policy.
        tokens: (B,) their number in each row, `stats.tokens`. A row set to 0 here is left out of mean and variance, and
            is whitened by those of the others.
        moments: of the quantity that is whitened, e.g. `stats.total` beside `total`.
        reduce: adds up a (3,) tensor over processes, e.g. `partial(accelerator.reduce, reduction="sum")`.
        unbiased: True is the convention of TRL and verl: variance with Bessel's correction, 1 / sqrt(variance + eps).
            False is OpenRLHF's: variance over the tokens, 1 / sqrt(max(variance, eps)).
        eps: keeps a batch without variance finite.
        shift_mean: False scales only, and leaves the mean where it is.
        out: (B, T) float32 buffer to write to; `advantages` itself will do.

    Returns:
        (B, T) float32, exactly 0 where mask is 0: `out`, or a new tensor.

    Raises:
        ValueError: shapes, dtypes or devices other than the above, with what was seen.
    """
    _check(advantages, mask, tokens, moments, eps, out)
    batch = pooled(tokens, moments, reduce)
    mean = batch.mean
    factor = ((batch.unbiased_variance + eps) if unbiased else batch.variance.clamp(min=eps)).rsqrt()
    if out is None:
        out = torch.empty(advantages.shape, dtype=torch.float32, device=advantages.device)
    if advantages.is_cuda and advantages.dtype != torch.float64 and triton_kernel.unavailable() is None:
        back = torch.zeros_like(mean) if shift_mean else mean
        triton_kernel.whiten(advantages, mask, torch.stack([mean, factor, back]).float(), out)
        return out
    out.copy_(advantages)
    out.sub_(mean).mul_(factor)
    if not shift_mean:
        out.add_(mean)
    return out.masked_fill_(mask.logical_not(), 0)


def _check(advantages: Tensor, mask: Tensor, tokens: Tensor, moments: Moments, eps: float, out: Tensor | None) -> None:
    if advantages.ndim != 2 or not advantages.is_floating_point():
        raise ValueError(
            f"advantages has shape {tuple(advantages.shape)} and dtype {advantages.dtype}: it must be (B, T) and "
            "floating-point."
        )
    rows, matrix = advantages.shape[:1], advantages.shape
    wanted = {
        "mask": (mask, matrix),
        "tokens": (tokens, rows),
        "moments.mean": (moments.mean, rows),
        "moments.m2": (moments.m2, rows),
        **({} if out is None else {"out": (out, matrix)}),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, but advantages has shape {tuple(matrix)}: {name} needs "
                f"{tuple(shape)}."
            )
        if tensor.device != advantages.device:
            raise ValueError(f"{name} is on {tensor.device}, but advantages is on {advantages.device}: move it there.")
    if mask.dtype != torch.bool:
        raise ValueError(
            f"mask has dtype {mask.dtype}, but must be torch.bool, 1 at the tokens of the policy: mask.bool()."
        )
    if out is not None and out.dtype != torch.float32:
        raise ValueError(f"out has dtype {out.dtype}, but the result is torch.float32.")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps is {eps}: it must be a positive number, or a batch without variance would divide by 0.")
