"""The public functions: they check the arguments, pick a backend, and return detached results."""

import math
from collections.abc import Mapping
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from lenvm_rl.advantages.types import Advantages, TaskSignal


class Backend(Protocol):
    """What a backend module defines; arguments arrive checked, and gradients are off."""

    def fused(
        self,
        values: Tensor,
        bootstrap: Tensor,
        mask: Tensor,
        task: Tensor | TaskSignal,
        *,
        gamma: float,
        lam: float,
        coef: float,
        gate: Tensor | None,
        scale: float | Tensor,
    ) -> Advantages: ...

    def length(self, values: Tensor, bootstrap: Tensor, mask: Tensor, *, gamma: float, lam: float) -> Tensor: ...

    def gae(
        self, rewards: Tensor, values: Tensor, bootstrap: Tensor, mask: Tensor, *, gamma: float, lam: float | Tensor
    ) -> tuple[Tensor, Tensor]: ...


BACKENDS: Mapping[str, str] = {
    "auto": "lenvm_rl.advantages.torch_scan",
    "torch": "lenvm_rl.advantages.torch_scan",
    "reference": "lenvm_rl.advantages.reference",
}
"""Name -> module, imported at the first use."""


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
        backend: "auto", "torch", or "reference" (a float64 loop in Python: slow, for checks).

    Returns:
        Advantages: float32, 0 where mask is 0, without gradient. Non-finite inputs where mask is 1 are not an error
        here, since finding them would wait for the device: they are counted in `stats` and make their own row NaN.

    Raises:
        ValueError: shapes, dtypes, devices or ranges other than the above, with what was seen.
    """
    chosen = _backend(backend)
    _check_length(values, bootstrap, mask, gamma, lam)
    _check_task(task, values)
    if not math.isfinite(coef):
        raise ValueError(f"coef is {coef}: the weight of the length advantage must be a finite number.")
    if gate is not None:
        _check_shape("gate", gate, values.shape[:1], "one weight per row of values", values)
    _check_scale(scale, values)
    return chosen.fused(values, bootstrap, mask, task, gamma=gamma, lam=lam, coef=coef, gate=gate, scale=scale)


@torch.no_grad()
def length_advantages(
    values: Tensor, bootstrap: Tensor, mask: Tensor, *, gamma: float, lam: float, backend: str = "auto"
) -> Tensor:
    """Length advantages A_len (B, T) alone, float32, 0 where mask is 0. Arguments as in `compute_advantages`."""
    chosen = _backend(backend)
    _check_length(values, bootstrap, mask, gamma, lam)
    return chosen.length(values, bootstrap, mask, gamma=gamma, lam=lam)


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    bootstrap: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float | Tensor,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over the tokens of the policy.

    Args:
        rewards: (B, T) rewards of the tokens; `values` (B, T), `bootstrap` (B,) and `mask` as in `TaskSignal`.
        gamma: discount, in [0, 1].
        lam: lambda, in [0, 1]: one number, or one per row (B,).

    Returns:
        (advantages, returns), (B, T) each, float32, 0 where mask is 0. The returns, advantages + values, are what the
        critic is trained on.
    """
    chosen = _backend(backend)
    _check_rollout(values, bootstrap, mask)
    _check_task(TaskSignal(rewards, values, bootstrap, gamma, lam), values)
    return chosen.gae(rewards, values, bootstrap, mask, gamma=gamma, lam=lam)


def _backend(name: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} does not exist: choose one of {', '.join(map(repr, BACKENDS))}.")
    return cast(Backend, import_module(BACKENDS[name]))


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
