"""The computations as operators of PyTorch, so that `torch.compile` and CUDA graphs take them as they are.

An operator has flat arguments and fills buffers that it is given; `compute.py` makes both. What it runs is a backend: a
module with the three functions of `Backend`. They are registered through `torch.library.Library`: the decorator
`torch.library.custom_op` costs 40 microseconds a call for gradients, and these have none, 200 where buffers are many.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from lenvm_rl.advantages.types import Advantages, RowStats, TaskSignal

BACKENDS: Mapping[str, str] = {
    "torch": "lenvm_rl.advantages.torch_scan",
    "triton": "lenvm_rl.advantages.triton_kernel",
    "reference": "lenvm_rl.advantages.reference",
}
"""Name -> module, imported at the first use."""


class Backend(Protocol):
    """What a backend module defines. Arguments arrive checked, gradients are off, and B and T are at least 1.

    `right_padded` promises that the ones of every row of the mask come first.
    """

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
        right_padded: bool,
        out: Advantages,
    ) -> None: ...

    def length(
        self,
        values: Tensor,
        bootstrap: Tensor,
        mask: Tensor,
        *,
        gamma: float,
        lam: float,
        right_padded: bool,
        out: Tensor,
    ) -> None: ...

    def gae(
        self,
        rewards: Tensor,
        values: Tensor,
        bootstrap: Tensor,
        mask: Tensor,
        *,
        gamma: float,
        lam: float | Tensor,
        right_padded: bool,
        out: tuple[Tensor, Tensor],
    ) -> None: ...


def _backend(name: str) -> Backend:
    return cast(Backend, import_module(BACKENDS[name]))


_LIBRARY = torch.library.Library("lenvm_rl", "FRAGMENT")


def _compute_advantages(
    values: Tensor,
    bootstrap: Tensor,
    mask: Tensor,
    sequence: Tensor | None,
    rewards: Tensor | None,
    task_values: Tensor | None,
    task_bootstrap: Tensor | None,
    task_gamma: float,
    task_lam: float,
    task_lams: Tensor | None,
    potential_coef: float,
    gamma: float,
    lam: float,
    coef: float,
    gate: Tensor | None,
    scale: float,
    scales: Tensor | None,
    right_padded: bool,
    backend: str,
    total: Tensor,
    length: Tensor,
    task_out: Tensor,
    returns: Tensor,
    table: Tensor,
    task_returns: Tensor | None,
) -> None:
    """Fills the buffers. Either `sequence` or the task critic's tensors; `task_lams`, `scales` replace the numbers."""
    task: Tensor | TaskSignal
    if sequence is not None:
        task = sequence
    else:
        assert rewards is not None and task_values is not None and task_bootstrap is not None
        lam_or_lams = task_lam if task_lams is None else task_lams
        task = TaskSignal(rewards, task_values, task_bootstrap, task_gamma, lam_or_lams, potential_coef)
    with _without_autocast(values):
        _backend(backend).fused(
            values,
            bootstrap,
            mask,
            task,
            gamma=gamma,
            lam=lam,
            coef=coef,
            gate=gate,
            scale=scale if scales is None else scales,
            right_padded=right_padded,
            out=Advantages(total, length, task_out, returns, RowStats(table), task_returns),
        )


def _length_advantages(
    values: Tensor,
    bootstrap: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    right_padded: bool,
    backend: str,
    out: Tensor,
) -> None:
    with _without_autocast(values):
        _backend(backend).length(values, bootstrap, mask, gamma=gamma, lam=lam, right_padded=right_padded, out=out)


def _gae(
    rewards: Tensor,
    values: Tensor,
    bootstrap: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    lams: Tensor | None,
    right_padded: bool,
    backend: str,
    advantages: Tensor,
    returns: Tensor,
) -> None:
    with _without_autocast(values):
        _backend(backend).gae(
            rewards,
            values,
            bootstrap,
            mask,
            gamma=gamma,
            lam=lam if lams is None else lams,
            right_padded=right_padded,
            out=(advantages, returns),
        )


def _without_autocast(values: Tensor) -> torch.autocast:
    return torch.autocast(values.device.type, enabled=False)


def _operator(implementation: Callable[..., None], fills: Sequence[str]) -> torch._ops.OpOverload:
    """Registers a function whose tensors named in `fills` are overwritten, under its name without the underscore."""
    name = implementation.__name__.removeprefix("_")
    _LIBRARY.define(name + torch.library.infer_schema(implementation, mutates_args=fills))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    # it returns nothing, and a compiler knows from the schema which buffers it fills
    torch.library.register_fake(f"lenvm_rl::{name}", lambda *arguments, **named: None, lib=_LIBRARY)
    return getattr(torch.ops.lenvm_rl, name).default


compute_advantages = _operator(
    _compute_advantages, fills=("total", "length", "task_out", "returns", "table", "task_returns")
)
length_advantages = _operator(_length_advantages, fills=("out",))
gae = _operator(_gae, fills=("advantages", "returns"))
