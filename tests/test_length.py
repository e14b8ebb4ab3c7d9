import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from lenvm_rl.length import (
    check_gamma,
    gamma_from_horizon,
    logit_to_remaining,
    remaining_to_value,
    value_to_remaining,
)

gammas = st.floats(0.5, 0.99999)
# within the horizon: past it 1 + V underflows and no length can come back
horizons = st.floats(0.0, 1.0)


def test_values_of_the_worked_example():
    # spec.md section 2: gamma 0.9, four tokens
    remaining = torch.tensor([4, 3, 2, 1, 0])
    assert_close(remaining_to_value(remaining, 0.9), torch.tensor([-0.3439, -0.271, -0.19, -0.1, 0.0]))
    assert remaining_to_value(4.0, 0.9) == pytest.approx(-0.3439, abs=1e-15)


@pytest.mark.parametrize(("tokens", "gamma"), [(1533, 0.9970005), (4603, 0.9990000), (23024, 0.9998000)])
def test_gamma_of_the_published_horizons(tokens, gamma):
    assert gamma_from_horizon(tokens) == pytest.approx(gamma, abs=5e-8)
    assert 1.0 - gamma_from_horizon(tokens) ** tokens == pytest.approx(0.99)


def test_half_of_the_value_is_used_up_after_231_tokens():
    gamma = gamma_from_horizon(1533)
    assert value_to_remaining(-0.5, gamma) == pytest.approx(230.74, abs=0.01)
    assert logit_to_remaining(0.0, gamma) == pytest.approx(230.74, abs=0.01)


@given(st.floats(1.0, 1e6), st.floats(0.01, 0.999))
def test_gamma_spends_the_asked_mass_over_the_horizon(length, mass):
    gamma = gamma_from_horizon(length, mass)
    assert -remaining_to_value(length, gamma) == pytest.approx(mass, rel=1e-6)


@given(gammas, horizons)
def test_length_survives_the_round_trip_through_the_value(gamma, share):
    remaining = share * math.log(1e-3) / math.log(gamma)
    assert value_to_remaining(remaining_to_value(remaining, gamma), gamma) == pytest.approx(remaining, rel=1e-9)


@given(gammas, st.floats(-20.0, 8.0))
def test_logit_and_value_stand_for_the_same_length(gamma, logit):
    value = -1.0 / (1.0 + math.exp(-logit))
    assert logit_to_remaining(logit, gamma) == pytest.approx(value_to_remaining(value, gamma), rel=1e-9)


@given(gammas, horizons, horizons)
def test_a_longer_remainder_has_a_lower_value(gamma, one, other):
    shorter, longer = sorted(share * math.log(1e-3) / math.log(gamma) for share in (one, other))
    assert -1.0 <= remaining_to_value(longer, gamma) <= remaining_to_value(shorter, gamma) <= 0.0


@given(gammas, st.floats(-30.0, 300.0), st.floats(1e-3, 10.0))
def test_a_larger_logit_is_a_longer_remainder(gamma, logit, step):
    assert logit_to_remaining(logit + step, gamma) > logit_to_remaining(logit, gamma)


@given(gammas, st.lists(st.floats(-30.0, 30.0), min_size=1, max_size=8))
def test_a_tensor_gives_what_its_numbers_give(gamma, logits):
    for function, numbers in (
        (logit_to_remaining, logits),
        (value_to_remaining, [-1.0 / (1.0 + math.exp(-z)) for z in logits]),
        (remaining_to_value, [abs(z) for z in logits]),
    ):
        expected = torch.tensor([function(x, gamma) for x in numbers], dtype=torch.float64)
        assert_close(function(torch.tensor(numbers, dtype=torch.float64), gamma), expected, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 5), (2, 1, 3)])
@pytest.mark.parametrize("function", [remaining_to_value, value_to_remaining, logit_to_remaining])
def test_the_shape_is_kept(function, shape):
    assert function(torch.zeros(shape), 0.99).shape == shape


def test_float32_keeps_seven_digits_next_to_gamma_one():
    # 1 - gamma^l written out would keep two of them
    gamma = gamma_from_horizon(1e6)
    value = remaining_to_value(torch.tensor([1.0]), gamma)
    assert_close(value, torch.tensor([-4.6051595812e-06]), rtol=1e-6, atol=0.0)
    assert_close(value_to_remaining(value, gamma), torch.tensor([1.0]), rtol=1e-6, atol=0.0)
    assert_close(logit_to_remaining(torch.tensor([-12.0]), gamma), torch.tensor([1.3341983]), rtol=1e-5, atol=0.0)


def test_long_remainders_survive_in_the_logit_where_the_value_saturates():
    assert value_to_remaining(-torch.sigmoid(torch.tensor([20.0])), 0.9).isinf().all()
    assert_close(logit_to_remaining(torch.tensor([20.0]), 0.9), torch.tensor([189.8244]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.int32])
def test_narrow_and_integer_tensors_are_computed_in_float32(dtype):
    assert remaining_to_value(torch.tensor([1, 300], dtype=dtype), 0.997).dtype == torch.float32
    assert logit_to_remaining(torch.tensor([1, 3], dtype=dtype), 0.997).dtype == torch.float32


def test_the_ends_of_the_range():
    assert remaining_to_value(math.inf, 0.9) == -1.0
    assert value_to_remaining(-1.0, 0.9) == math.inf
    assert math.isnan(value_to_remaining(-1.5, 0.9))
    assert logit_to_remaining(-math.inf, 0.9) == 0.0
    assert str(value_to_remaining(0.0, 0.9)) == "0.0"  # not "-0.0"


def test_gradients_flow():
    logit = torch.tensor([0.0], requires_grad=True)
    logit_to_remaining(logit, 0.9).sum().backward()
    assert_close(logit.grad, torch.tensor([0.5 / 0.1053605]))


@pytest.mark.parametrize("gamma", [0.0, 1.0, -0.1, 1.5, math.nan, math.inf, None, "much"])
@pytest.mark.parametrize("function", [remaining_to_value, value_to_remaining, logit_to_remaining])
def test_a_gamma_outside_the_open_interval_is_refused(function, gamma):
    with pytest.raises(ValueError, match="gamma_from_horizon"):
        function(torch.zeros(2), gamma)


def test_the_message_names_the_option():
    with pytest.raises(ValueError, match=r"length_gamma must lie in the open interval \(0, 1\), got 1.0"):
        check_gamma(1.0, name="length_gamma")
    assert check_gamma(0.997) == 0.997


@pytest.mark.parametrize(
    ("length", "mass"), [(0.5, 0.99), (-3, 0.99), (math.inf, 0.99), (math.nan, 0.99), (100, 0.0), (100, 1.0)]
)
def test_a_horizon_that_means_nothing_is_refused(length, mass):
    with pytest.raises(ValueError, match=r"horizon|mass"):
        gamma_from_horizon(length, mass)
