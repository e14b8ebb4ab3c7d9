import json
import math
import random

import pytest

from lenvm_rl.length_controller import ControllerSettings, LengthController, scheduled


class Policy:
    """Shortens under pressure and loses accuracy by it, with a delay of some batches; so many completions are seen."""

    def __init__(self, completions=128, seed=0):
        self.rng, self.completions, self.pressure = random.Random(seed), completions, 0.0

    def step(self, coef):
        self.pressure += 0.2 * (math.log1p(max(coef, 0)) - self.pressure)
        correct = sum(self.rng.random() < self.accuracy for _ in range(self.completions))
        return correct / self.completions, self.tokens

    @property
    def accuracy(self):
        return 0.95 - 0.1 * self.pressure**2

    @property
    def tokens(self):
        return 20 + 40 * math.exp(-self.pressure)


def run(controller, steps=200, **options):
    policy = Policy(**options)
    for _ in range(steps):
        controller.observe(*policy.step(controller.coef))
    return policy


@pytest.mark.parametrize("start", [0.1, 1.0, 10.0])
def test_accuracy_is_kept_from_any_start(start):
    settings = ControllerSettings("accuracy", target=0.9, high=100.0)
    policy = run(LengthController(settings, start))
    assert policy.accuracy == pytest.approx(0.9, abs=0.02)
    assert policy.tokens == pytest.approx(20 + 40 * math.exp(-math.sqrt(0.5)), rel=0.1)


@pytest.mark.parametrize("start", [0.1, 10.0])
@pytest.mark.parametrize("target", [25.0, 35.0, 50.0])
def test_a_mean_length_is_reached_and_held(target, start):
    policy = run(LengthController(ControllerSettings("tokens", target=target, rate=0.3, high=100.0), start), steps=300)
    assert policy.tokens == pytest.approx(target, rel=0.1)


def test_a_policy_below_its_target_is_left_alone_until_it_is_above():
    controller = LengthController(ControllerSettings("accuracy", target=0.9), 1.0)
    for accuracy in [0.6] * 100:
        controller.observe(accuracy, 50.0)
    assert controller.coef == 0.01
    for accuracy in [0.99] * 100:
        controller.observe(accuracy, 50.0)
    assert controller.coef > 1.0


def test_without_a_target_it_is_the_start_minus_the_margin():
    controller = LengthController(ControllerSettings("accuracy", warmup=4, margin=0.02), 1.0)
    for accuracy in (0.5, 0.7, 0.6, 0.6):
        controller.observe(accuracy, 50.0)
    assert controller.coef == 1.0 and controller.target is None
    controller.observe(0.6, 50.0)
    assert controller.target == pytest.approx(0.58)


def test_one_step_is_that_of_dual_ascent():
    controller = LengthController(ControllerSettings("accuracy", target=0.8, smoothing=0.0, warmup=1), 2.0)
    controller.observe(0.9, 50.0)
    assert controller.coef == 2.0
    controller.observe(0.9, 50.0)
    assert controller.coef == pytest.approx(2.0 * math.exp(2.0 * 0.1))


def test_a_coefficient_that_lengthens_grows_where_completions_are_too_short():
    controller = LengthController(ControllerSettings("tokens", target=60.0, warmup=1, rate=1.0), -1.0)
    for _ in range(3):
        controller.observe(0.9, 30.0)
    assert controller.coef < -1.0


def test_the_mean_over_batches_is_not_biased_towards_its_start():
    controller = LengthController(ControllerSettings("tokens", target=40.0), 1.0)
    assert math.isnan(controller.measured)
    controller.observe(0.5, 30.0)
    assert controller.measured == pytest.approx(30.0)
    controller.observe(0.5, 40.0)
    assert controller.measured == pytest.approx((0.9 * 30 + 40) / 1.9)


def test_it_continues_from_its_state_through_json():
    settings = ControllerSettings("accuracy", warmup=3)
    whole, first, second = (LengthController(settings, 0.5) for _ in range(3))
    accuracies = [random.Random(i).random() for i in range(12)]
    for accuracy in accuracies:
        whole.observe(accuracy, 30.0)
    for accuracy in accuracies[:5]:
        first.observe(accuracy, 30.0)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for accuracy in accuracies[5:]:
        second.observe(accuracy, 30.0)
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize(("kind", "middle"), [("linear", 1.5), ("cosine", 1.5)])
def test_schedules_go_from_the_first_coefficient_to_the_last(kind, middle):
    settings = ControllerSettings(kind, end=1.0)
    assert scheduled(settings, 2.0, 0.0) == 2.0
    assert scheduled(settings, 2.0, 0.5) == pytest.approx(middle)
    assert scheduled(settings, 2.0, 1.0) == pytest.approx(1.0)
    assert scheduled(ControllerSettings("cosine"), 1.0, 0.25) == pytest.approx(0.5 + math.sqrt(0.5) / 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "magic"}, "length_controller must be one of"),
        ({"kind": "accuracy", "target": 90.0}, r"share of correct completions, in \(0, 1\], got 90.0"),
        ({"kind": "tokens"}, "needs the mean length to reach"),
        ({"kind": "tokens", "target": -3.0}, "needs the mean length to reach"),
        ({"rate": 0.0}, "length_controller_rate=0.0 is out of range"),
        ({"low": 2.0, "high": 1.0}, "length_controller_high=1.0 is out of range"),
        ({"warmup": 0}, "length_controller_warmup=0"),
        ({"smoothing": 1.0}, "length_controller_smoothing=1.0"),
        ({"margin": float("nan")}, "length_controller_margin=nan"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ControllerSettings(**settings)


def test_a_coefficient_of_zero_is_refused():
    with pytest.raises(ValueError, match="cannot leave 0"):
        LengthController(ControllerSettings("accuracy", target=0.9), 0.0)
