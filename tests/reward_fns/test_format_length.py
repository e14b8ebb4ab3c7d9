import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_fns import FormatLengthReward


def test_terms_by_hand(batch):
    # x = 0, p/2, p, (1 + p)/2, 1, beyond
    rows = [("p", tokens, True) for tokens in (0, 25, 50, 75, 100, 300)]
    inputs = batch(rows) | {"completions": [r"\boxed{7}"] * 6}
    assert FormatLengthReward(longest=100)(**inputs) == pytest.approx([0.0, 0.75, 1.0, 0.5, -1.0, -1.0])
    inputs["completions"] = ["no box"] * 6
    assert FormatLengthReward(longest=100)(**inputs) == pytest.approx([0.0, 0.0, 0.0, 0.0, -1.0, -1.0])


@given(tokens=st.integers(0, 400), peak=st.floats(0.05, 0.95), formatted=st.booleans())
def test_term_agrees_with_the_published_form(batch, tokens, peak, formatted):
    reward = FormatLengthReward(lambda completions, **_: [0.5 * formatted], peak=peak, longest=400)
    x = tokens / 400
    f = np.where(x <= peak, 1 - (1 - x / peak) ** 2, 1 - 2 * ((x - peak) / (1 - peak)) ** 2)
    assert reward(**batch([("p", tokens, True)])) == pytest.approx([float(f if formatted else min(0, f))])


@pytest.mark.parametrize("settings", [{"peak": 0.0}, {"peak": 1.0}, {"longest": 0}])
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} is .*, but must be"):
        FormatLengthReward(**settings)
