import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor
from torch.testing import assert_close

from lenvm_rl.advantages import RowStats
from lenvm_rl.advantages.types import STATISTICS, TABLE_WIDTH
from lenvm_rl.credit import LengthCredit, gated_std

NAN = float("nan")
GATES = ("all", "correct", "solve_rate")


def stats_of(length, mask):
    """The statistics of `compute_advantages`, of given length advantages."""
    table = torch.zeros(len(length), TABLE_WIDTH)
    for row, numbers, live in zip(table, length.double(), mask, strict=True):
        own = numbers[live]
        row[STATISTICS.index("tokens")] = len(own)
        if len(own):
            row[STATISTICS.index("length_mean")] = mean = own.mean().float()
            row[STATISTICS.index("length_m2")] = (own - mean.double()).square().sum()
    return RowStats(table)


# two groups of four: half of the first is correct, three quarters of the second
CORRECTNESS = tensor([1.0, 0.0, 1.0, 0.5, 1.0, 1.0, 0.0, 1.0])


def test_the_gate_all_lets_every_completion_of_a_solved_group_feel_the_signal():
    gate = LengthCredit(gate="all").gates(tensor([1.0, 0.0, NAN, -1.0]), num_generations=2)
    assert_close(gate, tensor([1.0, 1.0, 0.0, 0.0]))


def test_groups_without_a_correct_completion_feel_it_on_request_as_in_the_paper():
    gate = LengthCredit(gate="all", unsolved=True).gates(tensor([1.0, 0.0, NAN, -1.0]), num_generations=2)
    assert_close(gate, tensor([1.0, 1.0, 1.0, 1.0]))


def test_the_gate_correct_keeps_what_reaches_the_threshold():
    credit = LengthCredit(gate="correct")
    assert_close(credit.gates(CORRECTNESS, 4), tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0]))
    lenient = LengthCredit(gate="correct", threshold=0.5)
    assert_close(lenient.gates(CORRECTNESS, 4), tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0]))


def test_the_gate_solve_rate_presses_easy_prompts_hardest():
    gate = LengthCredit(gate="solve_rate").gates(CORRECTNESS, num_generations=4)
    assert_close(gate, tensor([0.5, 0.0, 0.5, 0.0, 0.75, 0.75, 0.0, 0.75]))


def test_a_group_without_a_correct_completion_feels_nothing():
    for name in ("correct", "solve_rate"):
        gate = LengthCredit(gate=name).gates(tensor([0.0, 0.0, 1.0, 1.0]), num_generations=2)
        assert_close(gate, tensor([0.0, 0.0, 1.0, 1.0]))


def test_what_could_not_be_scored_is_not_correct_and_lowers_the_solve_rate():
    correctness = tensor([1.0, NAN, NAN, 1.0])
    assert_close(LengthCredit(gate="correct").gates(correctness, 4), tensor([1.0, 0.0, 0.0, 1.0]))
    assert_close(LengthCredit(gate="solve_rate").gates(correctness, 4), tensor([0.5, 0.0, 0.0, 0.5]))


@pytest.mark.parametrize("name", GATES)
def test_gates_are_float32_whatever_the_dtype_of_the_rewards(name):
    gate = LengthCredit(gate=name).gates(CORRECTNESS.double(), num_generations=4)
    assert gate.dtype == torch.float32 and gate.shape == (8,)


@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, NAN]), min_size=12, max_size=12),
    st.sampled_from([1, 2, 3, 4, 6, 12]),
)
@settings(max_examples=50, deadline=None)
def test_gates_are_ordered_and_the_solve_rate_is_counted_by_hand(rewards, num_generations):
    gates = {name: LengthCredit(gate=name).gates(tensor(rewards), num_generations).tolist() for name in GATES}
    for row, reward in enumerate(rewards):
        group = rewards[row - row % num_generations :][:num_generations]
        correct = float(reward == 1.0)
        assert gates["all"][row] == float(1.0 in group)
        assert gates["correct"][row] == correct
        assert gates["solve_rate"][row] == pytest.approx(correct * group.count(1.0) / num_generations)


def batch(rows, width, seed=0):
    """Length advantages, 0 outside a random mask, and gates of 0, 1/2 and 1."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, width, generator=generator) < 0.7
    length = (torch.randn(rows, width, generator=generator) * 0.2 + 0.1) * mask
    return length, mask, torch.randint(0, 3, (rows,), generator=generator) / 2


def numpy_std(length, mask, gate):
    chosen = [length[row][mask[row]].numpy() for row in range(len(gate)) if gate[row] > 0]
    return float(np.std(np.concatenate(chosen).astype(np.float64)))


def test_the_scale_is_the_standard_deviation_over_gated_tokens():
    length = tensor([[0.3, -0.1, 0.0], [9.0, 9.0, 9.0], [0.5, 0.0, 0.0]])
    mask = tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]]).bool()
    # of 0.3, -0.1 and 0.5: mean 0.7/3, mean square 0.35/3; the middle completion is gated out
    std = gated_std(stats_of(length, mask), gate=tensor([1.0, 0.0, 0.25]))
    assert std.shape == () and std.dtype == torch.float32
    assert std.item() == pytest.approx(0.2494438258)


@given(st.integers(1, 12), st.integers(1, 20), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_the_scale_is_numpys_standard_deviation(rows, width, seed):
    length, mask, gate = batch(rows, width, seed)
    if not (mask & (gate > 0)[:, None]).any():
        return
    expected = max(numpy_std(length, mask, gate), 1e-3)
    assert gated_std(stats_of(length, mask), gate).item() == pytest.approx(expected, rel=1e-6)


def test_the_scale_of_two_processes_is_that_of_their_whole_batch():
    length, mask, gate = batch(10, 30)
    parts = [(length[:4, :20], mask[:4, :20], gate[:4]), (length[4:], mask[4:], gate[4:])]
    sums = []
    for part in parts:  # each process hands its three sums over; the widths differ
        gated_std(stats_of(*part[:2]), part[2], reduce=lambda own: sums.append(own) or own)
    assert [own.shape for own in sums] == [(3,), (3,)]
    mask[:4, 20:] = False
    for part in parts:
        shared = gated_std(stats_of(*part[:2]), part[2], reduce=lambda own: sums[0] + sums[1])
        assert shared.item() == pytest.approx(numpy_std(length, mask, gate), rel=1e-6)


def test_the_scale_has_a_floor():
    equal, mask, gate = torch.full((2, 3), 0.1), torch.ones(2, 3, dtype=torch.bool), torch.ones(2)
    assert gated_std(stats_of(equal, mask), gate).item() == pytest.approx(1e-3)
    assert gated_std(stats_of(equal, mask), torch.zeros(2)).item() == pytest.approx(1e-3)  # nobody feels it
    assert gated_std(stats_of(equal, torch.zeros_like(mask)), gate).item() == pytest.approx(1e-3)


def test_a_small_spread_around_a_large_mean_is_not_lost():
    # 1e4 +- 0.01: in float32 the difference of squares would be noise
    length = tensor([[1e4 - 0.0098, 1e4 + 0.0098]])
    spread = (length.double() - length.double().mean()).abs().mean().item()
    assert gated_std(stats_of(length, torch.ones(1, 2, dtype=torch.bool)), torch.ones(1)).item() == pytest.approx(
        spread, rel=1e-3
    )


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"coef": math.inf}, "length_coef must be a finite number, got inf"),
        ({"coef": NAN}, "length_coef must be a finite number, got nan"),
        ({"lam": -0.1}, r"length_lambda must lie in \[0, 1\], got -0.1"),
        ({"lam": 1.1}, r"length_lambda must lie in \[0, 1\], got 1.1"),
        ({"lam": NAN}, r"length_lambda must lie in \[0, 1\], got nan"),
        ({"threshold": NAN}, "length_gate_threshold must be a finite number, got nan"),
        ({"threshold": -math.inf}, "length_gate_threshold must be a finite number, got -inf"),
        ({"gate": "right"}, "length_gate must be one of all, correct, solve_rate, got 'right'"),
        ({"scale": "max"}, "length_scale must be one of none, std, got 'max'"),
        ({"mode": "bonus"}, "length_mode must be one of additive, shaping, got 'bonus'"),
        ({"resolution": "word"}, "length_resolution must be one of token, completion, batch, got 'word'"),
        ({"clip": 0.0}, "length_clip must be a positive number, or None for no clip, got 0.0"),
        ({"discounted": True}, "set length_mode='shaping'"),
        ({"mode": "shaping", "targeted": True}, "cannot reach a length target"),
        ({"mode": "shaping", "lam": 0.9}, "length_lambda=0.9 belongs to the additive length advantage"),
        ({"coef": -1.0, "targeted": True}, "length_coef=-1.0 would press away from the length target"),
    ],
)
def test_a_setting_outside_its_range_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        LengthCredit(**setting)


def test_settings_at_the_ends_of_their_ranges_are_taken():
    for lam in (0.0, 1.0):
        LengthCredit(lam=lam)
    for coef in (-2.0, 0.0, 3.0):
        LengthCredit(coef=coef)
