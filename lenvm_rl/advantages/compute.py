"""The public functions: they check the arguments, make the buffers, and return detached results."""

import math

import torch
from torch import Tensor

from lenvm_rl.advantages import operators
from lenvm_rl.advantages.operators import BACKENDS
from lenvm_rl.advantages.types import Advantages, TaskSignal, empty_advantages

BACKEND_NAMES = ("auto", *BACKENDS)


@torch.no_grad()
def compute_advantages(
    values: Tensor,
    bootstrap: Tensor,
    mask: Tensor,
    task: Tensor | TaskSignal,
    *,
    gamma: float,
    lam: float,
    coef: float,
    gate: Tensor | None = None,
    scale: float | Tensor = 1.0,
    right_padded: bool = False,
    out: Advantages | None = None,
    backend: str = "auto",
) -> Advantages:
    """Token advantages of a task signal and a length critic: task + coef * gate * A_len / scale (LenVM eq. 23-27).

    Args:
        values: (B, T) length values V(s_t) of the states before each token, any float dtype. Anything where mask is 0.
        bootstrap: (B,) length value after the last token: 0 for a finished completion, the critic's for a cut one.
        mask: (B, T) bool, 1 at the tokens of the policy. A 0 inside a completion (tool output) is stepped over.
        task: (B,) sequence advantages, or a `TaskSignal` of token rewards and a task critic.
        gamma: discount of the length critic, in (0, 1).
        lam: GAE lambda of the length side, in [0, 1].
        coef: weight s. Positive shortens, negative lengthens; 0 returns the task advantage, untouched.
        gate: (B,) weight of the length advantage of each completion, numbers or bool; None is 1.
        scale: divisor of the length advantage, a positive number or a 0-dim tensor (positive: it is not read here).
        right_padded: True promises that in every row the ones of the mask come first. A GPU then need not read it. The
            promise is not checked: with holes in the mask the results would be wrong.
        out: a result of the same shapes, whose memory is overwritten and returned: large fresh buffers cost more than
            the computation.
        backend: "auto" (Triton on CUDA where it is installed, else torch), "torch", "triton", or "reference" (a float64
            loop in Python: slow, for checks).

    Returns:
        Advantages: float32, 0 where mask is 0, without gradient. Non-finite inputs where mask is 1 are not an error
        here, since finding them would wait for the device: they are counted in `stats` and make their own row NaN.

    Raises:
        ValueError: shapes, dtypes, devices, strides or ranges other than the above, with what was seen.
        ImportError: backend "triton" without a Triton that can compile the kernel.
    """
    chosen = _choose(backend, values)
    _check_length(values, bootstrap, mask, gamma, lam)
    _check_task(task, values)
    if not math.isfinite(coef):
        raise ValueError(f"coef is {coef}: the weight of the length advantage must be a finite number.")
    if gate is not None:
        _check_shape("gate", gate, values.shape[:1], "one weight per row of values", values)
    _check_scale(scale, values)
    token_task = isinstance(task, TaskSignal)
    if out is None:
        out = empty_advantages(values, token_task=token_task)
    else:
        _check_out(out, values, token_task)
    if values.numel() == 0:
        for buffer in _buffers(out):
            buffer.zero_()
        return out
    signal = task if isinstance(task, TaskSignal) else None
    operators.compute_advantages(
        values,
        bootstrap,
        mask,
        None if isinstance(task, TaskSignal) else task,
        signal and signal.rewards,
        signal and signal.values,
        signal and signal.bootstrap,
        float(signal.gamma) if signal else 1.0,
        *_number_or_tensor(signal.lam if signal else 1.0),
        float(signal.potential_coef) if signal else 0.0,
        float(gamma),
        float(lam),
        float(coef),
        gate,
        *_number_or_tensor(scale),
        right_padded,
        chosen,
        out.total,
        out.length,
        out.task,
        out.returns,
        out.stats.table,
        out.task_returns,
    )
    return out


@torch.no_grad()
def length_advantages(
    values: Tensor,
    bootstrap: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float,
    right_padded: bool = False,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Length advantages A_len (B, T) alone, float32, 0 where mask is 0. Arguments as in `compute_advantages`."""
    chosen = _choose(backend, values)
    _check_length(values, bootstrap, mask, gamma, lam)
    out = _check_or_make("out", out, values)
    if values.numel():
        operators.length_advantages(values, bootstrap, mask, float(gamma), float(lam), right_padded, chosen, out)
    return out


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    bootstrap: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float | Tensor,
    right_padded: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over the tokens of the policy.

    Args:
        rewards: (B, T) rewards of the tokens; `values` (B, T), `bootstrap` (B,) and `mask` as in `TaskSignal`.
        gamma: discount, in [0, 1].
        lam: lambda, in [0, 1]: one number, or one per row (B,).
        right_padded, out, backend: as in `compute_advantages`.

    Returns:
        (advantages, returns), (B, T) each, float32, 0 where mask is 0. The returns, advantages + values, are what the
        critic is trained on.
    """
    chosen = _choose(backend, values)
    _check_rollout(values, bootstrap, mask)
    _check_task(TaskSignal(rewards, values, bootstrap, gamma, lam), values)
    advantages, returns = (_check_or_make("out", x, values) for x in (out or (None, None)))
    if values.numel():
        operators.gae(
            rewards,
            values,
            bootstrap,
            mask,
            float(gamma),
            *_number_or_tensor(lam),
            right_padded,
            chosen,
            advantages,
            returns,
        )
    return advantages, returns


def _choose(backend: str, values: Tensor) -> str:
    if backend not in BACKEND_NAMES:
        raise ValueError(f"backend {backend!r} does not exist: choose one of {', '.join(map(repr, BACKEND_NAMES))}.")
    if backend != "auto":
        return backend
    if values.is_cuda:
        from lenvm_rl.advantages import triton_kernel

        return "torch" if triton_kernel.unavailable() else "triton"
    return "torch"


def _number_or_tensor(x: float | Tensor) -> tuple[float, Tensor | None]:
    return (1.0, x) if isinstance(x, Tensor) else (float(x), None)


def _buffers(out: Advantages) -> list[Tensor]:
    buffers = [out.total, out.length, out.task, out.returns, out.stats.table]
    return buffers if out.task_returns is None else [*buffers, out.task_returns]


def _check_or_make(name: str, out: Tensor | None, values: Tensor) -> Tensor:
    if out is None:
        return torch.empty(values.shape, dtype=torch.float32, device=values.device)
    _check_buffer(name, out, values.shape, values)
    return out


def _check_out(out: Advantages, values: Tensor, token_task: bool) -> None:
    if (out.task_returns is not None) != token_task:
        kind = "a TaskSignal" if token_task else "a sequence advantage"
        raise ValueError(f"out comes from the other kind of task than {kind}: pass the result of an equal call.")
    fresh = empty_advantages(values.new_empty(values.shape, device="meta"), token_task=token_task)
    for buffer, wanted in zip(_buffers(out), _buffers(fresh), strict=True):
        _check_buffer("out", buffer, wanted.shape, values)


def _check_buffer(name: str, out: Tensor, shape: torch.Size, values: Tensor) -> None:
    if out.shape != shape or out.dtype != torch.float32 or out.device != values.device:
        raise ValueError(
            f"{name} holds a {tuple(out.shape)} buffer of {out.dtype} on {out.device}, but {tuple(shape)}, "
            f"torch.float32 and {values.device} are needed: pass the result of a call with the same shapes, or None."
        )
    _check_rows(name, out)


def _check_rows(name: str, x: Tensor) -> None:
    if x.ndim == 2 and x.shape[1] > 1 and x.stride(1) != 1:
        raise ValueError(
            f"{name} has strides {x.stride()}: the tokens of a row must lie side by side. Call .contiguous() on it."
        )


def _check_length(values: Tensor, bootstrap: Tensor, mask: Tensor, gamma: float, lam: float) -> None:
    _check_rollout(values, bootstrap, mask)
    if not 0 < gamma < 1:
        raise ValueError(
            f"the length gamma is {gamma}, but a length value needs a discount inside (0, 1): use the gamma the critic "
            "was trained with."
        )
    _check_unit("the length lam", lam)


def _check_rollout(values: Tensor, bootstrap: Tensor, mask: Tensor) -> None:
    if values.ndim != 2:
        raise ValueError(f"values has shape {tuple(values.shape)}: it must be (B, T), one row per completion.")
    _check_floating("values", values)
    _check_rows("values", values)
    _check_shape("mask", mask, values.shape, "the shape of values", values)
    if mask.dtype != torch.bool:
        raise ValueError(
            f"mask has dtype {mask.dtype}, but must be torch.bool, 1 at the tokens of the policy: mask.bool()."
        )
    _check_shape("bootstrap", bootstrap, values.shape[:1], "one value per row of values", values)
    _check_floating("bootstrap", bootstrap)


def _check_task(task: Tensor | TaskSignal, values: Tensor) -> None:
    if not isinstance(task, TaskSignal):
        _check_shape("task", task, values.shape[:1], "one advantage per row of values", values)
        _check_floating("task", task)
        return
    _check_shape("rewards", task.rewards, values.shape, "the shape of values", values)
    _check_shape("the task values", task.values, values.shape, "the shape of values", values)
    _check_shape("the task bootstrap", task.bootstrap, values.shape[:1], "one value per row of values", values)
    _check_floating("rewards", task.rewards)
    _check_floating("the task values", task.values)
    _check_floating("the task bootstrap", task.bootstrap)
    _check_unit("the task gamma", task.gamma)
    if isinstance(task.lam, Tensor):  # its numbers stay on the device, unread
        _check_shape("the task lam", task.lam, values.shape[:1], "one lambda per row of values", values)
        _check_floating("the task lam", task.lam)
    else:
        _check_unit("the task lam", task.lam)
    if not math.isfinite(task.potential_coef):
        raise ValueError(f"potential_coef is {task.potential_coef}: the weight of the shaping must be a finite number.")


def _check_shape(name: str, tensor: Tensor, shape: torch.Size, meaning: str, values: Tensor) -> None:
    if tensor.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, but values has shape {tuple(values.shape)}: {name} needs "
            f"{tuple(shape)}, {meaning}."
        )
    if tensor.device != values.device:
        raise ValueError(f"{name} is on {tensor.device}, but values is on {values.device}: move them to one device.")
    _check_rows(name, tensor)


def _check_floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name} has dtype {tensor.dtype}, but must be floating-point: convert with .float().")


def _check_unit(name: str, number: float) -> None:
    if not 0 <= number <= 1:
        raise ValueError(f"{name} is {number}: it must lie in [0, 1].")


def _check_scale(scale: float | Tensor, values: Tensor) -> None:
    if isinstance(scale, Tensor):
        if scale.ndim != 0:
            raise ValueError(f"scale has shape {tuple(scale.shape)}: it must be a number or a 0-dim tensor.")
        if scale.device.type != "cpu" and scale.device != values.device:
            raise ValueError(f"scale is on {scale.device}, but values is on {values.device}: move them to one device.")
    elif not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}: the length advantage is divided by it, so it must be positive and finite.")
