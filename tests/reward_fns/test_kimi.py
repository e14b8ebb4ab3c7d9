from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_fns import KimiLengthReward

ROWS = st.lists(st.tuples(st.sampled_from("pqr"), st.integers(1, 40), st.booleans()), max_size=20)


def right(completions, **_):
    return [float(completion == "right") for completion in completions]


def test_terms_by_hand(batch):
    rows = [("p", 10, True), ("p", 20, True), ("p", 30, False), ("p", 15, False), ("q", 9, True), ("q", 9, False)]
    assert KimiLengthReward(right)(**batch(rows)) == [0.5, 0.0, -0.5, 0.0, 0.0, 0.0]
    assert KimiLengthReward(right, weight=0.4)(**batch(rows))[:3] == pytest.approx([0.2, 0.0, -0.2])


@given(rows=ROWS)
def test_terms_agree_with_a_loop(batch, rows):
    terms = KimiLengthReward(right)(**batch(rows))
    for (prompt, tokens, correct), term in zip(rows, terms, strict=True):
        lengths = np.array([row[1] for row in rows if row[0] == prompt])
        expected = 0.0
        if np.ptp(lengths):
            expected = (lengths.max() - tokens) / np.ptp(lengths) - 0.5
            expected = expected if correct else np.minimum(expected, 0)
        assert term == pytest.approx(expected)


def test_warm_up_has_no_length_term(batch):
    reward, inputs = KimiLengthReward(right, warmup_steps=10), batch([("p", 1, True), ("p", 3, True)])
    assert reward(**inputs, trainer_state=SimpleNamespace(global_step=9)) == [0.0, 0.0]
    assert reward(**inputs, trainer_state=SimpleNamespace(global_step=10)) == [0.5, -0.5]
    with pytest.raises(ValueError, match="warmup_steps depends on the training step, but trainer_state is missing"):
        reward(**inputs)


@pytest.mark.parametrize("settings", [{"weight": -1}, {"weight": float("nan")}, {"warmup_steps": -1}])
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} is .*, but must be"):
        KimiLengthReward(right, **settings)
