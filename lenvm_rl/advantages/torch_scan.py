"""Length and task advantages as chunked scans in plain PyTorch: any device, no loop over time, no host synchronisation.

1. The tokens of the policy are moved to the front of their row (a permutation computed from the mask), so that holes
   and padding, on either side, leave the recursion and cannot leak into it. Results come back through the permutation.
2. What is scanned is the lambda-return, G_t = r_t + gamma * (1 - lambda) * V_{t+1} + gamma * lambda * G_{t+1}. The
   length side is scanned in survival space, U = 1 + G and W = 1 + V: its constant reward -(1 - gamma) vanishes there,
   every term is >= 0, nothing cancels near gamma = 1, and it is GAE with rewards 0 and values W.
3. A scan is one product with the powers of the decay inside every chunk of tokens, then the same scan over the heads
   of the chunks: four levels of 32 x 32 matrices reach a million tokens.
4. It runs in float64. Not for accuracy alone: float32 products obey global switches (TF32 on CUDA, bfloat16 on CPU,
   autocast), any of which spoils a scan near gamma = 1. None of them touches float64.

Left out: gradients (advantages are constants of the loss) and checks of the arguments (`compute.py` makes them).
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from lenvm_rl.advantages.types import Advantages, Moments, RowStats, TaskSignal

CHUNK = 32


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
    rows = _Rows(mask)
    length, returns = _length(rows, values, bootstrap, gamma, lam)
    length_moments = rows.moments(length)

    weight = None  # coef 0 must return the task advantage bit for bit, whatever the critic said
    if coef != 0:
        weight = (coef / scale * (torch.ones_like(bootstrap) if gate is None else gate).to(rows.dtype)).float()

    task_returns = task_returns_moments = None
    if isinstance(task, TaskSignal):
        task_advantages, task_returns = _task(rows, task, potential=values)
        total = _combine(rows, task_advantages, weight, length)
        task_moments, task_returns_moments = rows.moments(task_advantages), rows.moments(task_returns)
        total_moments = rows.moments(total)
        task_inputs = [task.rewards, task.values, task.bootstrap]
    else:
        task_advantages = rows.masked(task[:, None].expand_as(mask))
        total = _combine(rows, task_advantages, weight, length)
        # on a row, the total is an affine function of the length advantage: no need to read it again
        task_moments = Moments(torch.where(rows.tokens > 0, task, 0).float(), torch.zeros_like(length_moments.m2))
        total_moments = task_moments if weight is None else _affine(rows, task_moments.mean, weight, length_moments)
        task_inputs = [task]

    stats = RowStats(
        tokens=rows.tokens,
        nonfinite=rows.nonfinite(values, bootstrap),
        task_nonfinite=rows.nonfinite(*task_inputs, *([] if gate is None else [gate])),
        length=length_moments,
        returns=rows.moments(returns),
        task=task_moments,
        total=total_moments,
        task_returns=task_returns_moments,
    )
    return Advantages(total, length, task_advantages, returns, stats, task_returns)


def length(values: Tensor, bootstrap: Tensor, mask: Tensor, *, gamma: float, lam: float) -> Tensor:
    return _length(_Rows(mask), values, bootstrap, gamma, lam)[0]


def gae(
    rewards: Tensor, values: Tensor, bootstrap: Tensor, mask: Tensor, *, gamma: float, lam: float | Tensor
) -> tuple[Tensor, Tensor]:
    return _task(_Rows(mask), TaskSignal(rewards, values, bootstrap, gamma, lam), potential=values)


def reverse_scan(x: Tensor, decay: float | Tensor) -> Tensor:
    """Reverse discounted sum y_t = x_t + decay * y_{t+1} along the rows of x (B, T); decay in [0, 1], one or (B,)."""
    rows, steps = x.shape
    chunks = -(-steps // CHUNK)
    if steps % CHUNK:
        x = pad(x, (0, chunks * CHUNK - steps))
    if isinstance(decay, Tensor):
        inside, past = _powers(decay[:, None])
    else:
        inside, past = _cached_powers(decay, x.dtype, x.device)
    sums = x.reshape(rows, chunks, CHUNK) @ inside
    if chunks > 1:
        heads = reverse_scan(sums[:, :, 0], decay**CHUNK)
        sums[:, :-1].addcmul_(heads[:, 1:, None], past)
    return sums.flatten(1)[:, :steps]


def _powers(decay: Tensor) -> tuple[Tensor, Tensor]:
    """What sums a chunk, decay^(j - i) where j >= i (row j, column i), and what brings in the sum that follows it,
    decay^(CHUNK - i). For decay (..., 1): (..., CHUNK, CHUNK) and (..., 1, CHUNK)."""
    steps = torch.arange(CHUNK, dtype=decay.dtype, device=decay.device)
    distance = steps[:, None] - steps
    inside = torch.where(distance >= 0, decay[..., None] ** distance.clamp(min=0), 0)
    return inside, (decay ** (CHUNK - steps)).unsqueeze(-2)


@lru_cache(maxsize=64)
def _cached_powers(decay: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    inside, past = _powers(torch.tensor([decay], dtype=torch.float64, device="cpu"))
    return inside.to(dtype).to(device), past.to(dtype).to(device)


class _Rows:
    """The tokens of the policy in each row: how to bring them to the front, and what to do with them there."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        # Apple's GPUs have no float64; they have no switch that lowers the precision of float32 either
        self.dtype = torch.float32 if mask.device.type == "mps" else torch.float64
        self.tokens = mask.sum(1)
        # masked entries go behind the tokens, one to a slot: a permutation, so that scattering by it is deterministic
        rank = mask.cumsum(1)
        position = torch.arange(mask.shape[1], device=mask.device)
        self.slot = torch.where(mask, rank - 1, self.tokens[:, None] + position - rank)

    def pack(self, x: Tensor) -> Tensor:
        """(B, T) -> (B, T) of `dtype`: the tokens of the policy, then zeros."""
        x = torch.where(self.mask, x, 0).to(self.dtype)
        return torch.empty_like(x).scatter_(1, self.slot, x)

    def unpack(self, packed: Tensor) -> Tensor:
        """The inverse of `pack`, with arbitrary entries where the mask is 0."""
        return packed.gather(1, self.slot)

    def masked(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, x, 0).float()

    def following(self, packed: Tensor, last: Tensor, width: int) -> Tensor:
        """(B, width): packed (B, T) moved one step back, with `last` (B,) at the last token and zeros behind it."""
        after = packed[:, 1:]
        after = pad(after, (0, width - after.shape[1]))
        return after.scatter_(1, (self.tokens - 1).clamp(min=0)[:, None], last[:, None])

    def lambda_returns(
        self, values: Tensor, terminal: Tensor, gamma: float, lam: float | Tensor, rewards: Tensor | None = None
    ) -> Tensor:
        """G_t of packed values and rewards (None: 0), given the value after the last token; packed."""
        steps = values.shape[1]
        if steps == 0:
            return values
        if isinstance(lam, Tensor):
            lam = lam.to(self.dtype)
        share = gamma * (1 - lam)
        values = values * (share[:, None] if isinstance(share, Tensor) else share)
        # after the last token, return and value are one: both shares of gamma fall on it
        x = self.following(values, terminal * gamma, width=steps + -steps % CHUNK)
        if rewards is not None:
            x[:, :steps].add_(rewards)
        return reverse_scan(x, gamma * lam)[:, :steps]

    def moments(self, x: Tensor) -> Moments:
        mean = (x.sum(1, dtype=self.dtype) / self.tokens.clamp(min=1)).float()
        centred = torch.where(self.mask, x - mean[:, None], 0)
        return Moments(mean, centred.square_().sum(1, dtype=self.dtype).float())

    def nonfinite(self, *inputs: Tensor) -> Tensor:
        """How many entries are not finite, of (B, T) inputs at the tokens and of (B,) inputs in rows that have any."""
        counts = torch.zeros_like(self.tokens)
        for x in inputs:
            wrong = torch.isfinite(x).logical_not_()
            counts += (wrong & self.mask).sum(1) if x.ndim == 2 else wrong & (self.tokens > 0)
        return counts


def _length(rows: _Rows, values: Tensor, bootstrap: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    survival, terminal = values.to(rows.dtype) + 1, bootstrap.to(rows.dtype) + 1
    returns = rows.unpack(rows.lambda_returns(rows.pack(survival), terminal, gamma, lam))
    return rows.masked(returns - survival), rows.masked(returns - 1)


def _task(rows: _Rows, task: TaskSignal, potential: Tensor) -> tuple[Tensor, Tensor]:
    rewards = rows.pack(task.rewards)
    if task.potential_coef != 0 and potential.shape[1] > 0:
        phi = rows.pack(potential)
        after = rows.following(phi, phi.new_zeros(phi.shape[0]), width=phi.shape[1])
        rewards.add_(after.mul_(task.gamma).sub_(phi), alpha=task.potential_coef)
    values, terminal = task.values.to(rows.dtype), task.bootstrap.to(rows.dtype)
    returns = rows.unpack(rows.lambda_returns(rows.pack(values), terminal, task.gamma, task.lam, rewards))
    return rows.masked(returns - values), rows.masked(returns)


def _combine(rows: _Rows, task: Tensor, weight: Tensor | None, length: Tensor) -> Tensor:
    if weight is None:
        return task.clone()
    return rows.masked(torch.addcmul(task, weight[:, None], length))


def _affine(rows: _Rows, offset: Tensor, weight: Tensor, moments: Moments) -> Moments:
    """Moments of offset + weight * x; zeros in rows without tokens, whatever their weight."""
    filled = rows.tokens > 0
    mean, m2 = offset + weight * moments.mean, weight.square() * moments.m2
    return Moments(torch.where(filled, mean, 0), torch.where(filled, m2, 0))
