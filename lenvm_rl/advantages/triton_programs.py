# mypy: disallow-untyped-defs=False
# Triton reads annotations as compile-time types, so its programs carry none for mypy.
"""The GPU programs: advantages of one completion in one walk from its last chunk of tokens to its first, and whitening.

1. What is scanned is what a token adds in front of the state after it. With the lambda-return G_t = r_t + H_{t+1},

       H_t = gamma * (1 - lambda) * V_t + gamma * lambda * (r_t + H_{t+1}),     H_L = gamma * V_L,

   a recursion whose terms are known at t alone: a token that is not the policy's is the identity, whatever is around
   it. A_t = r_t + H_{t+1} - V_t is GAE (LenVM eq. 23-27).
2. The length side runs in survival space, W = 1 + V and r = 0: the constant reward -(1 - gamma) vanishes, every term is
   >= 0 and nothing cancels.
3. Decays travel as their gap to 1. At gamma = 0.99999 float32 rounds the decay itself by 1 part in 300 of that gap.
4. Potential-based shaping (LenVM eq. 28-32) is the same GAE with the critic V + beta * Phi, and 0 for Phi at the end.
5. Row statistics are merged chunk by chunk (Chan et al., 1983): deterministic, without atomics.

Left out: splitting one completion over several programs. A batch of few, very long completions leaves a GPU idle.
"""

import triton
import triton.language as tl

PROBES = tl.constexpr(256)


@triton.jit
def _then_earlier(late_gap, late, early_gap, early):
    """The affine map x -> late + (1 - late_gap) * x, followed by that of the tokens before."""
    return early_gap + late_gap - early_gap * late_gap, early + (late - early_gap * late)


@triton.jit
def _add2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _add3(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def _add4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _add5(a0, a1, a2, a3, a4, b0, b1, b2, b3, b4):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4


@triton.jit
def _float32(number):
    """A host scalar in float32: the interpreter hands over Python floats, Inductor float64."""
    return tl.full((), number, tl.float32)


@triton.jit
def _row(matrix, row, stride, VECTOR: tl.constexpr):
    """Where a row starts. VECTOR: strides are multiples of 4, told to the compiler so that accesses are 128-bit."""
    if VECTOR:
        stride = stride // 4 * 4
    return matrix + row * stride


@triton.jit
def _upto(end, VECTOR: tl.constexpr):
    """`end`, or with VECTOR the next multiple of 4, which is still inside the row: masks then keep vectors whole."""
    if VECTOR:
        end = (end + 3) // 4 * 4
    return end


@triton.jit
def _read(pointers, wanted):
    return tl.load(pointers, mask=wanted, other=0.0).to(tl.float32)


@triton.jit
def _wrong(x, considered):
    """1 where an entry that counts is NaN or infinite."""
    return tl.where(considered & (tl.abs(x) < float("inf")), 0.0, considered.to(tl.float32))


@triton.jit
def _ahead(x, gap, follows, carry):
    """H_{t+1} at every t of a chunk, from x_{t+1} = H_{t+1} - decay * H_{t+2} where t+1 is the policy's (`follows`)."""
    gaps, sums = tl.associative_scan(
        (tl.where(follows, gap, 0.0), tl.where(follows, x, 0.0)), 0, _then_earlier, reverse=True
    )
    return sums + (carry - gaps * carry)


@triton.jit
def _squares(x, mean, live):
    centred = tl.where(live, x - mean, 0.0)
    return centred * centred


@triton.jit
def _merge(mean, m2, before, share, chunk_mean, chunk_m2):
    """Moments of the `before` tokens seen so far with those of a chunk, which is `share` of them together."""
    step = chunk_mean - mean
    return mean + step * share, m2 + chunk_m2 + step * step * before * share


@triton.jit
def _count(MASK, T, lane, BLOCK: tl.constexpr):
    """Tokens of a right-padded row: the mask at the start of every chunk, then within the last chunk that has any."""
    chunks = 0
    for first in range(0, tl.cdiv(T, BLOCK), PROBES):
        start = (first + tl.arange(0, PROBES)) * BLOCK
        chunks += tl.sum((tl.load(MASK + start, mask=start < T, other=0) != 0).to(tl.int32))
    last = (chunks - 1) * BLOCK
    t = last + lane
    inside = tl.sum((tl.load(MASK + t, mask=(t >= 0) & (t < T), other=0) != 0).to(tl.int32))
    return tl.maximum(last, 0) + inside


STRIDES = ["v_stride", "mask_stride", "reward_stride", "task_v_stride", "out_stride"]
STRIDES_OF_ROWS = ["boot_stride", "sequence_stride", "task_boot_stride", "task_lam_stride", "gate_stride"]
OF_ROWS = ["BOOT", "SEQUENCE", "TASK_BOOT", "TASK_LAM", "GATE", "SCALE"]


# one compiled program serves every shape and layout, except that Triton tells aligned (B, T) inputs from others
@triton.jit(do_not_specialize=["T", *STRIDES, *STRIDES_OF_ROWS], do_not_specialize_on_alignment=OF_ROWS)
def advantages_program(
    # inputs, each of its own dtype; None is compiled to a program without that part
    V=None, BOOT=None,  # length values (B, T) and their bootstrap (B,)
    MASK=None,  # uint8 (B, T)
    SEQUENCE=None,  # sequence advantage (B,); or the task signal:
    REWARD=None, TASK_V=None, TASK_BOOT=None, TASK_LAM=None,  # (B, T), (B, T), (B,); (B,) or a number below
    GATE=None, SCALE=None,  # (B,), ()
    # outputs, float32: (B, T), but TASK (B, 1) beside a sequence advantage and TABLE (B, 16)
    TOTAL=None, LENGTH=None, RETURNS=None, TASK=None, TASK_RETURNS=None, TABLE=None,
    T=0,
    v_stride=0, mask_stride=0, reward_stride=0, task_v_stride=0, out_stride=0,
    boot_stride=0, sequence_stride=0, task_boot_stride=0, task_lam_stride=0, gate_stride=0,
    gamma=0.0, gamma_gap=0.0, lam_gap=0.0,  # the gap of x is 1 - x, in float64 until here
    task_gamma=0.0, task_gamma_gap=0.0, task_lam_gap=0.0,
    beta=0.0,  # of the shaping
    ratio=0.0,  # coef / scale, or coef where SCALE is given
    RIGHT_PADDED: tl.constexpr = False, VECTOR: tl.constexpr = False, BLOCK: tl.constexpr = 1024,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    MASK = _row(MASK, row, mask_stride, VECTOR)
    if V is not None:
        V = _row(V, row, v_stride, VECTOR)
        boot = tl.load(BOOT + row * boot_stride).to(tl.float32)
        blend = _float32(gamma) * _float32(lam_gap)
        gap = _float32(gamma_gap) + blend
        carry = _float32(gamma) * (1.0 + boot)
        ratio = _float32(ratio)
        weight = ratio
        if SCALE is not None:
            weight = weight / tl.load(SCALE).to(tl.float32)
        if GATE is not None:
            gate = tl.load(GATE + row * gate_stride).to(tl.float32)
            weight = weight * gate
        weighted = ratio != 0.0  # coefficient 0 returns the task advantage, whatever the critic said
        LENGTH = _row(LENGTH, row, out_stride, VECTOR)
    if SEQUENCE is not None:
        sequence = tl.load(SEQUENCE + row * sequence_stride).to(tl.float32)
    if REWARD is not None:
        REWARD = _row(REWARD, row, reward_stride, VECTOR)
        TASK_V = _row(TASK_V, row, task_v_stride, VECTOR)
        TASK = _row(TASK, row, out_stride, VECTOR)
        TASK_RETURNS = _row(TASK_RETURNS, row, out_stride, VECTOR)
        task_boot = tl.load(TASK_BOOT + row * task_boot_stride).to(tl.float32)
        task_lam_gap = _float32(task_lam_gap)
        if TASK_LAM is not None:
            task_lam_gap = 1.0 - tl.load(TASK_LAM + row * task_lam_stride).to(tl.float32)
        task_blend = _float32(task_gamma) * task_lam_gap
        task_decay = _float32(task_gamma) - task_blend
        task_gap = _float32(task_gamma_gap) + task_blend
        task_carry = _float32(task_gamma) * task_boot
        beta = _float32(beta)
    if TOTAL is not None:
        TOTAL = _row(TOTAL, row, out_stride, VECTOR)
    if RETURNS is not None:
        RETURNS = _row(RETURNS, row, out_stride, VECTOR)

    chunks = tl.cdiv(T, BLOCK)
    edge = _upto(T, VECTOR)
    if RIGHT_PADDED:
        n = _count(MASK, T, lane, BLOCK)
        near = _upto(n, VECTOR)  # up to 3 entries of padding are read, and not used
        zeros = tl.zeros((BLOCK,), tl.float32)
        live_chunks = tl.cdiv(n, BLOCK)
        for i in range(0, chunks - live_chunks):  # counted from 0, or Triton forgets that chunks are aligned
            t = (live_chunks + i) * BLOCK + lane
            if TOTAL is not None:
                tl.store(TOTAL + t, zeros, mask=t < edge)
            if V is not None:
                tl.store(LENGTH + t, zeros, mask=t < edge)
            if RETURNS is not None:
                tl.store(RETURNS + t, zeros, mask=t < edge)
            if REWARD is not None:
                tl.store(TASK + t, zeros, mask=t < edge)
                tl.store(TASK_RETURNS + t, zeros, mask=t < edge)
        chunks = live_chunks

    tokens = 0.0
    wrong = 0.0
    task_wrong = 0.0
    length_mean = 0.0
    length_m2 = 0.0
    returns_mean = 0.0
    returns_m2 = 0.0
    task_mean = 0.0
    task_m2 = 0.0
    total_mean = 0.0
    total_m2 = 0.0
    task_returns_mean = 0.0
    task_returns_m2 = 0.0

    for i in range(0, chunks):
        start = (chunks - 1 - i) * BLOCK
        t = start + lane
        if RIGHT_PADDED:
            wanted = t < near
            live = t < n
            follows = t + 1 < n
            here = tl.minimum(n - start, BLOCK).to(tl.float32)
        else:
            wanted = t < edge
            live = tl.load(MASK + t, mask=wanted, other=0) != 0
            follows = tl.load(MASK + t + 1, mask=t + 1 < T, other=0) != 0
            here = tl.sum(live.to(tl.float32))
        some = tl.maximum(here, 1.0)
        share = here / tl.maximum(tokens + here, 1.0)

        if V is not None:
            v = tl.where(live, _read(V + t, wanted), 0.0)
            v_next = _read(V + t + 1, follows)
            ahead = _ahead(blend * (1.0 + v_next), gap, follows, carry)
            length = tl.where(live, ahead - (1.0 + v), 0.0)
            returns = tl.where(live, ahead - 1.0, 0.0)
            tl.store(LENGTH + t, length, mask=t < edge)
            if RETURNS is not None:
                tl.store(RETURNS + t, returns, mask=t < edge)
            carry, length_sum, returns_sum, bad = tl.reduce(
                (tl.where(lane == 0, ahead, 0.0), length, returns, _wrong(v, live)), 0, _add4
            )
            wrong += bad
            length_sum /= some
            returns_sum /= some
            length_squares, returns_squares = tl.reduce(
                (_squares(length, length_sum, live), _squares(returns, returns_sum, live)), 0, _add2
            )
            length_mean, length_m2 = _merge(length_mean, length_m2, tokens, share, length_sum, length_squares)
            returns_mean, returns_m2 = _merge(returns_mean, returns_m2, tokens, share, returns_sum, returns_squares)
            if SEQUENCE is not None:
                total = tl.where(weighted, sequence + weight * length, sequence)
                tl.store(TOTAL + t, tl.where(live, total, 0.0), mask=t < edge)

        if REWARD is not None:
            reward = tl.where(live, _read(REWARD + t, wanted), 0.0)
            reward_next = _read(REWARD + t + 1, follows)
            value = tl.where(live, _read(TASK_V + t, wanted), 0.0)
            value_next = _read(TASK_V + t + 1, follows)
            task_bad = _wrong(reward, live) + _wrong(value, live)
            shift = tl.zeros((BLOCK,), tl.float32)
            if V is not None:
                shift = tl.where(beta != 0.0, beta * v, 0.0)
                value += shift
                value_next += tl.where(beta != 0.0, beta * v_next, 0.0)
            ahead = _ahead(task_blend * value_next + task_decay * reward_next, task_gap, follows, task_carry)
            task = tl.where(live, reward + ahead - value, 0.0)
            task_returns = tl.where(live, reward + ahead - shift, 0.0)
            total = task
            if V is not None:
                total = tl.where(live, tl.where(weighted, task + weight * length, task), 0.0)
                tl.store(TOTAL + t, total, mask=t < edge)
            tl.store(TASK + t, task, mask=t < edge)
            tl.store(TASK_RETURNS + t, task_returns, mask=t < edge)
            task_carry, task_sum, total_sum, task_returns_sum, bad = tl.reduce(
                (tl.where(lane == 0, ahead, 0.0), task, total, task_returns, task_bad), 0, _add5
            )
            task_wrong += bad
            task_sum /= some
            total_sum /= some
            task_returns_sum /= some
            task_squares, total_squares, task_returns_squares = tl.reduce(
                (
                    _squares(task, task_sum, live),
                    _squares(total, total_sum, live),
                    _squares(task_returns, task_returns_sum, live),
                ),
                0,
                _add3,
            )
            task_mean, task_m2 = _merge(task_mean, task_m2, tokens, share, task_sum, task_squares)
            total_mean, total_m2 = _merge(total_mean, total_m2, tokens, share, total_sum, total_squares)
            task_returns_mean, task_returns_m2 = _merge(
                task_returns_mean, task_returns_m2, tokens, share, task_returns_sum, task_returns_squares
            )
        tokens += here

    if TABLE is not None:
        filled = tokens > 0
        wrong += _wrong(boot, filled)
        if GATE is not None:
            task_wrong += _wrong(gate, filled)
        if SEQUENCE is not None:
            task_wrong += _wrong(sequence, filled)
            task_mean = tl.where(filled, sequence, 0.0)
            tl.store(TASK + row, task_mean)
            # on a row, the total is an affine function of the length advantage
            total_mean = tl.where(filled & weighted, sequence + weight * length_mean, task_mean)
            total_m2 = tl.where(filled & weighted, weight * weight * length_m2, 0.0)
        else:
            task_wrong += _wrong(task_boot, filled)
        column = tl.arange(0, 16)  # in the order of types.STATISTICS
        table = tl.where(column == 0, tokens, 0.0)
        table = tl.where(column == 1, wrong, table)
        table = tl.where(column == 2, task_wrong, table)
        table = tl.where(column == 3, length_mean, table)
        table = tl.where(column == 4, length_m2, table)
        table = tl.where(column == 5, returns_mean, table)
        table = tl.where(column == 6, returns_m2, table)
        table = tl.where(column == 7, task_mean, table)
        table = tl.where(column == 8, task_m2, table)
        table = tl.where(column == 9, total_mean, table)
        table = tl.where(column == 10, total_m2, table)
        table = tl.where(column == 11, task_returns_mean, table)
        table = tl.where(column == 12, task_returns_m2, table)
        tl.store(TABLE + row * 16 + column, table)


@triton.jit(
    do_not_specialize=["T", "x_stride", "mask_stride", "out_stride"], do_not_specialize_on_alignment=["SCALARS"]
)
def whitening_program(
    X, MASK, SCALARS, OUT, T, x_stride, mask_stride, out_stride, VECTOR: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """(x - mean) * factor + back where the mask is 1, else 0; SCALARS (3,) float32 holds mean, factor and back."""
    row = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wanted = t < _upto(T, VECTOR)
    live = tl.load(_row(MASK, row, mask_stride, VECTOR) + t, mask=wanted, other=0) != 0
    x = _read(_row(X, row, x_stride, VECTOR) + t, wanted)
    x = (x - tl.load(SCALARS)) * tl.load(SCALARS + 1) + tl.load(SCALARS + 2)
    tl.store(_row(OUT, row, out_stride, VECTOR) + t, tl.where(live, x, 0.0), mask=wanted)
