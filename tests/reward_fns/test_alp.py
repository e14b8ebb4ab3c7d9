import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_fns import ALPReward

ROWS = st.lists(st.tuples(st.sampled_from("pqr"), st.integers(1, 40), st.booleans()), max_size=20)


def right(completions, **_):
    return [float(completion == "right") for completion in completions]


def test_terms_by_hand(batch):
    rows = [("p", 10, True), ("p", 20, True), ("p", 40, False), ("p", 80, False), ("q", 10, False), ("q", 20, False)]
    terms = ALPReward(right, beta=0.01)(**batch(rows))
    assert terms == pytest.approx([-0.05, -0.1, -0.2, -0.4, -0.05, -0.1])


@given(rows=ROWS)
def test_terms_agree_with_a_loop(batch, rows):
    terms = ALPReward(right)(**batch(rows))
    for (prompt, tokens, _), term in zip(rows, terms, strict=True):
        correct = np.array([row[2] for row in rows if row[0] == prompt])
        assert term == pytest.approx(-1e-7 * tokens * np.maximum(correct.mean(), 1 / len(correct)))


def test_settings_are_checked():
    with pytest.raises(
        ValueError, match=r"beta is nan, but must be a finite number of at least 0: a penalty per token"
    ):
        ALPReward(right, beta=float("nan"))
