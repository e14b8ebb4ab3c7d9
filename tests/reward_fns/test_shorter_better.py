import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_fns import ShorterBetterReward

ROWS = st.lists(st.tuples(st.sampled_from("pqr"), st.integers(1, 40), st.booleans()), max_size=20)


def right(completions, **_):
    return [float(completion == "right") for completion in completions]


def test_terms_by_hand(batch):
    rows = [("p", 10, False), ("p", 20, True), ("p", 50, True), ("q", 10, False), ("q", 40, False)]
    assert ShorterBetterReward(right)(**batch(rows)) == pytest.approx([-0.01, 0.0, -0.03, -0.015, -0.015])


@given(rows=ROWS)
def test_terms_agree_with_a_loop(batch, rows):
    terms = ShorterBetterReward(right, beta=0.1)(**batch(rows))
    for (prompt, tokens, _), term in zip(rows, terms, strict=True):
        lengths = np.array([row[1] for row in rows if row[0] == prompt])
        correct = np.array([row[2] for row in rows if row[0] == prompt])
        optimal = np.where(correct, lengths, np.inf).min() if correct.any() else lengths.mean()
        assert term == pytest.approx(-0.1 * abs(tokens - optimal))


def test_settings_are_checked():
    with pytest.raises(
        ValueError, match=r"beta is -0.1, but must be a finite number of at least 0: a penalty per token"
    ):
        ShorterBetterReward(right, beta=-0.1)
