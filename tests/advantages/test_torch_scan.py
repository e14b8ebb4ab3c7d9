"""What the PyTorch backend promises beyond right numbers: cost, caches, and immunity to the switches of others."""

import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from lenvm_rl.advantages import TaskSignal, length_advantages, torch_scan
from lenvm_rl.advantages.types import empty_advantages


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operations(B, T):
    values, mask = -torch.rand(B, T), torch.ones(B, T, dtype=torch.bool)
    row, out = torch.zeros(B), empty_advantages(values, token_task=False)
    settings = {"gamma": 0.99, "lam": 0.95, "coef": 1.0, "gate": row, "scale": 1.0, "right_padded": False, "out": out}
    compute = lambda: torch_scan.fused(values, row, mask, row, **settings)  # noqa: E731
    compute()  # fills the cache of powers
    with Operations() as seen:
        compute()
    return seen.names


def test_the_number_of_operations_grows_by_levels_not_with_time_or_rows():
    counts = [len(operations(1, T)) for T in (32, 1024, 8192, 65_536)]
    assert counts[0] < 120
    assert counts[1] == counts[2]  # one product over the heads
    assert counts[2] < counts[3] < counts[2] + 15  # one more level from 256 chunks on
    assert len(operations(64, 1024)) == counts[1]


def test_nothing_waits_for_the_device():
    # a tensor without data raises wherever its numbers would be needed on the host
    values = torch.zeros(4, 100, device="meta")
    row = torch.zeros(4, device="meta")
    mask = torch.ones(4, 100, dtype=torch.bool, device="meta")
    task = TaskSignal(values, values, row, gamma=1.0, lam=row, potential_coef=0.5)
    settings = {"gamma": 0.9, "lam": 0.95, "coef": 1.0, "gate": row, "scale": row.sum(), "right_padded": False}
    for signal in (row, task):
        out = empty_advantages(values, token_task=signal is task)
        torch_scan.fused(values, row, mask, signal, **settings, out=out)
    torch_scan.length(values, row, mask, gamma=0.9, lam=1.0, right_padded=True, out=out.length)


@pytest.fixture
def restored_precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_precision_switches_and_autocast_do_no_harm(restored_precision):
    rng = torch.Generator().manual_seed(0)
    values, mask = -torch.rand(4, 3000, generator=rng), torch.rand(4, 3000, generator=rng) < 0.9
    compute = lambda: length_advantages(values, torch.zeros(4), mask, gamma=0.9998, lam=0.99, backend="torch")  # noqa: E731
    expected = compute()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compute(), expected)
    torch.set_float32_matmul_precision("medium")  # float32 products in bfloat16: the scan turns to float64
    assert_close(compute(), expected, atol=1e-6, rtol=0)


def test_the_default_device_and_dtype_of_others_do_not_matter():
    values, mask = -torch.rand(2, 100), torch.ones(2, 100, dtype=torch.bool)
    expected = length_advantages(values, torch.zeros(2), mask, gamma=0.9, lam=0.5, backend="torch")
    torch_scan._cached_powers.cache_clear()
    bootstrap = torch.zeros(2)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            actual = length_advantages(values, bootstrap, mask, gamma=0.9, lam=0.5, backend="torch")
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(actual, expected)


def test_the_cache_of_powers_is_bounded():
    mask = torch.ones(1, 2000, dtype=torch.bool)
    for step in range(100):
        length_advantages(torch.zeros(1, 2000), torch.zeros(1), mask, gamma=0.9 + step * 1e-4, lam=1.0, backend="torch")
    assert torch_scan._cached_powers.cache_info().currsize <= 64


def test_powers_made_in_inference_mode_serve_later_calls():
    torch_scan._cached_powers.cache_clear()
    values, mask = torch.full((1, 50), -0.5), torch.ones(1, 50, dtype=torch.bool)
    with torch.inference_mode():
        length_advantages(values, torch.zeros(1), mask, gamma=0.9, lam=1.0, backend="torch")
    later = length_advantages(values.requires_grad_(), torch.zeros(1), mask, gamma=0.9, lam=1.0, backend="torch")
    assert later.isfinite().all()


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("steps", [1, 31, 32, 33, 1024, 1025, 33_000])
def test_a_scan_of_ones_is_a_geometric_series(steps, decay):
    to_go = torch.arange(steps, 0, -1, dtype=torch.float64)
    expected = to_go if decay == 1 else (1 - decay**to_go) / (1 - decay)
    ones = torch.nn.functional.pad(torch.ones(2, steps, dtype=torch.float64), (0, -steps % torch_scan.CHUNK))
    for decays in (decay, torch.tensor([decay, decay], dtype=torch.float64)):
        sums = torch_scan.reverse_scan(ones, decays)[:, :steps]
        assert_close(sums, expected.expand(2, -1), rtol=1e-12, atol=0)


def test_importing_the_advantages_imports_no_trainer_and_no_compiler():
    heavy = ("trl", "transformers", "triton", "deepspeed")
    code = f"import lenvm_rl.advantages, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
