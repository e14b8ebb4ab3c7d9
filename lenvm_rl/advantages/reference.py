"""The specification: the textbook recursion (spec sections 2 and 3), one Python float at a time.

    delta_t = r_t + gamma * V_{t+1} - V_t,     A_t = delta_t + gamma * lambda * A_{t+1}

Every backend is tested against it, so it shares nothing with them: no survival space, no packing, no tensor arithmetic.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lenvm_rl.advantages.types import STATISTICS, TABLE_WIDTH, Advantages, TaskSignal

Row = list[float]


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
    """Fills `out`. It reads the mask whatever `right_padded` says."""
    B, T = values.shape
    total, length, task_advantages, returns, task_returns = ([[0.0] * T for _ in range(B)] for _ in range(5))
    quantities = {
        "length": length,
        "returns": returns,
        "task": task_advantages,
        "total": total,
        "task_returns": task_returns,
    }
    table = [[0.0] * TABLE_WIDTH for _ in range(B)]
    for b in range(B):
        steps = _policy_steps(mask, b)
        if not steps:
            continue
        V, V_end = _row(values, b, steps), float(bootstrap[b])
        A_len = _advantages([-(1 - gamma)] * len(steps), V, V_end, gamma, lam)

        if isinstance(task, TaskSignal):
            rewards, W, W_end = _row(task.rewards, b, steps), _row(task.values, b, steps), float(task.bootstrap[b])
            task_inputs = [*rewards, *W, W_end]
            if task.potential_coef != 0:
                for k in range(len(steps)):
                    potential_after = V[k + 1] if k + 1 < len(steps) else 0.0
                    rewards[k] += task.potential_coef * (task.gamma * potential_after - V[k])
            A_task = _advantages(rewards, W, W_end, task.gamma, _of_row(task.lam, b))
            for k, t in enumerate(steps):
                task_returns[b][t] = A_task[k] + W[k]
        else:
            task_inputs = [float(task[b])]
            A_task = task_inputs * len(steps)

        weight = coef / float(scale)
        if gate is not None:
            weight *= float(gate[b])
            task_inputs.append(float(gate[b]))
        for k, t in enumerate(steps):
            length[b][t], returns[b][t], task_advantages[b][t] = A_len[k], A_len[k] + V[k], A_task[k]
            total[b][t] = A_task[k] + weight * A_len[k] if coef != 0 else A_task[k]

        columns: dict[str, float] = {
            "tokens": len(steps),
            "nonfinite": _count_nonfinite([*V, V_end]),
            "task_nonfinite": _count_nonfinite(task_inputs),
        }
        for name, rows in quantities.items():
            columns[f"{name}_mean"], columns[f"{name}_m2"] = _mean_and_m2([rows[b][t] for t in steps])
        table[b] = [columns.get(name, 0.0) for name in STATISTICS] + [0.0] * (TABLE_WIDTH - len(STATISTICS))

    _write(total, out.total)
    _write(length, out.length)
    _write(returns, out.returns)
    _write(table, out.stats.table)
    if out.task_returns is not None:
        _write(task_advantages, out.task)
        _write(task_returns, out.task_returns)
    elif T > 0:  # one number per row
        _write(
            [row[_policy_steps(mask, b)[0]] if any(mask[b]) else 0.0 for b, row in enumerate(task_advantages)], out.task
        )


def length(
    values: Tensor, bootstrap: Tensor, mask: Tensor, *, gamma: float, lam: float, right_padded: bool, out: Tensor
) -> None:
    rewards = torch.full(values.shape, -(1 - gamma), dtype=torch.float64)
    outs = out, torch.empty_like(out)
    gae(rewards, values, bootstrap, mask, gamma=gamma, lam=lam, right_padded=right_padded, out=outs)


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
    B, T = values.shape
    advantages, returns = ([[0.0] * T for _ in range(B)] for _ in range(2))
    for b in range(B):
        steps = _policy_steps(mask, b)
        V = _row(values, b, steps)
        A = _advantages(_row(rewards, b, steps), V, float(bootstrap[b]), gamma, _of_row(lam, b))
        for k, t in enumerate(steps):
            advantages[b][t], returns[b][t] = A[k], A[k] + V[k]
    _write(advantages, out[0])
    _write(returns, out[1])


def _advantages(rewards: Row, values: Row, bootstrap: float, gamma: float, lam: float) -> Row:
    advantages = [0.0] * len(values)
    value_after, advantage_after = bootstrap, 0.0
    for t in reversed(range(len(values))):
        delta = rewards[t] + gamma * value_after - values[t]
        advantages[t] = delta + gamma * lam * advantage_after
        value_after, advantage_after = values[t], advantages[t]
    return advantages


def _policy_steps(mask: Tensor, b: int) -> list[int]:
    """The positions in which the policy acted: the recursion sees no others."""
    return [t for t, acted in enumerate(mask[b].tolist()) if acted]


def _row(x: Tensor, b: int, steps: Sequence[int]) -> Row:
    row = x[b].double().tolist()
    return [row[t] for t in steps]


def _of_row(number: float | Tensor, b: int) -> float:
    return float(number[b]) if isinstance(number, Tensor) else number


def _count_nonfinite(numbers: Row) -> int:
    return sum(not math.isfinite(number) for number in numbers)


def _mean_and_m2(numbers: Row) -> tuple[float, float]:
    mean = sum(numbers) / max(len(numbers), 1)
    return mean, sum((number - mean) ** 2 for number in numbers)


def _write(numbers: Sequence[Row | float], out: Tensor) -> None:
    out.copy_(torch.tensor(numbers, dtype=torch.float64).reshape(out.shape))
