# ruff: noqa: E402
"""The compiled programs, executed as PTX by the emulator beside this file, and the machine code made of them.

No GPU takes part: numbers, bytes touched, registers and widths of accesses are known without one, time is not.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

triton = pytest.importorskip("triton", reason="triton is not installed: pip install 'lenvm-rl[triton]'")

from agreement import (
    CASES,
    GUARD,
    MEANING,
    Case,
    guarded_buffers,
    inputs,
    quantities,
    settings,
    worst_errors,
    worst_errors_of_the_parts,
)
from compiled import EmulatedProgram, machine_code

from lenvm_rl.advantages import compute_advantages, triton_kernel, triton_programs

TARGETS = [80, 90, 100]
VARIANTS = {
    "grpo": Case(T=64),
    "grpo bf16": Case(T=64, dtype=torch.bfloat16),
    "grpo mask": Case(T=64, holes=True, right_padded=False),
    "ppo": Case(T=64, token_task=True, beta=0.0),
    "ppo shaping mask": Case(T=64, token_task=True, holes=True, right_padded=False),
}
REGISTERS = {"grpo": 80, "grpo bf16": 80, "grpo mask": 88, "ppo": 128, "ppo shaping mask": 128}
"""Bounds, of any target. 256 threads: at 80 three blocks fit on a multiprocessor, at 128 two."""


as_compiled_here = pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9),
    reason="registers and spills are those of triton 3.9 and its ptxas; older ones need a few more",
)


@pytest.fixture
def emulate(monkeypatch):
    """Switches backend "triton" to emulated devices of a compute capability; returns the stand-ins of the programs."""

    def switch(capability: int = 90, block: int = triton_kernel.BLOCK) -> EmulatedProgram:
        advantages = EmulatedProgram(ORIGINAL_ADVANTAGES, capability)
        monkeypatch.setattr(triton_programs, "advantages_program", advantages)
        monkeypatch.setattr(triton_kernel, "BLOCK", block)
        # always 4 tokens to a thread, as at the size that is launched
        monkeypatch.setitem(triton_kernel.OPTIONS, "num_warps", block // 128)
        return advantages

    return switch


ORIGINAL_ADVANTAGES = triton_programs.advantages_program
ORIGINAL_WHITENING = triton_programs.whitening_program


def run_case(case, given):
    arguments = (given.values, given.bootstrap, given.mask, given.task)
    return compute_advantages(*arguments, **settings(case, given), right_padded=case.right_padded, backend="triton")


def assert_only_what_is_needed_is_touched(launch, case, out):
    """Every result is written once and nothing beside them; inputs are read at most twice, and near the tokens."""
    count = launch.memory.counts
    for name in [*quantities(case), "stats"]:
        buffer = out.stats.table if name == "stats" else getattr(out, name)
        assert (count(buffer, "writes") == 1).all(), f"{name} is not written exactly once"
        assert (count(buffer, "reads") == 0).all(), f"{name} is read"
        if buffer.shape[1] == case.T > 1:
            beside = buffer.as_strided((len(buffer), buffer.stride(0)), (buffer.stride(0), 1))[:, case.T :]
            assert (beside == GUARD).all() and (count(beside, "writes") == 0).all()
    mask = launch.arguments["MASK"].bool()
    end = mask.sum(1, keepdim=True) if case.right_padded else torch.full((len(mask), 1), case.T)
    if case.T % 4 == 0:
        end = end + -end % 4  # vectors are read whole
    for name in ("V", "REWARD", "TASK_V")[: 3 if case.token_task else 1]:
        x = launch.arguments[name]
        reads = count(x, "reads")
        assert (reads <= 2).all() and (reads[mask] >= 1).all()
        assert (reads[torch.arange(case.T) >= end] == 0).all(), "padding is read"
        assert (count(x, "writes") == 0).all()
    if case.right_padded:  # probed at the starts of chunks, then within one chunk
        block = launch.arguments["BLOCK"]
        assert ((count(launch.arguments["MASK"], "reads") > 0).sum((1, 2)) <= -(-case.T // block) + block).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_programs_agree_with_the_reference_and_write_every_number_once(case, emulate):
    advantages = emulate(block=128)
    out = guarded_buffers(inputs(case))
    errors = worst_errors(case, out=out)
    assert max(errors.values()) < 1, f"errors in tolerances are {errors}"
    (launch,) = advantages.launches
    assert launch.grid == (len(out.total),)
    assert_only_what_is_needed_is_touched(launch, case, out)


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize(
    "case",
    [
        Case(T=2048, lengths=(None, 0, 1, 1025), gamma=0.99999, lam=1.0),
        Case(T=2500, dtype=torch.bfloat16, holes=True, right_padded=False),
        Case(T=2052, lengths=(None, 1024), token_task=True, holes=True, right_padded=False),
        Case(T=1999, lengths=(None, 1030), token_task=True, dtype=torch.float16, task_lam=None),
    ],
    ids=str,
)
def test_programs_as_they_are_launched_agree_on_every_target(case, capability, emulate):
    advantages = emulate(capability)
    out = guarded_buffers(inputs(case))
    errors = worst_errors(case, out=out)
    assert max(errors.values()) < 1, f"errors in tolerances are {errors}"
    (launch,) = advantages.launches
    assert_only_what_is_needed_is_touched(launch, case, out)


@pytest.mark.parametrize("case", [CASES[2], CASES[5], CASES[11], CASES[12]], ids=str)
def test_length_and_gae_alone_agree_in_one_launch(case, emulate):
    advantages = emulate(block=128)
    errors = worst_errors_of_the_parts(case)
    assert max(errors.values()) < 1, f"errors in tolerances are {errors}"
    assert len(advantages.launches) == 1


@pytest.mark.parametrize(("test", "given"), MEANING, ids=lambda x: getattr(x, "__name__", ""))
def test_compiled_programs_mean_what_the_other_backends_mean(test, given, emulate):
    emulate(block=128)
    test(**given, backend="triton")


@pytest.mark.slow
@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_agrees_on_every_target_at_two_block_sizes(case, capability, emulate):
    for block in (256, triton_kernel.BLOCK):
        emulate(capability, block)
        errors = worst_errors(replace(case, T=case.T + 1100, seed=1))
        assert max(errors.values()) < 1, f"errors in tolerances are {errors}"


@pytest.mark.slow
def test_one_hundred_thousand_tokens_stay_exact(emulate):
    emulate()
    case = Case(T=131_072, lengths=(None, 100_001), gamma=0.99999, lam=1.0, beta=0.0)
    errors = worst_errors(case)
    assert max(errors.values()) < 1, f"errors in tolerances are {errors}"


def test_a_right_padded_grpo_batch_moves_16_bytes_a_token_and_a_little_per_row(emulate):
    T = 4096
    case = Case(T=T, lengths=(4096, 4096, 2049, 1, 0))
    given, advantages = inputs(case), emulate()
    out = run_case(case, given)
    (launch,) = advantages.launches

    def bytes_of_rows(tensor, kind):
        return (launch.memory.counts(tensor, kind) > 0).reshape(5, -1).sum(1).tolist()

    # 4 bytes of each length value; 2049 tokens and 1 token end within a vector of 4, which is read whole
    assert bytes_of_rows(given.values, "reads") == [4 * 4096, 4 * 4096, 4 * 2052, 4 * 4, 0]
    assert [bytes_of_rows(x, "writes") for x in (out.total, out.length, out.returns)] == [[4 * T] * 5] * 3
    # of the mask: where each of the 4 chunks starts, and the last chunk that has tokens
    assert bytes_of_rows(given.mask, "reads") == [4 + 1023] * 4 + [4]
    assert [bytes_of_rows(x, "reads") for x in (given.bootstrap, given.task, given.gate)] == [[4] * 5] * 3
    assert bytes_of_rows(out.task, "writes") == [4] * 5 and bytes_of_rows(out.stats.table, "writes") == [64] * 5
    # so a full row moves 16 bytes a token, and 1107 beside
    touched = sum(int((x.reads > 0).sum() + (x.writes > 0).sum()) for x in launch.memory.allocations.values())
    unread = 4 * (T - 2052) + 4 * (T - 4) + 4 * T + 1023
    assert touched == 5 * (16 * T + 4 + 1023 + 3 * 4 + 4 + 64) - unread
    # every 32-byte sector is stored to once: full ones, besides the 4 bytes of the task advantage
    assert launch.memory.sectors["store"] == 5 * (12 * T // 32 + 64 // 32 + 1)


def test_a_mask_with_holes_adds_a_byte_a_token_and_a_task_critic_sixteen(emulate):
    T = 2048
    case = Case(T=T, lengths=(None, None), token_task=True, holes=True, right_padded=False)
    given, advantages = inputs(case), emulate()
    out = run_case(case, given)
    (launch,) = advantages.launches
    read = [given.values, given.mask, given.task.rewards, given.task.values]
    written = [out.total, out.length, out.returns, out.task, out.task_returns]
    touched = [launch.memory.counts(x, "reads") for x in read] + [launch.memory.counts(x, "writes") for x in written]
    assert sum(int((x > 0).sum()) for x in touched) == given.mask.numel() * (3 * 4 + 1 + 5 * 4)


def test_no_shape_and_no_number_is_compiled_in(emulate):
    advantages = emulate()
    for case in (
        Case(T=64),
        Case(T=1040, lengths=(None,), gamma=0.9, lam=0.0),
        Case(T=4, lengths=(None, 1)),
    ):
        worst_errors(case)
    assert len(advantages.launches) == 3
    assert len({launch.ptx for launch in advantages.launches}) == 1


def test_expanded_rows_and_one_number_for_every_row_are_read_in_place(emulate):
    # stride 0: one row of values, and one bootstrap, stand for all
    emulate(block=128)
    values, mask = -torch.rand(1, 200, generator=torch.Generator().manual_seed(0)), torch.ones(3, 200, dtype=torch.bool)
    rates = {"gamma": 0.99, "lam": 0.9, "coef": 1.0}
    tight = compute_advantages(
        values.repeat(3, 1), torch.full((3,), -0.2), mask, torch.ones(3), **rates, backend="triton"
    )
    expanded = compute_advantages(
        values.expand(3, -1), torch.tensor(-0.2).expand(3), mask, torch.ones(1).expand(3), **rates, backend="triton"
    )
    assert_close(expanded.total, tight.total, atol=0, rtol=0)


@as_compiled_here
@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_machine_code_spills_nothing_and_moves_128_bits_at_a_time(variant, capability, emulate):
    advantages = emulate(capability)
    case = VARIANTS[variant]
    run_case(case, inputs(case))
    code = machine_code(advantages.launches[0].cubin)
    assert code.stack == 0 and code.count(r"\b(LDL|STL)\b") == 0
    assert code.registers <= REGISTERS[variant]
    loads = 3 if case.token_task else 1
    width = "64" if case.dtype == torch.bfloat16 else "128"  # four numbers to a thread, whatever their size
    assert code.count(rf"\bLDG\.E\.{width}") == loads
    assert code.count(r"\bSTG\.E\.128") >= (5 if case.token_task else 3)
    assert code.count(r"\bD(ADD|MUL|FMA)\b") == 0  # no float64 arithmetic


@as_compiled_here
def test_unaligned_rows_spill_nothing_either(emulate):
    for capability in TARGETS:
        for case in (replace(VARIANTS["grpo"], T=65), replace(VARIANTS["ppo shaping mask"], T=65)):
            advantages = emulate(capability)
            run_case(case, inputs(case))
            assert machine_code(advantages.launches[0].cubin).stack == 0


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 1000, 1027])
def test_whitening_reads_and_writes_every_number_once(T, dtype, capability, monkeypatch):
    program = EmulatedProgram(ORIGINAL_WHITENING, capability)
    monkeypatch.setattr(triton_programs, "whitening_program", program)
    rng = torch.Generator().manual_seed(T)
    mask = torch.rand(3, T, generator=rng) < 0.7
    x = torch.randn(3, T, generator=rng).to(dtype).masked_fill(~mask, float("nan"))
    wide = torch.full((3, T + -T % 4 + 4), GUARD)
    out, scalars = wide[:, :T], torch.tensor([0.3, 2.0, 0.1])
    triton_kernel.whiten(x, mask, scalars, out)
    expected = torch.where(mask, (x.double() - 0.3) * 2.0 + 0.1, 0).float()
    assert_close(out, expected, atol=1e-6, rtol=0)
    assert (wide[:, T:] == GUARD).all()
    (launch,) = program.launches
    assert (launch.memory.counts(x, "reads") == 1).all() and (launch.memory.counts(out, "writes") == 1).all()
    code = machine_code(launch.cubin)
    assert code.stack == 0 and code.registers <= 40
    if T % 4 == 0:
        assert code.count(r"\bSTG\.E\.128") == 1
        assert code.count(r"\bLDG\.E\.128" if dtype == torch.float32 else r"\bLDG\.E\.64") == 1


def test_whitening_may_write_over_its_input(monkeypatch):
    monkeypatch.setattr(triton_programs, "whitening_program", EmulatedProgram(ORIGINAL_WHITENING, 90))
    x, mask = torch.arange(8.0).reshape(2, 4), torch.ones(2, 4, dtype=torch.bool)
    triton_kernel.whiten(x, mask, torch.tensor([3.5, 2.0, 0.0]), x)
    assert np.array_equal(x.numpy(), (np.arange(8.0).reshape(2, 4) - 3.5) * 2)
