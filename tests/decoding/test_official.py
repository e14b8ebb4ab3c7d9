import math

import pytest
import torch
from torch.testing import assert_close

from lenvm_rl.decoding import OFFICIAL_MODES, Candidates, LengthTarget, LengthTilt, SoftTarget, official_control
from lenvm_rl.decoding.steering import reweight

PROBS, VALUES = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.0, 0.5, 0.8])
MEAN = 0.31  # 0.3 * 0.5 + 0.2 * 0.8


def mean_under(control):
    logits = torch.logit(VALUES)[None]
    given = Candidates(
        log_probs=PROBS.log()[None],
        logits=logits,
        present=torch.ones(1, 3, dtype=torch.bool),
        is_end=torch.tensor([[True, False, False]]),
        generated=torch.tensor([0]),
        gamma=0.9,
    )
    return (reweight(given, [control]).softmax(1)[0] * VALUES).sum().item()


@pytest.mark.parametrize(
    ("mode", "scale", "mean"),
    [
        ("mul", 0.5, 0.155),
        ("mul", 2.0, 0.62),
        ("mul", 5.0, 0.8),  # beyond the longest candidate: the longest
        ("mul", 0.0, 0.0),
        ("linear", 1.5, 0.31 + 0.5 * (0.8 - 0.31)),
        ("linear", 0.5, 0.155),
        ("exp", 2.0, 0.8 * (1 - (1 - 0.3875) ** 2)),
        ("exp", 0.5, 0.8 * (1 - (1 - 0.3875) ** 0.5)),
        ("length_mul", 2.0, 1 - 0.69**2),
        ("length_mul", 0.5, 1 - 0.69**0.5),
    ],
)
def test_a_mode_moves_the_mean_value_where_its_rule_says(mode, scale, mean):
    assert_close(mean_under(official_control(mode, scale=scale)), mean, atol=1e-5, rtol=0)


def test_a_scale_of_one_is_the_base_distribution_without_the_critic():
    for mode in ("mul", "linear", "exp", "length_mul"):
        control = official_control(mode, scale=1.0)
        assert not control.needs_critic(0)
        assert_close(mean_under(control), MEAN, atol=1e-5, rtol=0)


def test_the_other_modes_are_ours():
    assert official_control("centered_exp", scale=-2.0) == LengthTilt(-2.0)
    assert official_control("eq", target_length=40) == LengthTarget(40)
    assert official_control("eq_soft", target_length=40) == SoftTarget(40, max_beta=math.inf)


@pytest.mark.parametrize(("mode", "instead"), [("value_bias", "LengthTilt"), ("le", "AtMost"), ("ge", "AtLeast")])
def test_modes_that_do_not_mean_what_they_say_are_refused(mode, instead):
    with pytest.raises(ValueError, match=f"not offered.*{instead}"):
        official_control(mode, scale=1.0)


def test_a_mode_takes_its_own_parameter():
    for mode in OFFICIAL_MODES:
        with pytest.raises(ValueError, match="takes"):
            official_control(mode)
        with pytest.raises(ValueError, match="takes"):
            official_control(mode, scale=1.0, target_length=10)
    with pytest.raises(ValueError, match="unknown mode"):
        official_control("longer", scale=1.0)
    with pytest.raises(ValueError, match="from 0 up"):
        official_control("mul", scale=-1.0)
