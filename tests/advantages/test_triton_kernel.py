"""Backend "triton": its errors, and its programs in Triton's interpreter or on a GPU. What is compiled of them is
checked without a GPU in tests/ptx.

Run as a script, the file is the interpreter's half: whether a program is interpreted is settled when it is imported.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

sys.path.insert(0, str(Path(__file__).parents[1] / "ptx"))
from agreement import CASES, MEANING, inputs, settings, worst_errors, worst_errors_of_the_parts

from lenvm_rl.advantages import TaskSignal, compute_advantages, gae, length_advantages, triton_kernel

needs_triton = pytest.mark.skipif(triton_kernel.unavailable() is not None, reason=triton_kernel.unavailable() or "")
needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SMALL_BLOCK = 64
"""Shorter than the cases, so that the state is carried from chunk to chunk."""


@pytest.mark.slow
@needs_triton
def test_the_interpreted_programs_agree_with_the_reference():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def interpreted() -> None:
    triton_kernel.BLOCK = SMALL_BLOCK
    for case in CASES:
        errors = worst_errors(case) | {f"{name} alone": e for name, e in worst_errors_of_the_parts(case).items()}
        assert max(errors.values()) < 1, f"{case}: errors in tolerances are {errors}"
    for test, arguments in MEANING:
        test(**arguments, backend="triton")


def arguments(**changes):
    zeros = torch.zeros(2)
    given = {
        "values": torch.full((2, 3), -0.5),
        "bootstrap": zeros,
        "mask": torch.ones(2, 3, dtype=torch.bool),
        "task": zeros,
        "gamma": 0.9,
        "lam": 1.0,
        "coef": 1.0,
        "backend": "triton",
    }
    return given | changes


def signal(**changes):
    matrix = torch.zeros(2, 3)
    given = {"rewards": matrix, "values": matrix, "bootstrap": matrix[:, 0], "gamma": 1.0, "lam": 0.95}
    return TaskSignal(**(given | changes))


@needs_triton
def test_tensors_on_a_cpu_are_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"backend 'triton' needs CUDA tensors, but .* on cpu: .*backend='torch'"):
        compute_advantages(**arguments())
    values, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="needs CUDA tensors"):
        length_advantages(values, torch.zeros(2), mask, gamma=0.9, lam=1.0, backend="triton")
    with pytest.raises(ValueError, match="needs CUDA tensors"):
        gae(values, values, torch.zeros(2), mask, gamma=0.9, lam=1.0, backend="triton")


@needs_triton
@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"values": torch.zeros(2, 3).double()}, "values"),
        ({"bootstrap": torch.zeros(2).double()}, "bootstrap"),
        ({"task": torch.zeros(2).double()}, "task"),
        ({"gate": torch.zeros(2).double()}, "gate"),
        ({"task": signal(rewards=torch.zeros(2, 3).double())}, "rewards"),
        ({"task": signal(values=torch.zeros(2, 3).double())}, "the task values"),
        ({"task": signal(bootstrap=torch.zeros(2).double())}, "the task bootstrap"),
        ({"task": signal(lam=torch.zeros(2).double())}, "the task lam"),
    ],
)
def test_float64_is_refused_by_name_with_what_to_do(changes, name):
    with pytest.raises(ValueError, match=rf"^{name} has dtype torch.float64.*\.float\(\), or choose backend='torch'"):
        compute_advantages(**arguments(**changes))


@needs_triton
def test_buffers_of_different_widths_are_refused():
    out = compute_advantages(**arguments(backend="torch"))
    wide = torch.zeros(2, 4)[:, :3]
    with pytest.raises(ValueError, match=r"rows \[3, 4\] numbers apart.*pass an earlier result, or None"):
        compute_advantages(**arguments(), out=replace(out, total=wide))


def test_a_missing_triton_is_named_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install 'triton>=3.3'" in triton_kernel.unavailable()
    with pytest.raises(ImportError, match=r"backend 'triton' cannot import triton .*: pip install 'triton>=3.3'"):
        compute_advantages(**arguments())


@needs_triton
@pytest.mark.parametrize(("version", "usable"), [("3.2.0", False), ("2.3.1", False), ("3.3.0", True), ("4.0", True)])
def test_a_triton_that_compiles_reverse_scans_wrongly_is_refused(version, usable, monkeypatch):
    monkeypatch.setattr("triton.__version__", version)
    reason = triton_kernel.unavailable()
    if usable:
        assert reason is None
    else:
        assert f"triton {version}, which compiles reverse scans wrongly: pip install 'triton>=3.3'" in reason


def test_importing_the_backend_does_not_import_triton():
    code = "import lenvm_rl.advantages.triton_kernel, sys; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.gpu
@needs_a_gpu
@needs_triton
@pytest.mark.parametrize("T", [None, 5000])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_a_gpu_the_programs_agree_with_the_reference(case, T):
    case = case if T is None else replace(case, T=T + case.T)
    errors = worst_errors(case, "cuda") | worst_errors_of_the_parts(case, "cuda")
    assert max(errors.values()) < 1, f"errors in tolerances are {errors}"


@pytest.mark.gpu
@needs_a_gpu
@needs_triton
@pytest.mark.parametrize("case", [CASES[6], CASES[12]], ids=str)
def test_on_a_gpu_torch_compile_changes_nothing(case):
    given = inputs(case, "cuda")

    @torch.compile(fullgraph=True)
    def total(values):
        result = compute_advantages(
            values, given.bootstrap, given.mask, given.task, **settings(case, given), backend="triton"
        )
        return result.total

    compiled = total(given.values)
    eager = compute_advantages(
        given.values, given.bootstrap, given.mask, given.task, **settings(case, given), backend="triton"
    )
    assert_close(compiled, eager.total, atol=0, rtol=0)


@pytest.mark.gpu
@needs_a_gpu
@needs_triton
@pytest.mark.parametrize("case", [CASES[6], CASES[12]], ids=str)
def test_on_a_gpu_a_cuda_graph_recomputes_when_it_is_replayed(case):
    given = inputs(case, "cuda")

    def compute(out=None):
        return compute_advantages(
            given.values, given.bootstrap, given.mask, given.task, **settings(case, given), out=out, backend="triton"
        )

    out = compute()  # compiles, which a capture may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compute(out)
    given.values.mul_(0.5)
    graph.replay()
    expected = compute()
    assert_close(out.total, expected.total, atol=0, rtol=0)
    assert_close(out.stats.table, expected.stats.table, atol=0, rtol=0)


if __name__ == "__main__":
    interpreted()
