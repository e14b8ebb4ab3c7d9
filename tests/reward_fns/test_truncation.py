import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_fns import TruncationReward


def right(completions, **_):
    return [float(completion == "right") for completion in completions]


# baselines.md, section 1.6: what is correct within the limit, and the advantages of eq. 3
LENGTHS = [1000, 4000, 4000, 3000, 500, 800, 900, 2000]
R = [1, 0, 0, 0, 1, 1, 1, 0]
EQUATION_3 = [1.7321, -0.5774, -0.5774, -0.5774, 0.5774, 0.5774, 0.5774, -1.7321]


@pytest.mark.parametrize("long_ones_are_right", [True, False])
def test_worked_example_of_dler(batch, long_ones_are_right):
    # the two of 4000 tokens were cut: right or not, they earn nothing
    said = [bool(r) or (length == 4000 and long_ones_are_right) for r, length in zip(R, LENGTHS, strict=True)]
    rows = [("pq"[i // 4], length, said[i]) for i, length in enumerate(LENGTHS)]
    terms = TruncationReward(4000, 1, right)(**batch(rows, cut=[1, 2]))
    rewards = np.array([float(s) + term for s, term in zip(said, terms, strict=True)])
    assert rewards.tolist() == R
    centred = rewards - rewards.reshape(2, 4).mean(1).repeat(4)
    np.testing.assert_allclose((centred - centred.mean()) / centred.std(), EQUATION_3, atol=5e-5)


def test_limit_counts_the_end_token(batch):
    rows = [("p", 5, True), ("p", 6, True), ("p", 5, True), ("p", 5, False), ("p", 9, False)]
    assert TruncationReward(5, 1, right)(**batch(rows, cut=[2])) == [0.0, -1.0, -1.0, 0.0, 0.0]


def test_any_of_several_end_tokens_ends(batch):
    inputs = batch([("p", 3, True)] * 3)
    inputs["completion_ids"] = [[7, 7, 1], [7, 7, 2], [7, 1, 7]]
    assert TruncationReward(5, [1, 2], right)(**inputs) == [0.0, 0.0, -1.0]
    assert TruncationReward(5, 1, right)(**inputs) == [0.0, -1.0, -1.0]
    assert TruncationReward(5, None, right)(**inputs) == [0.0, 0.0, 0.0]


def test_released_code_keeps_a_tenth(batch):
    assert TruncationReward(5, 1, right, kept=0.1)(**batch([("p", 6, True), ("p", 6, False)])) == [-0.9, 0.0]


def test_graded_correctness_is_taken_back_whole(batch):
    def graded(completions, **_):
        return [0.25, -1.0]

    assert TruncationReward(5, 1, graded)(**batch([("p", 6, True), ("p", 6, True)])) == [-0.25, 1.0]


def test_easy_prompts_have_the_shorter_limit(batch):
    easy = [("e", 9, True), ("e", 4, True), ("e", 5, True), ("e", 6, False)]
    hard = [("h", 9, True), ("h", 4, True), ("h", 5, False), ("h", 6, False)]
    reward = TruncationReward(10, 1, right, easy_limit=4)
    # 3 of 4 is more than half, 2 of 4 is not
    assert reward(**batch(easy + hard)) == [-1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    # what the long limit cuts is not solved: 2 of 4
    assert reward(**batch([("e", 11, True), *easy[1:]])) == [-1.0, 0.0, 0.0, 0.0]


@given(
    rows=st.lists(st.tuples(st.sampled_from("pqr"), st.integers(0, 12), st.booleans(), st.booleans()), max_size=20),
    ratio=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
)
def test_da_dler_agrees_with_a_loop(batch, rows, ratio):
    cut = {i for i, row in enumerate(rows) if row[3]}
    terms = TruncationReward(8, 1, right, easy_limit=4, easy_ratio=ratio)(**batch([r[:3] for r in rows], cut=cut))
    for i, (prompt, tokens, correct, _) in enumerate(rows):
        group = [j for j, row in enumerate(rows) if row[0] == prompt]
        solved = [rows[j][2] and j not in cut and 0 < rows[j][1] <= 8 for j in group]
        limit = 4 if np.mean(solved) > ratio else 8
        assert terms[i] == (-1.0 if correct and (tokens > limit or tokens == 0 or i in cut) else 0.0)


def test_schedule_follows_the_training_step(batch):
    reward = TruncationReward({0: 8, 180: 6, 300: 4}, None, right)
    inputs = batch([("p", 7, True), ("p", 5, True), ("p", 4, True)])
    seen = [reward(**inputs, trainer_state=SimpleNamespace(global_step=step)) for step in (0, 179, 180, 299, 300, 999)]
    assert seen == [[0.0, 0.0, 0.0]] * 2 + [[-1.0, 0.0, 0.0]] * 2 + [[-1.0, -1.0, 0.0]] * 2
    with pytest.raises(ValueError, match="a schedule of limits depends on the training step, but trainer_state is"):
        reward(**inputs)


def test_share_outside_the_limit_is_logged(batch):
    metrics = {}
    TruncationReward(5, 1, right)(**batch([("p", 6, True), ("p", 5, True)]), log_metric=metrics.__setitem__)
    assert metrics == {"truncation_reward/cut": 0.5}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": 0}, "limit is 0, but must be an integer of at least 1: a number of tokens"),
        ({"limit": {10: 5}}, "does not say where to begin: add a limit for step 0"),
        ({"limit": {}}, "does not say where to begin"),
        ({"limit": {0: 5, -1: 4}}, "a step of limit is -1"),
        ({"limit": {0: 0}}, "limit is 0"),
        ({"eos_token_ids": []}, r"eos_token_ids is \[\]"),
        ({"kept": 1.5}, "kept is 1.5, but must be a finite number from 0 to 1"),
        ({"kept": math.nan}, "kept is nan"),
        ({"easy_limit": 0}, "easy_limit is 0"),
        ({"easy_limit": 9}, "easy_limit is 9, which is not shorter than the limit of 9 tokens"),
        ({"limit": {0: 9, 5: 6}, "easy_limit": 7}, "easy_limit is 7, which is not shorter than the limit of 6 tokens"),
        ({"easy_ratio": -0.1}, "easy_ratio is -0.1"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        TruncationReward(**({"limit": 9, "eos_token_ids": 1} | settings))
