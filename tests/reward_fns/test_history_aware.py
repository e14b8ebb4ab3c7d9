import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_fns import HistoryAwareLengthReward
from reward_fns.prompts import prompt_keys


def right(completions, **_):
    return [float(completion == "right") for completion in completions]


def after(rows, batch, **settings):
    reward = HistoryAwareLengthReward(right, **settings)
    reward(**batch(rows))
    reward.training = False
    return reward


# baselines.md, section 2.1: h = 1000, w = 1
@pytest.mark.parametrize(
    ("tokens", "correct", "wrong"),
    [
        (500, 0.7071, 0.0),
        (900, 0.1564, 0.0),
        (1100, -0.1564, -0.1564),
        (1500, -0.7, -0.7071),
        (2000, -0.7, -1.0),
        (2600, -0.7, -1.0),
    ],
)
def test_worked_example_of_hapo(batch, tokens, correct, wrong):
    reward = after([("p", 1000, True)], batch)
    assert reward(**batch([("p", tokens, True), ("p", tokens, False)])) == pytest.approx([correct, wrong], abs=5e-5)


@pytest.mark.parametrize(
    ("tokens", "correct", "wrong"),
    [(500, 0.5, 0.0), (1000, 0.0, 0.0), (1099, 0.0, 0.0), (1300, -0.2, -0.2), (1900, -0.7, -0.8), (2500, -0.7, -1.0)],
)
def test_linear_shape_by_hand(batch, tokens, correct, wrong):
    reward = after([("p", 1000, True)], batch, shape="linear")
    assert reward(**batch([("p", tokens, True), ("p", tokens, False)])) == pytest.approx([correct, wrong])


def test_first_visit_and_unsolved_prompts_earn_correctness_only(batch):
    reward = HistoryAwareLengthReward(right)
    assert reward(**batch([("p", 10, True), ("p", 30, True), ("q", 10, False)])) == [0.0, 0.0, 0.0]
    # q has no correct completion yet; p has 10
    assert reward(**batch([("p", 20, True), ("q", 10, True)])) == [-0.7, 0.0]


def test_mean_is_weighted_by_the_number_of_correct_completions(batch):
    reward = after([("p", 10, True), ("p", 20, True), ("p", 99, False)], batch, mode="mean")
    (key,) = prompt_keys(["p"], None, 1)
    assert reward.history(key) == 15.0
    reward.training = True
    reward(**batch([("p", 60, True)]))
    assert reward.history(key) == 30.0 and reward.history("id:1") is None


@given(
    batches=st.lists(
        st.lists(st.tuples(st.sampled_from("pqr"), st.integers(1, 50), st.booleans()), max_size=12), max_size=5
    ),
    mode=st.sampled_from(["min", "mean"]),
    shape=st.sampled_from(["cosine", "linear"]),
    weight=st.sampled_from([0.0, 0.3, 1.0]),
    floor=st.sampled_from([-1.0, -0.7, 0.0]),
)
def test_every_batch_agrees_with_a_loop_over_all_lengths_ever_seen(batch, batches, mode, shape, weight, floor):
    reward = HistoryAwareLengthReward(right, mode=mode, shape=shape, weight=weight, correct_floor=floor)
    seen: dict[str, list[int]] = {}
    for rows in batches:
        terms = reward(**batch(rows))
        for (prompt, tokens, correct), term in zip(rows, terms, strict=True):
            expected = 0.0
            if seen.get(prompt):
                h = np.min(seen[prompt]) if mode == "min" else np.mean(seen[prompt])
                x = tokens / h
                lowest = floor if correct else -1.0
                if shape == "cosine":
                    raw = np.cos(np.pi / 2 * x) if x < 2 else -1.0
                else:
                    raw = 1 - x if x < 1 else 1.1 - x if x >= 1.1 else 0.0
                expected = weight * max(lowest, raw if correct else min(0.0, raw))
            assert term == pytest.approx(expected, abs=1e-9)
            assert correct + term <= 2.0
        for prompt, tokens, correct in rows:
            if correct:
                seen.setdefault(prompt, []).append(tokens)


@given(
    h=st.integers(1, 1000),
    long=st.integers(1, 5000),
    short=st.integers(1, 5000),
    shape=st.sampled_from(["cosine", "linear"]),
)
def test_any_correct_completion_beats_any_wrong_one(batch, h, long, short, shape):
    reward = after([("p", h, True)], batch, shape=shape)
    good, bad = reward(**batch([("p", long, True), ("p", short, False)]))
    assert 1 + good >= 0.3 - 1e-12 > bad and 1 + good < 2 and -1 <= bad <= 0


@pytest.mark.parametrize("mode", ["min", "mean"])
def test_history_continues_from_json(batch, mode):
    rows = [("p", 10, True), ("p", 21, True), ("q", 5, True)]
    first = HistoryAwareLengthReward(right, mode=mode)
    first(**batch(rows))
    second = HistoryAwareLengthReward(right, mode=mode)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    later = batch([("p", 12, True), ("q", 9, False), ("p", 4, True)])
    assert [second(**later) for _ in range(3)] == [first(**later) for _ in range(3)]
    assert second.state_dict() == first.state_dict() and second.fingerprint() == first.fingerprint()


def test_saved_history_does_not_change_with_the_reward(batch):
    reward = HistoryAwareLengthReward(right)
    reward(**batch([("p", 10, True)]))
    saved = reward.state_dict()
    reward(**batch([("p", 5, True)]))
    assert list(saved["history"].values()) == [[10, 1]]


@pytest.mark.parametrize(
    "state", [{}, {"mode": "min", "calls": 1, "history": {"p": 3}}, None, {"mode": "min", "calls": 1, "history": []}]
)
def test_what_is_no_history_is_refused(state):
    with pytest.raises(ValueError, match=r"no state of a HistoryAwareLengthReward.*pass what state_dict\(\) returned"):
        HistoryAwareLengthReward(right).load_state_dict(state)


def test_history_of_the_other_mode_is_refused():
    state = HistoryAwareLengthReward(right, mode="mean").state_dict()
    with pytest.raises(ValueError, match="kept with mode='mean', but this reward has mode='min'"):
        HistoryAwareLengthReward(right).load_state_dict(state)


def test_evaluation_reads_the_history_and_leaves_it_alone(batch):
    reward = after([("p", 10, True)], batch)
    before = reward.state_dict()
    assert reward(**batch([("p", 5, True), ("new", 5, True)])) == pytest.approx([math.cos(math.pi / 4), 0.0])
    assert reward.state_dict() == before


def test_empty_completion_that_is_correct_is_no_zero_to_divide_by(batch):
    reward = after([("p", 0, True)], batch)
    assert reward(**batch([("p", 0, True), ("p", 1, True), ("p", 7, False)])) == pytest.approx([1.0, 0.0, -1.0])


def test_share_with_a_history_is_logged(batch):
    metrics, reward = {}, after([("p", 10, True)], batch)
    reward(**batch([("p", 5, True), ("new", 5, True)]), log_metric=metrics.__setitem__)
    assert metrics == {"history_aware_length_reward/known": 0.5}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "max"}, "mode is 'max', but must be one of 'min', 'mean'"),
        ({"shape": "step"}, "shape is 'step', but must be one of 'cosine', 'linear'"),
        ({"weight": -0.1}, "weight is -0.1, but must be a finite number from 0 to 1: above 1, a wrong answer could"),
        ({"weight": 1.1}, "weight is 1.1"),
        ({"correct_floor": 0.5}, "correct_floor is 0.5, but must be a finite number from -1 to 0"),
        ({"tolerance": -1}, "tolerance is -1"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        HistoryAwareLengthReward(right, **settings)
