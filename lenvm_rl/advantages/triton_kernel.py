"""Advantages on a GPU: one launch, one Triton program per completion (`triton_programs.py`).

1. A right-padded batch in GRPO form reads 4 bytes a token, its float32 length values, and writes 12. A mask with holes
   adds 1 byte, a task critic 8 read and 8 written. The rest is per row: where the mask ends, and the statistics.
2. Compiled once for the dtypes and parts in use, never for a shape, a discount or a lambda.
3. Where T and the row strides are multiples of 4, rows move in 128-bit accesses; elsewhere in coalesced narrower ones.

Left out: float64, which is for checks, and gradients.
"""

from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lenvm_rl.advantages.types import Advantages, TaskSignal

OLDEST_TRITON = (3, 3)
"""Older ones compile reverse scans wrongly (triton issue 4362)."""

BLOCK = 1024
"""Tokens of a row that are in work at a time: 4, one 128-bit access, to a thread."""

OPTIONS: dict[str, Any] = {"num_warps": 8, "enable_fp_fusion": True}
if torch.version.hip is None:
    # two programs to a multiprocessor; left to itself, ptxas aims higher on sm_80 and spills
    OPTIONS["maxnreg"] = 128


def unavailable() -> str | None:
    """Why this backend cannot be used here, with what to do; None where it can. Imports triton."""
    needed = ".".join(map(str, OLDEST_TRITON))
    try:
        from triton import __version__ as installed
    except ImportError as error:
        return f"backend 'triton' cannot import triton ({error}): pip install 'triton>={needed}'."
    if tuple(map(int, installed.split(".")[:2])) < OLDEST_TRITON:
        return (
            f"backend 'triton' found triton {installed}, which compiles reverse scans wrongly: "
            f"pip install 'triton>={needed}'."
        )
    return None


def fused(
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
) -> None:
    rows = {"TOTAL": out.total, "LENGTH": out.length, "RETURNS": out.returns}
    whole = {"TABLE": out.stats.table}
    inputs = _length_side(values, bootstrap, gamma, lam)
    if isinstance(task, TaskSignal):
        assert out.task_returns is not None
        rows |= {"TASK": out.task, "TASK_RETURNS": out.task_returns}
        inputs |= _task_side(task)
    else:
        whole |= {"TASK": out.task}
        inputs |= _of_rows("task", "SEQUENCE", task)
    if gate is not None:
        inputs |= _of_rows("gate", "GATE", gate)
    if isinstance(scale, Tensor) and scale.device == values.device:
        inputs |= {"SCALE": scale, "ratio": float(coef)}
    else:
        inputs["ratio"] = coef / float(scale)
    _launch(mask, right_padded, inputs, rows, whole)


def length(
    values: Tensor, bootstrap: Tensor, mask: Tensor, *, gamma: float, lam: float, right_padded: bool, out: Tensor
) -> None:
    _launch(mask, right_padded, _length_side(values, bootstrap, gamma, lam), {"LENGTH": out}, {})


def gae(
    rewards: Tensor,
    values: Tensor,
    bootstrap: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float | Tensor,
    right_padded: bool,
    out: tuple[Tensor, Tensor],
) -> None:
    task = TaskSignal(rewards, values, bootstrap, gamma, lam)
    _launch(mask, right_padded, _task_side(task), {"TASK": out[0], "TASK_RETURNS": out[1]}, {})


def whiten(advantages: Tensor, mask: Tensor, scalars: Tensor, out: Tensor) -> None:
    """out = (advantages - mean) * factor + back where the mask is 1, else 0; (B, T) each, `out` may be `advantages`.

    `scalars` (3,) float32 on the device holds mean, factor and back.
    """
    B, T = advantages.shape
    if out.numel() == 0:
        return
    matrices = _matrix("advantages", "X", advantages) | _matrix("out", "OUT", out) | _mask(mask)
    _run(
        "whitening_program",
        (B, -(-T // BLOCK)),
        advantages.device,
        matrices | {"SCALARS": scalars, "T": T, "VECTOR": _vectors(T, matrices), "BLOCK": BLOCK},
    )


def _length_side(values: Tensor, bootstrap: Tensor, gamma: float, lam: float) -> dict[str, Any]:
    return (
        _matrix("values", "V", values)
        | _of_rows("bootstrap", "BOOT", bootstrap)
        | {"gamma": float(gamma), "gamma_gap": 1.0 - gamma, "lam_gap": 1.0 - lam}
    )


def _task_side(task: TaskSignal) -> dict[str, Any]:
    side = (
        _matrix("rewards", "REWARD", task.rewards)
        | _matrix("the task values", "TASK_V", task.values)
        | _of_rows("the task bootstrap", "TASK_BOOT", task.bootstrap)
        | {"task_gamma": float(task.gamma), "task_gamma_gap": 1.0 - task.gamma, "beta": float(task.potential_coef)}
    )
    if isinstance(task.lam, Tensor):
        return side | _of_rows("the task lam", "TASK_LAM", task.lam)
    return side | {"task_lam_gap": 1.0 - task.lam}


def _launch(
    mask: Tensor, right_padded: bool, inputs: dict[str, Any], rows: dict[str, Tensor], whole: dict[str, Tensor]
) -> None:
    """Run the program: `rows` are its outputs of (B, T), `whole` the others."""
    B, T = mask.shape
    strides = {buffer.stride(0) for buffer in rows.values()} if B > 1 else {0}
    if len(strides) > 1 or not all(buffer.is_contiguous() for buffer in whole.values()):
        raise ValueError(
            f"the buffers of out have rows {sorted(strides)} numbers apart, but the triton backend writes rows of one "
            "width: pass an earlier result, or None."
        )
    arguments = inputs | _mask(mask) | rows | {"out_stride": strides.pop()}
    arguments |= {"T": T, "RIGHT_PADDED": right_padded, "VECTOR": _vectors(T, arguments), "BLOCK": BLOCK}
    _run("advantages_program", (B,), mask.device, arguments | whole)


def _run(name: str, grid: tuple[int, ...], device: torch.device, arguments: dict[str, Any]) -> None:
    program = getattr(_programs(), name)
    if device.type != "cuda" and _is_compiled(program):
        raise ValueError(
            f"backend 'triton' needs CUDA tensors, but values is on {device}: choose backend='torch', which runs "
            "anywhere (or set TRITON_INTERPRET=1 before the import, to test)."
        )
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        program[grid](**arguments, **OPTIONS)


def _programs() -> ModuleType:
    if reason := unavailable():
        raise ImportError(reason)
    from lenvm_rl.advantages import triton_programs

    return triton_programs


def _is_compiled(program: Any) -> bool:
    from triton.runtime import JITFunction

    return isinstance(program, JITFunction)


def _matrix(name: str, argument: str, x: Tensor) -> dict[str, Any]:
    _check_dtype(name, x)
    return {argument: x, f"{argument.lower()}_stride": x.stride(0)}


def _of_rows(name: str, argument: str, x: Tensor) -> dict[str, Any]:
    if x.dtype == torch.bool:
        x = x.view(torch.uint8)
    if x.is_floating_point():
        _check_dtype(name, x)
    return {argument: x, f"{argument.lower()}_stride": x.stride(0)}


def _mask(mask: Tensor) -> dict[str, Any]:
    return {"MASK": mask.view(torch.uint8), "mask_stride": mask.stride(0)}


def _check_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"{name} has dtype {x.dtype}, but the triton backend reads float32, bfloat16 and float16: pass "
            f"{name}.float(), or choose backend='torch'."
        )


def _vectors(T: int, arguments: dict[str, Any]) -> bool:
    """Whether groups of four tokens stay together: all rows start, and end, at a multiple of 4."""
    rows = ("v", "reward", "task_v", "mask", "out", "x")
    return T % 4 == 0 and all(arguments.get(f"{name}_stride", 0) % 4 == 0 for name in rows)
