"""The specification: the textbook recursion (spec sections 2 and 3), one Python float at a time.

    delta_t = r_t + gamma * V_{t+1} - V_t,     A_t = delta_t + gamma * lambda * A_{t+1}

Every backend is tested against it, so it shares nothing with them: no survival space, no packing, no tensor arithmetic.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lenvm_rl.advantages.types import Advantages, Moments, RowStats, TaskSignal

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
) -> Advantages:
    B, T = values.shape
    total, length, task_advantages, returns, task_returns = ([[0.0] * T for _ in range(B)] for _ in range(5))
    nonfinite, task_nonfinite = [0] * B, [0] * B
    for b in range(B):
        steps = _policy_steps(mask, b)
        if not steps:
            continue
        V, V_end = _row(values, b, steps), float(bootstrap[b])
        nonfinite[b] = _count_nonfinite([*V, V_end])
        A_len = _advantages([-(1 - gamma)] * len(steps), V, V_end, gamma, lam)

        if isinstance(task, TaskSignal):
            rewards, W, W_end = _row(task.rewards, b, steps), _row(task.values, b, steps), float(task.bootstrap[b])
            task_nonfinite[b] = _count_nonfinite([*rewards, *W, W_end])
            if task.potential_coef != 0:
                for k in range(len(steps)):
                    potential_after = V[k + 1] if k + 1 < len(steps) else 0.0
                    rewards[k] += task.potential_coef * (task.gamma * potential_after - V[k])
            A_task = _advantages(rewards, W, W_end, task.gamma, _of_row(task.lam, b))
            for k, t in enumerate(steps):
                task_returns[b][t] = A_task[k] + W[k]
        else:
            A_task = [float(task[b])] * len(steps)
            task_nonfinite[b] = _count_nonfinite(A_task[:1])

        weight = coef / float(scale)
        if gate is not None:
            weight *= float(gate[b])
            task_nonfinite[b] += _count_nonfinite([float(gate[b])])
        for k, t in enumerate(steps):
            length[b][t], returns[b][t], task_advantages[b][t] = A_len[k], A_len[k] + V[k], A_task[k]
            total[b][t] = A_task[k] + weight * A_len[k] if coef != 0 else A_task[k]

    def moments(rows: list[Row]) -> Moments:
        pairs = [_mean_and_m2([rows[b][t] for t in _policy_steps(mask, b)]) for b in range(B)]
        return Moments(_tensor([mean for mean, _ in pairs], values), _tensor([m2 for _, m2 in pairs], values))

    token_task = isinstance(task, TaskSignal)
    return Advantages(
        total=_matrix(total, values),
        length=_matrix(length, values),
        task=_matrix(task_advantages, values),
        returns=_matrix(returns, values),
        stats=RowStats(
            tokens=torch.tensor([len(_policy_steps(mask, b)) for b in range(B)], dtype=torch.int64, device=mask.device),
            nonfinite=torch.tensor(nonfinite, dtype=torch.int64, device=mask.device),
            task_nonfinite=torch.tensor(task_nonfinite, dtype=torch.int64, device=mask.device),
            length=moments(length),
            returns=moments(returns),
            task=moments(task_advantages),
            total=moments(total),
            task_returns=moments(task_returns) if token_task else None,
        ),
        task_returns=_matrix(task_returns, values) if token_task else None,
    )


def length(values: Tensor, bootstrap: Tensor, mask: Tensor, *, gamma: float, lam: float) -> Tensor:
    rewards = torch.full(values.shape, -(1 - gamma), dtype=torch.float64)
    return gae(rewards, values, bootstrap, mask, gamma=gamma, lam=lam)[0]


def gae(
    rewards: Tensor, values: Tensor, bootstrap: Tensor, mask: Tensor, *, gamma: float, lam: float | Tensor
) -> tuple[Tensor, Tensor]:
    B, T = values.shape
    advantages, returns = ([[0.0] * T for _ in range(B)] for _ in range(2))
    for b in range(B):
        steps = _policy_steps(mask, b)
        V = _row(values, b, steps)
        A = _advantages(_row(rewards, b, steps), V, float(bootstrap[b]), gamma, _of_row(lam, b))
        for k, t in enumerate(steps):
            advantages[b][t], returns[b][t] = A[k], A[k] + V[k]
    return _matrix(advantages, values), _matrix(returns, values)


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


def _matrix(rows: list[Row], like: Tensor) -> Tensor:
    return _tensor(rows, like).reshape(like.shape)


def _tensor(numbers: list[Row] | Row, like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64).float().to(like.device)
