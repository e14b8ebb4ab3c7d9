import pytest

from reward_fns.settings import check_choice, check_count, check_end_tokens, check_number


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "3", None])
def test_count_must_be_a_positive_integer(value):
    with pytest.raises(ValueError, match=f"limit is {value!r}, but must be an integer of at least 1: pass tokens"):
        check_count("limit", value, "pass tokens")


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), float("inf"), True, "1", None])
def test_number_must_be_finite_and_between_the_bounds(value):
    with pytest.raises(ValueError, match=r"weight is .*, but must be a finite number from 0 to 1: a share"):
        check_number("weight", value, "a share", at_most=1.0)


def test_number_comes_back_as_a_float():
    assert check_number("weight", 1, "") == 1.0 and type(check_number("weight", 1, "")) is float


def test_choice_lists_what_there_is():
    with pytest.raises(ValueError, match="mode is 'max', but must be one of 'min', 'mean'"):
        check_choice("mode", "max", ("min", "mean"))


@pytest.mark.parametrize("value", ["2", [], -1, True, [1, "2"], 2.0, [True]])
def test_end_tokens_must_be_token_ids(value):
    with pytest.raises(ValueError, match=r"eos_token_ids is .* pass tokenizer.eos_token_id"):
        check_end_tokens(value)


def test_end_tokens_are_one_or_several():
    assert check_end_tokens(2) == {2} and check_end_tokens([2, 3]) == {2, 3} and check_end_tokens(None) is None
