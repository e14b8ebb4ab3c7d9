import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lenvm_rl.evaluation.scheduling import compare_schedules, form_batches, leave_one_out_means, padding_waste

LENGTHS = np.array([10, 2, 9, 1])


def test_waste_is_what_is_computed_after_a_completion_ended():
    # arrival order: (10, 2) and (9, 1) compute 20 + 18 positions for 22 tokens, in 10 + 9 steps
    arrival = padding_waste(LENGTHS, form_batches(np.zeros(4), 2, 4))
    assert (arrival.waste, arrival.steps) == (pytest.approx(1 - 22 / 38), 19)
    # sorted: (1, 2) and (9, 10) compute 4 + 20, in 2 + 10 steps
    oracle = padding_waste(LENGTHS, form_batches(LENGTHS, 2, 4))
    assert (oracle.waste, oracle.steps) == (pytest.approx(1 - 22 / 24), 12)


def test_a_window_of_one_batch_is_arrival_order_whatever_is_predicted():
    batches = form_batches(LENGTHS, 2, 2)
    assert [sorted(batch.tolist()) for batch in batches] == [[0, 1], [2, 3]]


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(1, 5), st.integers(1, 4))
def test_every_request_is_in_one_batch_and_no_order_beats_the_oracle(lengths, size, batches):
    lengths = np.array(lengths)
    formed = form_batches(-lengths, size, size * batches)
    assert sorted(np.concatenate(formed).tolist()) == list(range(len(lengths)))
    # requests that fill whole batches: with a rest, which batch is the small one matters too
    whole = lengths[: len(lengths) // size * size]
    if len(whole):
        one_window = len(whole)
        best = padding_waste(whole, form_batches(whole, size, one_window))
        assert best.steps <= padding_waste(whole, form_batches(np.zeros(len(whole)), size, one_window)).steps


def test_a_perfect_prediction_is_the_oracle_and_an_informative_one_lies_between():
    rng = np.random.default_rng(0)
    mean = rng.uniform(5, 60, 512)
    lengths = 1 + rng.poisson(mean)
    found = compare_schedules(lengths, {"mean": mean, "perfect": lengths}, batch_size=8, window=64, arrivals=20)
    assert list(found) == ["arrival order", "mean", "perfect", "oracle"]
    assert found["perfect"] == found["oracle"]
    assert found["oracle"].waste < found["mean"].waste < 0.6 * found["arrival order"].waste
    assert found["mean"].waste_low <= found["mean"].waste <= found["mean"].waste_high


def test_the_mean_of_the_others_leaves_a_completion_out():
    assert leave_one_out_means(np.array([2, 4, 9, 1]), np.array([5, 5, 5, 3])[[0, 1, 2, 0]]) == pytest.approx(
        [14 / 3, 4, 7 / 3, 5]
    )
    with pytest.raises(ValueError, match="one completion only"):
        leave_one_out_means(np.array([2, 4, 9]), np.array([0, 0, 1]))


def test_a_window_that_splits_a_batch_is_refused():
    with pytest.raises(ValueError, match="window of 6 requests for batches of 4"):
        form_batches(np.zeros(8), 4, 6)
    with pytest.raises(ValueError, match="predicts 1 lengths for 2 requests"):
        compare_schedules(np.array([1, 2]), {"short": np.array([1])})
