import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_fns import L1Reward

ROWS = st.lists(st.tuples(st.sampled_from("pqr"), st.integers(1, 40), st.booleans()), max_size=20)


def right(completions, **_):
    return [float(completion == "right") for completion in completions]


def test_exact_by_hand(batch):
    rows = [("p", 1000, True), ("p", 3000, False), ("p", 2000, False)]
    assert L1Reward("exact")(**batch(rows, target_tokens=[2000] * 3)) == pytest.approx([-0.3, -0.3, 0.0])


def test_max_by_hand(batch):
    # 0.0003 * 1000 + 0.5 = 0.8; exactly n keeps a half; far below keeps all, far above nothing
    rows = [
        ("p", 1000, True),
        ("p", 2000, True),
        ("p", 3000, True),
        ("p", 9, True),
        ("p", 9000, True),
        ("p", 9000, False),
    ]
    terms = L1Reward("max", right, target=2000)(**batch(rows))
    assert terms == pytest.approx([-0.2, -0.5, -0.8, 0.0, -1.0, 0.0])


@given(
    rows=ROWS, targets=st.lists(st.integers(1, 40), min_size=20, max_size=20), delta=st.sampled_from([0.0, 0.5, 1.0])
)
def test_terms_agree_with_the_published_rewards(batch, rows, targets, delta):
    n, tokens = np.array(targets[: len(rows)]), np.array([row[1] for row in rows])
    correct = np.array([row[2] for row in rows], float)
    inputs = batch(rows, budget=n.tolist())
    exact = L1Reward("exact", alpha=0.05, column="budget")(**inputs)
    at_most = L1Reward("max", right, alpha=0.05, delta=delta, column="budget")(**inputs)
    np.testing.assert_allclose(correct + exact, correct - 0.05 * abs(n - tokens), atol=1e-12)
    np.testing.assert_allclose(correct + at_most, correct * np.clip(0.05 * (n - tokens) + delta, 0, 1), atol=1e-12)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, r"needs the length asked for, but the column 'target_tokens' is missing: add it"),
        ({"target_tokens": [5]}, "the column 'target_tokens' is 1 rows for 2 completions"),
        ({"target_tokens": [5, None]}, "row 1 of column 'target_tokens' is None"),
        ({"target_tokens": [0, 5]}, "row 0 of column 'target_tokens' is 0"),
    ],
)
@pytest.mark.parametrize("mode", ["exact", "max"])
def test_targets_are_checked(batch, mode, columns, message):
    with pytest.raises(ValueError, match=message):
        L1Reward(mode, right)(**batch([("p", 3, True), ("p", 4, True)], **columns))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "min"}, "mode is 'min', but must be one of 'exact', 'max'"),
        ({"alpha": -1}, "alpha is -1"),
        ({"delta": 1.5}, "delta is 1.5"),
        ({"target": 0}, "target is 0"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        L1Reward(**({"mode": "max"} | settings))
