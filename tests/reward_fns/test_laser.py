import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_fns import LaserDReward, LaserReward

ROWS = st.lists(st.tuples(st.sampled_from("pqr"), st.integers(1, 40), st.booleans()), max_size=20)


def right(completions, **_):
    return [float(completion == "right") for completion in completions]


GRID = {"shortest": 10, "longest": 40, "spacing": 10, "group_size": 8}


def test_bonus_is_for_correct_completions_within_the_target(batch):
    rows = [("p", 20, True), ("p", 21, True), ("p", 5, False)]
    assert LaserReward(20, right)(**batch(rows)) == [0.5, 0.0, 0.0]
    assert LaserReward(20, right, bonus=2.0)(**batch(rows)) == [2.0, 0.0, 0.0]


def test_targets_by_hand(batch):
    # high (5 of 8 of a level's completions would be right at worst): a fifth of it must fit; medium: half; low: all
    high = [("h", tokens, True) for tokens in (9, 15, 15, 15, 15)]
    medium = [("m", tokens, tokens == 12) for tokens in (12, 25)]
    low = [("l", tokens, False) for tokens in (12, 25)]
    reward = LaserDReward(right, **GRID, update_every=1)
    assert reward.targets == {"high": 40, "medium": 40, "low": 40}
    assert reward(**batch(high + medium + low)) == [0.5] * 6 + [0.0] * 3
    assert reward.targets == {"high": 10, "medium": 20, "low": 30}
    assert reward(**batch(high + medium + low)) == [0.5, 0, 0, 0, 0, 0.5, 0, 0, 0]


def test_targets_follow_every_so_many_training_batches(batch):
    reward, inputs = LaserDReward(right, **GRID, update_every=3), batch([("h", 9, True)])
    for _ in range(2):
        reward(**inputs)
    reward.training = False
    reward(**inputs)
    assert reward.targets["high"] == 40
    reward.training = None
    reward(**inputs)
    # a level that was not seen keeps its target
    assert reward.targets == {"high": 10, "medium": 40, "low": 40}
    for _ in range(3):
        reward(**batch([("h", 35, True)]))
    assert reward.targets["high"] == 40


@given(rows=ROWS, group_size=st.sampled_from([2, 4, 8, 16]))
def test_targets_agree_with_the_published_search(batch, rows, group_size):
    reward = LaserDReward(right, **(GRID | {"group_size": group_size, "spacing": 4}), update_every=1)
    reward(**batch(rows))
    lengths = {"high": [], "medium": [], "low": []}
    for prompt in {row[0] for row in rows}:
        group = [row for row in rows if row[0] == prompt]
        accuracy = np.mean([row[2] for row in group])
        level = "high" if accuracy >= 2 / 3 - 1e-9 else "medium" if accuracy >= 1 / 3 - 1e-9 else "low"
        lengths[level] += [row[1] for row in group]
    expected = {"high": max(1, int(group_size * 2 / 3)), "medium": max(1, int(group_size / 3)), "low": 1}
    for level, seen in lengths.items():
        target = 40
        for candidate in [*range(10, 40, 4), 40][::-1]:
            if seen and int(np.mean(np.array(seen) <= candidate) * expected[level] + 1e-9) >= 1:
                target = candidate
        assert reward.targets[level] == target


def test_state_continues_from_json(batch):
    rows = [("h", 9, True), ("m", 12, True), ("m", 25, False), ("l", 3, False)]
    first, second = (LaserDReward(right, **GRID, update_every=2) for _ in range(2))
    for _ in range(3):
        first(**batch(rows))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [second(**batch(rows)) for _ in range(2)] == [first(**batch(rows)) for _ in range(2)]
    assert second.state_dict() == first.state_dict() and second.fingerprint() == first.fingerprint()
    with pytest.raises(ValueError, match="no state of a LaserDReward"):
        second.load_state_dict({"batches": 3})


def test_targets_are_logged(batch):
    metrics = {}
    LaserDReward(right, **GRID)(**batch([("p", 3, True)]), log_metric=metrics.__setitem__)
    assert metrics == {f"laser_d_reward/target_{level}": 40.0 for level in ("high", "medium", "low")}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shortest": 0}, "shortest is 0"),
        ({"shortest": 50, "longest": 40}, "longest is 40, but must be an integer of at least 50"),
        ({"spacing": 0}, "spacing is 0"),
        ({"bonus": -1}, "bonus is -1"),
        ({"update_every": 0}, "update_every is 0"),
        ({"group_size": 0}, "group_size is 0"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        LaserDReward(right, **settings)
    with pytest.raises(ValueError, match="target is 0"):
        LaserReward(0, right)
