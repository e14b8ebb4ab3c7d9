"""What keeps the length signal from doing harm."""

import pytest

from lenvm_rl.trainers.safeguards import CollapseDetector, trust_in

NAN = float("nan")


@pytest.mark.parametrize(
    "explained, floor, trust",
    [
        (0.9, 0.2, 1.0),
        (0.2, 0.2, 1.0),
        (0.05, 0.2, 0.25),
        (0.0, 0.2, 0.0),
        (-3.0, 0.2, 0.0),
        (-3.0, 0.0, 1.0),
        (NAN, 0.2, 1.0),
    ],
)
def test_a_critic_is_trusted_as_far_as_it_explains(explained, floor, trust):
    assert trust_in(explained, floor) == pytest.approx(trust)


def shown(detector, batches):
    """The number of the batch at which the detector speaks, and what it says."""
    for number, (accuracy, tokens) in enumerate(batches):
        detector.observe(accuracy, tokens)
        if detector.verdict is not None:
            return number, detector.verdict
    return None


GOOD = [(0.8, 100.0)] * 20


def test_a_policy_that_gets_short_and_wrong_is_stopped():
    falling = [(0.8 - 0.05 * step, 100.0 - 5 * step) for step in range(1, 15)]
    number, verdict = shown(CollapseDetector(patience=5, drop=0.15), GOOD + falling)
    assert 25 < number < 34
    assert "accuracy fell from 80%" in verdict and "length_coef" in verdict


@pytest.mark.parametrize(
    "later",
    [
        [(0.8, 100.0 - 5 * step) for step in range(1, 15)],  # shorter, as right as before
        [(0.8 - 0.05 * step, 100.0 + 5 * step) for step in range(1, 15)],  # wrong, but not short
        [(0.7, 50.0)] * 30,  # a little less right
        [(0.2, 50.0)] * 3 + GOOD,  # a bad moment
    ],
    ids=["shortening", "long and wrong", "a small drop", "a bad moment"],
)
def test_nothing_else_is(later):
    assert shown(CollapseDetector(patience=5, drop=0.15), GOOD + later) is None


def test_patience_zero_never_stops():
    assert shown(CollapseDetector(patience=0, drop=0.1), GOOD + [(0.0, 1.0)] * 50) is None


def test_batches_without_a_verdict_are_left_out():
    assert shown(CollapseDetector(patience=5, drop=0.15), GOOD + [(NAN, 1.0)] * 50) is None


def test_who_goes_on_after_a_collapse_has_its_patience_once_more():
    first, second = CollapseDetector(5, 0.15), CollapseDetector(5, 0.15)
    shown(first, GOOD + [(0.0, 1.0)] * 30)
    second.load_state_dict(first.state_dict())
    number, _ = shown(second, [(0.0, 1.0)] * 30)
    assert number == 4


def test_a_resumed_detector_speaks_when_the_other_one_does():
    batches = GOOD + [(0.0, 1.0)] * 30
    whole = shown(CollapseDetector(5, 0.15), batches)
    first = CollapseDetector(5, 0.15)
    for batch in batches[:22]:
        first.observe(*batch)
    second = CollapseDetector(5, 0.15)
    second.load_state_dict(first.state_dict())
    number, verdict = shown(second, batches[22:])
    assert (number + 22, verdict) == whole
