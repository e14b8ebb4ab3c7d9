import pytest

from reward_fns import o1_pruner_weight


@pytest.mark.parametrize(
    ("tokens", "correct", "expected"),
    [
        (100, True, 2.0),  # twice as short as the reference: 1, and 5 * (1 - 0.8)
        (200, True, 1.0),
        (400, True, 0.5),
        (200, False, -2.0),  # 5 * -0.8, clipped
        (20, True, 4.0),  # 9 and 1, clipped
    ],
)
def test_weights_by_hand(tokens, correct, expected):
    assert o1_pruner_weight(tokens, correct, reference_tokens=200, reference_accuracy=0.8) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": 0}, "tokens is 0, but a sample has at least its end token"),
        ({"reference_tokens": -1}, "reference_tokens is -1"),
        ({"reference_accuracy": 1.2}, "reference_accuracy is 1.2"),
        ({"alpha": -1}, "alpha is -1"),
        ({"least": 5.0}, "the bounds are 5.0 and 4.0"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        o1_pruner_weight(
            **({"tokens": 5, "correct": True, "reference_tokens": 5, "reference_accuracy": 0.5} | arguments)
        )
