"""What every way of running the Triton programs must satisfy: interpreted, compiled and emulated, or on a GPU.

`worst_errors` computes a case with backend "triton" and with the float64 loop, checks what is exact, and returns the
errors of the rest.
"""

import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from lenvm_rl.advantages import Advantages, RowStats, TaskSignal, compute_advantages, gae, length_advantages

sys.path.insert(0, str(Path(__file__).parents[1] / "advantages"))
import test_backends_agree as other_backends
from test_backends_agree import rollout, with_hole_runs, with_lengths

LENGTH_TOLERANCE = 2e-6
TASK_TOLERANCE = 1e-5  # of 1 + the largest number
GUARD = 777.0


@dataclass(frozen=True)
class Case:
    T: int
    lengths: tuple[int | None, ...] = (None, 0, 1, -3)
    """Tokens of each row; None is all of them, and negative numbers count from there."""
    token_task: bool = False
    holes: bool = False
    right_padded: bool = True
    dtype: torch.dtype = torch.float32
    gamma: float = 0.9998
    lam: float = 0.95
    task_lam: float | None = 0.97
    """None draws one for each row."""
    beta: float = 0.3
    gate: str | None = "float"
    scale_on_device: bool = False
    broken: bool = False
    """The first row has inputs that are not finite: they are to be counted, and to stay there."""
    seed: int = 0

    def __str__(self) -> str:
        parts = [f"T{self.T}", "ppo" if self.token_task else "grpo", str(self.dtype)[6:]]
        parts += ["holes"] * self.holes + ["promised"] * self.right_padded + ["broken"] * self.broken
        return "-".join([*parts, f"gamma{self.gamma}", f"lam{self.lam}"])


CASES = [
    Case(T=1, lengths=(None, 0)),
    Case(T=7),
    Case(T=64, gamma=0.99999, lam=1.0),
    Case(T=100, gamma=0.9, lam=0.0, gate=None),
    Case(T=131, right_padded=False, gate="bool", scale_on_device=True),
    Case(T=132, holes=True, right_padded=False, lam=1.0),
    Case(T=300, dtype=torch.bfloat16, gate="int"),
    Case(T=300, dtype=torch.float16, holes=True, right_padded=False, gamma=0.99999),
    Case(T=3, token_task=True),
    Case(T=128, token_task=True, beta=0.0, lam=1.0, task_lam=1.0),
    Case(T=129, token_task=True, gamma=0.9, task_lam=0.0, scale_on_device=True),
    Case(T=260, token_task=True, task_lam=None, gamma=0.99999, lam=0.0),
    Case(T=304, token_task=True, holes=True, right_padded=False),
    Case(T=301, token_task=True, holes=True, right_padded=False, task_lam=None, gate="int"),
    Case(T=160, token_task=True, dtype=torch.bfloat16, holes=True, right_padded=False, gate=None),
    Case(T=161, token_task=True, dtype=torch.float16),
    Case(T=256, lengths=(None, 128, 255, 129), broken=True),
    Case(T=299, token_task=True, holes=True, right_padded=False, broken=True),
]


MEANING = [
    (other_backends.test_an_empty_batch_gives_empty_results, {"B": 3, "T": 0}),
    (other_backends.test_an_empty_batch_gives_empty_results, {"B": 0, "T": 7}),
    (other_backends.test_a_row_without_tokens_gives_zeros_whatever_its_numbers, {}),
    (other_backends.test_non_finite_values_are_counted_and_stay_in_their_row, {}),
    (other_backends.test_coefficient_zero_is_the_task_advantage_bit_for_bit_even_beside_a_broken_critic, {}),
    (other_backends.test_results_are_new_tensors_without_gradient_and_inputs_are_left_alone, {}),
    (other_backends.test_rows_and_numbers_may_lie_apart_in_memory, {}),
    (other_backends.test_a_promise_of_right_padding_changes_nothing_where_it_is_true, {"token_task": False}),
    (other_backends.test_a_promise_of_right_padding_changes_nothing_where_it_is_true, {"token_task": True}),
    (other_backends.test_an_earlier_result_gives_its_memory_to_the_next, {}),
    (other_backends.test_gae_agrees_at_the_ends_of_its_ranges, {}),
]
"""Tests of the other backends that hold for this one too, with their arguments beside `backend`."""


@dataclass(frozen=True)
class Inputs:
    values: Tensor
    bootstrap: Tensor
    mask: Tensor
    task: Tensor | TaskSignal
    gate: Tensor | None
    scale: float | Tensor


def inputs(case: Case, device: str = "cpu") -> Inputs:
    rng = torch.Generator().manual_seed(case.seed)
    lengths = [case.T if n is None else n % case.T if n < 0 else min(n, case.T) for n in case.lengths]
    mask = with_lengths(case.T, lengths)
    if case.holes:
        mask = with_hole_runs(mask, rng)
        mask = torch.cat([mask, torch.rand(1, case.T, generator=rng) < 0.5, mask[:1].flip(1)])
    B = len(mask)
    gates = {"float": torch.rand(B, generator=rng), "bool": torch.arange(B) % 2 == 0, "int": torch.arange(B) % 3}
    values, bootstrap, rewards, task_values, sequence = rollout(mask, case.seed, case.dtype)
    for x in (bootstrap, sequence, gates["float"]):
        x[~mask.any(1)] = float("nan")  # rows without tokens do not look at them
    if case.broken:
        for x, share in ((values, 0.1), (rewards, 0.2), (task_values, 0.3)):
            x[0, mask[0] & (torch.rand(case.T, generator=rng) < share)] = float("nan")
        bootstrap[0], sequence[0], gates["float"][0] = float("inf"), -float("inf"), float("nan")
    values, bootstrap, rewards, task_values, sequence = (
        x.to(device) for x in (values, bootstrap, rewards, task_values, sequence)
    )
    task_lam = torch.rand(B, generator=rng).to(device) if case.task_lam is None else case.task_lam
    signal = TaskSignal(rewards, task_values, sequence, gamma=0.999, lam=task_lam, potential_coef=case.beta)
    return Inputs(
        values=values,
        bootstrap=bootstrap.float(),  # every tensor may have a dtype of its own
        mask=mask.to(device),
        task=signal if case.token_task else sequence,
        gate=None if case.gate is None else gates[case.gate].to(device),
        scale=torch.tensor(0.5, dtype=torch.float64, device=device) if case.scale_on_device else 0.5,
    )


def settings(case: Case, given: Inputs) -> dict:
    return {"gamma": case.gamma, "lam": case.lam, "coef": 0.7, "gate": given.gate, "scale": given.scale}


def guarded_buffers(given: Inputs) -> Advantages:
    """Buffers with rows of a multiple of 4 numbers, and columns behind the tokens that nobody may touch."""
    B, T = given.mask.shape
    token_task = isinstance(given.task, TaskSignal)

    def rows() -> Tensor:
        return torch.full((B, T + -T % 4 + 4), GUARD)[:, :T]

    task = rows() if token_task else torch.full((B, 1), GUARD)
    return Advantages(
        rows(), rows(), task, rows(), RowStats(torch.full((B, 16), GUARD)), rows() if token_task else None
    )


def quantities(case: Case) -> list[str]:
    return ["length", "returns", "task", "total"] + ["task_returns"] * case.token_task


@lru_cache(maxsize=8)
def reference(case: Case, device: str) -> Advantages:
    given = inputs(case, device)
    arguments = (given.values, given.bootstrap, given.mask, given.task)
    return compute_advantages(*arguments, **settings(case, given), backend="reference")


def worst_errors(case: Case, device: str = "cpu", out: Advantages | None = None) -> dict[str, float]:
    """Errors of backend "triton" by quantity, the tolerance of each being 1.

    Raises:
        AssertionError: a masked entry is not exactly 0, a count or a statistic is wrong.
    """
    given = inputs(case, device)
    arguments = (given.values, given.bootstrap, given.mask, given.task)
    actual = compute_advantages(
        *arguments, **settings(case, given), right_padded=case.right_padded, backend="triton", out=out
    )
    expected = reference(case, device)
    errors, sound = {}, slice(int(case.broken), None)
    for name in quantities(case):
        live = given.mask if name != "task" or case.token_task else given.mask.any(1, keepdim=True)
        assert (getattr(actual, name)[~live] == 0).all(), f"{name} is not 0 where the mask is 0"
        errors[name] = _error(name, getattr(actual, name)[sound], getattr(expected, name)[sound])
        for moment, relative in (("mean", 1e-5), ("m2", 1e-4)):
            result, wanted = (getattr(getattr(x.stats, name), moment)[sound] for x in (actual, expected))
            error = ((result - wanted).abs() / (1e-5 + relative * wanted.abs())).max().item()
            assert error < 1, f"{moment} of {name} is off by {error} tolerances in {case}"
    for count in ("tokens", "nonfinite", "task_nonfinite"):
        assert torch.equal(getattr(actual.stats, count), getattr(expected.stats, count)), f"{count} in {case}"
    assert (actual.stats.table[:, 13 if case.token_task else 11 :] == 0).all()
    return errors


def worst_errors_of_the_parts(case: Case, device: str = "cpu") -> dict[str, float]:
    """The same for `length_advantages`, or for `gae` of a task signal."""
    given = inputs(case, device)
    sound = slice(int(case.broken), None)
    promise = {"right_padded": case.right_padded, "backend": "triton"}
    if not isinstance(given.task, TaskSignal):
        side = (given.values, given.bootstrap, given.mask)
        rate = {"gamma": case.gamma, "lam": case.lam}
        actual = length_advantages(*side, **rate, **promise)
        expected = length_advantages(*side, **rate, backend="reference")
        return {"length": _error("length", actual[sound], expected[sound])}
    side = (given.task.rewards, given.task.values, given.task.bootstrap, given.mask)
    rate = {"gamma": given.task.gamma, "lam": given.task.lam}
    results, wanted = gae(*side, **rate, **promise), gae(*side, **rate, backend="reference")
    return {
        name: _error(name, result[sound], right[sound])
        for name, result, right in zip(("task", "task_returns"), results, wanted, strict=True)
    }


def _error(name: str, actual: Tensor, expected: Tensor) -> float:
    assert actual.dtype == torch.float32 and actual.shape == expected.shape
    assert actual.isfinite().all(), f"{name} is not finite"
    largest = expected.abs().max().item()
    tolerance = LENGTH_TOLERANCE if name in ("length", "returns") else TASK_TOLERANCE * (1 + largest)
    return (actual - expected).abs().max().item() / tolerance
