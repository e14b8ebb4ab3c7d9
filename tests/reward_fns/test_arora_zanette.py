import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_fns import AroraZanetteReward
from reward_fns.arora_zanette import sigmoid_of_z_scores

ROWS = st.lists(st.tuples(st.sampled_from("pqr"), st.integers(1, 40), st.booleans()), max_size=20)


def right(completions, **_):
    return [float(completion == "right") for completion in completions]


def test_terms_by_hand(batch):
    # z = -1 and 1: sigmoid 0.26894 and 0.73106; the wrong one is no part of mean and deviation
    rows = [("p", 10, True), ("p", 30, True), ("p", 500, False), ("q", 8, True)]
    terms = AroraZanetteReward(right, alpha=0.4)(**batch(rows))
    assert terms == pytest.approx([-0.107576, -0.292424, 0.0, -0.2], abs=1e-6)


def test_cut_completion_loses_its_correctness_and_leaves_the_statistics(batch):
    rows = [("p", 10, True), ("p", 30, True), ("p", 500, True), ("p", 500, False)]
    terms = AroraZanetteReward(right, alpha=0.4, eos_token_ids=1)(**batch(rows, cut=[2, 3]))
    assert terms == pytest.approx([-0.107576, -0.292424, -1.0, 0.0], abs=1e-6)


@given(rows=ROWS, alpha=st.sampled_from([0.0, 0.1, 1.0]))
def test_terms_agree_with_a_loop(batch, rows, alpha):
    terms = AroraZanetteReward(right, alpha=alpha)(**batch(rows))
    for (prompt, tokens, correct), term in zip(rows, terms, strict=True):
        lengths = [row[1] for row in rows if row[0] == prompt and row[2]]
        z = (tokens - np.mean(lengths)) / (np.std(lengths) + 1e-7) if correct else 0.0
        assert term == pytest.approx(-alpha / (1 + np.exp(-z)) if correct else 0.0)


@given(st.lists(st.integers(1, 10**6), max_size=30))
def test_shares_rise_with_length_and_never_overflow(lengths):
    shares = sigmoid_of_z_scores(lengths)
    assert all(0 < share < 1 for share in shares)
    assert sorted(shares) == [share for _, share in sorted(zip(lengths, shares, strict=True))]


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("inf")])
def test_settings_are_checked(alpha):
    with pytest.raises(ValueError, match=r"alpha is .*, but must be a finite number from 0 to 1"):
        AroraZanetteReward(right, alpha=alpha)
