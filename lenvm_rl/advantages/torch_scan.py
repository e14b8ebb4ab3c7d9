"""Length and task advantages as chunked scans in plain PyTorch: any device, no loop over time.

1. What is scanned is the lambda-return, G_t = r_t + gamma * (1 - lambda) * V_{t+1} + gamma * lambda * G_{t+1}. The
   length side is scanned in survival space, U = 1 + G and W = 1 + V: its constant reward -(1 - gamma) vanishes there,
   every term is >= 0, nothing cancels near gamma = 1, and it is GAE with rewards 0 and values W.
2. A scan is one product with the powers of the decay inside every chunk of tokens, then a scan over the heads of the
   chunks: one more product while there are few, the same again where there are many.
3. Rows with holes (tool tokens, left padding) have the tokens of the policy moved to the front by a permutation: the
   recursion never sees the rest. Right-padded rows need none.
4. On a CPU the batch is worked off in groups of rows that stay in the cache, and results may be looked at: padding is
   multiplied by 0, and only where that came out non-finite selected away in a second try. Elsewhere there is one group,
   no look and no synchronisation.
5. float32 products obey global switches (TF32, bfloat16), any of which spoils a scan near gamma = 1; none of them
   touches float64. Products are float32 on a CPU that has no such switch on, and float64 everywhere else.

Left out: gradients (advantages are constants of the loss) and checks of the arguments (`compute.py` makes them).
"""

import math
import threading
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from lenvm_rl.advantages.types import STATISTICS, Advantages, TaskSignal

CHUNK = 32
FEW_CHUNKS = 256
"""Chunks whose heads are scanned by one product; its matrix of powers has 256 KB at most."""
CACHED_TOKENS = 524_288
"""Tokens of a group of rows on a CPU: its half dozen float32 arrays, 2 MB each, stay in a last-level cache."""


LARGEST_KEPT = 64 * 2**20
"""Bytes of the working memory that a thread keeps between calls; one very long row can need more."""


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
    weight = None if coef == 0 else _weight(coef, gate, scale, bootstrap)  # None returns the task advantage bit for bit
    groups: list[dict[str, Tensor]] = []
    for part, rows in _row_groups(mask, right_padded):
        length, returns, total = out.length[part], out.returns[part], out.total[part]
        finite = _length(rows, values[part], bootstrap[part], gamma, lam, length, returns)
        columns = {
            "tokens": rows.tokens,
            "nonfinite": rows.nonfinite(*([] if finite else [values[part], bootstrap[part]])),
            **rows.moments("length", length),
            **rows.moments("returns", returns),
        }
        own_weight = None if weight is None else weight[part]
        if isinstance(task, TaskSignal):
            assert out.task_returns is not None
            signal, task_advantages, task_returns = _signal_of(task, part), out.task[part], out.task_returns[part]
            finite = _task(rows, signal, values[part], task_advantages, task_returns)
            rows.combine(task_advantages, own_weight, length, total)
            columns |= {
                "task_nonfinite": rows.nonfinite(
                    *([] if finite else [signal.rewards, signal.values, signal.bootstrap]),
                ),
                **rows.moments("task", task_advantages),
                **rows.moments("total", total),
                **rows.moments("task_returns", task_returns),
            }
        else:
            out.task[part] = torch.where(rows.filled, task[part], 0)[:, None]
            rows.combine(out.task[part], own_weight, length, total)
        groups.append(columns)

    table = groups[0] if len(groups) == 1 else {name: torch.cat([g[name] for g in groups]) for name in groups[0]}
    filled = table["tokens"] > 0
    if not isinstance(task, TaskSignal):
        # on a row, the total is an affine function of the length advantage: no need to read it again
        sequence, none = out.task[:, 0], torch.zeros_like(out.task[:, 0])
        table |= {"task_mean": sequence, "task_m2": none, "total_mean": sequence, "total_m2": none}
        table |= {"task_nonfinite": _nonfinite(task, filled).long()}
        if weight is not None:
            table["total_mean"] = torch.where(filled, sequence + weight * table["length_mean"], 0)
            table["total_m2"] = torch.where(filled, weight.square() * table["length_m2"], 0)
    if gate is not None:
        table["task_nonfinite"] = table["task_nonfinite"] + _nonfinite(gate, filled).long()
    out.stats.table.zero_()
    written = [table[name].float() for name in STATISTICS if name in table]  # what is absent comes last
    out.stats.table[:, : len(written)] = torch.stack(written, 1)


def length(
    values: Tensor, bootstrap: Tensor, mask: Tensor, *, gamma: float, lam: float, right_padded: bool, out: Tensor
) -> None:
    for part, rows in _row_groups(mask, right_padded):
        _length(rows, values[part], bootstrap[part], gamma, lam, out[part], torch.empty_like(out[part]))


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
    signal = TaskSignal(rewards, values, bootstrap, gamma, lam)
    for part, rows in _row_groups(mask, right_padded):
        _task(rows, _signal_of(signal, part), values[part], out[0][part], out[1][part])


def _length(
    rows: "_Rows", values: Tensor, bootstrap: Tensor, gamma: float, lam: float, advantages: Tensor, returns: Tensor
) -> bool:
    # W = 1 + V enters as gamma * (1 - lambda) * V with the same constant as a reward; what comes out is U = 1 + G
    share = gamma * (1 - lam)
    constant = torch.full((), share, dtype=rows.dtype, device=values.device)
    last = gamma * (1 + bootstrap.to(rows.dtype))
    return rows.scan(constant, values, last, share, gamma * lam, advantages, returns, excess=1.0)


def _task(rows: "_Rows", signal: TaskSignal, potential: Tensor, advantages: Tensor, returns: Tensor) -> bool:
    lam = signal.lam.to(rows.dtype) if isinstance(signal.lam, Tensor) else signal.lam
    share, decay = signal.gamma * (1 - lam), signal.gamma * lam
    rewards = signal.rewards
    if signal.potential_coef != 0:
        rewards = rows.shaped(rewards, potential, signal.potential_coef, signal.gamma)
    last = signal.gamma * signal.bootstrap.to(rows.dtype)
    return rows.scan(rewards, signal.values, last, share, decay, advantages, returns)


def reverse_scan(x: Tensor, decay: float | Tensor, scratch: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Reverse discounted sum y_t = x_t + decay * y_{t+1} along rows.

    Args:
        x: (B, T), T a multiple of `CHUNK`, contiguous.
        decay: in [0, 1], a number, or one per row (B,).
        scratch, out: (B, T), contiguous, overwritten; made where absent.
    """
    rows, steps = x.shape
    chunks = steps // CHUNK
    scratch = torch.empty_like(x) if scratch is None else scratch
    out = torch.empty_like(x) if out is None else out
    sums = scratch.view(rows, chunks, CHUNK)
    if isinstance(decay, Tensor):
        inside, past = _powers(decay[:, None])
        torch.bmm(x.view(rows, chunks, CHUNK), inside, out=sums)
    else:
        inside, past = _cached_powers(decay, x.dtype, x.device)
        torch.mm(x.view(-1, CHUNK), inside, out=sums.view(-1, CHUNK))
    heads = sums[:, :, 0]
    if chunks == 1:
        following = torch.zeros_like(heads)
    elif chunks <= FEW_CHUNKS and not isinstance(decay, Tensor):
        # column c sums the heads of the chunks behind c: the sum just past it
        following = heads @ _cached_head_powers(decay, chunks, x.dtype, x.device)
    else:
        wide = pad(heads, (0, -chunks % CHUNK))
        following = pad(reverse_scan(wide, decay**CHUNK)[:, 1:chunks], (0, 1))
    torch.addcmul(sums, following[:, :, None], past, out=out.view(rows, chunks, CHUNK))
    return out


def _powers(decay: Tensor) -> tuple[Tensor, Tensor]:
    """What sums a chunk, decay^(j - i) where j >= i (row j, column i), and what brings in the sum that follows it,
    decay^(CHUNK - i). For decay (..., 1): (..., CHUNK, CHUNK) and (..., 1, CHUNK)."""
    steps = torch.arange(CHUNK, dtype=decay.dtype, device=decay.device)
    distance = steps[:, None] - steps
    inside = torch.where(distance >= 0, decay[..., None] ** distance.clamp(min=0), 0)
    return inside, (decay ** (CHUNK - steps)).unsqueeze(-2)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _cached_powers(decay: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    inside, past = _powers(torch.tensor([decay], dtype=torch.float64, device="cpu"))
    return inside.to(device, dtype), past.squeeze(0).to(device, dtype)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _cached_head_powers(decay: float, chunks: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(chunks, chunks): decay^(CHUNK * (j - c - 1)) where j > c (row j, column c)."""
    chunk = torch.arange(chunks, dtype=torch.float64, device="cpu")
    distance = chunk[:, None] - chunk - 1
    base = torch.tensor(decay, dtype=torch.float64, device="cpu")
    return torch.where(distance >= 0, base ** (CHUNK * distance.clamp(min=0)), 0).to(device, dtype)


def _scan_dtype(device: torch.device) -> torch.dtype:
    if device.type == "mps":
        return torch.float32  # has no float64, and no switch
    precision = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    exact = device.type == "cpu" and precision in ("none", "ieee")
    return torch.float32 if exact else torch.float64


def _row_groups(mask: Tensor, right_padded: bool) -> Iterator[tuple[slice, "_Rows"]]:
    B, T = mask.shape
    size = min(B, max(1, CACHED_TOKENS // T)) if mask.device.type == "cpu" else B
    dtype = _scan_dtype(mask.device)
    steps = torch.arange(T, dtype=dtype, device=mask.device)
    scratch = _scratch((3, size, T + -T % CHUNK), dtype, mask.device)
    for first in range(0, B, size):
        part = slice(first, min(first + size, B))
        yield part, _Rows(mask[part], right_padded, steps, scratch[:, : part.stop - first])


_own = threading.local()


def _scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory to work in. On a CPU the last one of the thread is used again: PyTorch would return it to the system, and
    mapping 6 MB anew costs as much as a pass over them."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    last: Tensor | None = getattr(_own, "scratch", None)
    if last is None or last.shape != shape or last.dtype != dtype:
        with torch.inference_mode(False):
            last = torch.empty(shape, dtype=dtype, device=device)
        if last.nbytes <= LARGEST_KEPT:
            _own.scratch = last
    return last


class _Rows:
    """A group of rows: where their tokens are, how these come to the front and back, and the scan over them.

    `scratch` (3, B, T + padding) is overwritten: the front, what is scanned, and its sums.
    """

    def __init__(self, mask: Tensor, right_padded: bool, steps: Tensor, scratch: Tensor) -> None:
        T = mask.shape[1]
        self.mask = mask
        self.looks = mask.device.type == "cpu"
        self.dtype = steps.dtype
        # where the ones come first, the last column tells full rows, and nothing else need be read
        full = right_padded and self.looks and bool(mask[:, -1].all())
        self.tokens = torch.full(mask.shape[:1], T, device=mask.device) if full else mask.sum(1)
        self.filled = self.tokens > 0
        self.last = (self.tokens - 1).clamp(min=0)[:, None]
        self.scanned, self.sums = scratch[1], scratch[2]
        self.front: Tensor | None = None
        self.live: Tensor | None = None
        self.slot: Tensor | None = None
        if full or (self.looks and bool((self.tokens == T).all())):
            return
        # 1 at as many places as there are tokens, by arithmetic: turning bools into floats costs three times as much
        counts = self.tokens.to(self.dtype)[:, None]
        self.front = self.live = torch.sub(counts, steps, out=scratch[0, :, :T]).clamp_(0, 1)
        if not right_padded and self.looks:
            right_padded = not bool((mask[:, 1:] > mask[:, :-1]).any())
        if not right_padded:
            # masked entries go behind the tokens, one to a slot: a permutation, so that scattering is deterministic
            rank = mask.cumsum(1)
            position = torch.arange(T, device=mask.device)
            self.slot = torch.where(mask, rank - 1, self.tokens[:, None] + position - rank)
            self.live = mask.to(self.dtype)

    def scan(
        self,
        rewards: Tensor,
        values: Tensor,
        last: Tensor,
        share: float | Tensor,
        decay: float | Tensor,
        advantages: Tensor,
        returns: Tensor,
        excess: float = 0.0,
    ) -> bool:
        """Returns G_t = r_t + share * V_{t+1} + decay * G_{t+1} - excess, and advantages G_t - V_t, at the tokens.

        Args:
            rewards: (B, T), or 0-dim: the same everywhere but at the last token.
            values: (B, T).
            last: (B,) what the value after the last token adds there.
            share, decay: numbers, or (B,).
            advantages, returns: (B, T) float32, overwritten; 0 where the mask is 0.

        Returns:
            True where a look has shown that no input is infinite or NaN.
        """
        if self.looks and self.slot is None:
            self._scan(rewards, values, last, share, decay, advantages, returns, excess)
            if self.finite(advantages):
                return True
        packed_rewards = rewards if rewards.ndim == 0 else self.pack(rewards)
        packed = torch.empty(2, *advantages.shape, dtype=self.dtype, device=values.device)
        self._scan(packed_rewards, self.pack(values), last, share, decay, packed[0], packed[1], excess)
        for result, out in zip(packed, (advantages, returns), strict=True):
            out.copy_(torch.where(self.mask, self.unpack(result), 0))
        return False

    def _scan(
        self,
        rewards: Tensor,
        values: Tensor,
        last: Tensor,
        share: float | Tensor,
        decay: float | Tensor,
        advantages: Tensor,
        returns: Tensor,
        excess: float,
    ) -> None:
        """`scan` of rows whose tokens come first, behind them finite numbers."""
        T = values.shape[1]
        x, values = self.scanned, values.to(self.dtype)
        if rewards.ndim == 2:
            rewards = rewards.to(self.dtype)
            last = last + rewards.gather(1, self.last).squeeze(1)
            rewards = rewards[:, :-1]
        if isinstance(share, Tensor):
            torch.addcmul(rewards, values[:, 1:], share[:, None], out=x[:, : T - 1])
        else:
            torch.add(rewards, values[:, 1:], alpha=share, out=x[:, : T - 1])
        x[:, T - 1 :] = 0
        if self.front is not None:
            x[:, :T].mul_(self.front)
        x.scatter_(1, self.last, torch.where(self.filled, last, 0)[:, None])
        # where no copy is needed, the sums land in their place
        direct = returns.shape == x.shape and returns.is_contiguous() and returns.dtype == x.dtype
        sums = reverse_scan(x, decay, self.sums, out=returns if direct else x)[:, :T]
        if not direct or excess != 0:
            torch.sub(sums, 1 if self.front is None else self.front, alpha=excess, out=returns)
        self._subtract(returns, values, self.front, out=advantages)

    @staticmethod
    def _subtract(x: Tensor, y: Tensor, weight: Tensor | None, out: Tensor) -> None:
        if weight is None:
            torch.sub(x, y, out=out)
        else:
            torch.addcmul(x, y, weight, value=-1, out=out)

    def pack(self, x: Tensor) -> Tensor:
        """(B, T) -> (B, T) of `dtype`: the tokens of the policy, moved to the front, then zeros."""
        x = torch.where(self.mask, x, 0).to(self.dtype)
        return x if self.slot is None else torch.empty_like(x).scatter_(1, self.slot, x)

    def unpack(self, packed: Tensor) -> Tensor:
        return packed if self.slot is None else packed.gather(1, self.slot)

    def shaped(self, rewards: Tensor, potential: Tensor, beta: float, gamma: float) -> Tensor:
        """rewards + beta * (gamma * Phi_{t+1} - Phi_t) at the tokens, Phi = 0 after the last (LenVM eq. 28)."""
        phi = self.pack(potential)
        after = pad(phi[:, 1:], (0, 1))
        return rewards + self.unpack(after.mul_(gamma).sub_(phi).mul_(beta))

    def combine(self, task: Tensor, weight: Tensor | None, length: Tensor, out: Tensor) -> None:
        """out (B, T) = task + weight * length at the tokens; `task` (B, T) or (B, 1), `weight` (B,) or None for 0."""
        if task.shape != out.shape and self.live is not None:
            task = task * self.live
        if weight is None:
            out.copy_(task)
        else:
            torch.addcmul(task, weight[:, None], length, out=out)
        if self.live is not None and not self.finite(out):
            out.copy_(torch.where(self.mask, out, 0))

    def finite(self, x: Tensor) -> bool:
        """True where a look shows that all is finite; False without a look."""
        return self.looks and math.isfinite(x.sum().item())

    def moments(self, name: str, x: Tensor) -> dict[str, Tensor]:
        mean = x.sum(1, dtype=self.dtype) / self.tokens.clamp(min=1)
        centred = self.scanned[:, : x.shape[1]]
        self._subtract(x, mean[:, None], self.live, out=centred)
        return {f"{name}_mean": mean, f"{name}_m2": torch.linalg.vector_norm(centred, dim=1).square()}

    def nonfinite(self, *inputs: Tensor) -> Tensor:
        """How many entries are not finite, of (B, T) inputs at the tokens and of (B,) inputs in rows that have any."""
        counts = torch.zeros_like(self.tokens)
        for x in inputs:
            counts += _nonfinite(x, self.mask).sum(1) if x.ndim == 2 else _nonfinite(x, self.filled)
        return counts


def _nonfinite(x: Tensor, where: Tensor) -> Tensor:
    return torch.isfinite(x).logical_not_().logical_and_(where)


def _signal_of(task: TaskSignal, part: slice) -> TaskSignal:
    lam = task.lam[part] if isinstance(task.lam, Tensor) else task.lam
    return TaskSignal(task.rewards[part], task.values[part], task.bootstrap[part], task.gamma, lam, task.potential_coef)


def _weight(coef: float, gate: Tensor | None, scale: float | Tensor, bootstrap: Tensor) -> Tensor:
    gates = torch.ones_like(bootstrap, dtype=torch.float32) if gate is None else gate.float()
    return coef / scale * gates
