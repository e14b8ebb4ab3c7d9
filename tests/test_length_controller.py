import json
import math
import random

import pytest

from lenvm_rl.length_controller import DUE, INTEGRAL_BATCHES, ControllerSettings, LengthController, scheduled


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


class StickyPolicy:
    """The coefficient sets the change of its length, against a drift of its own."""

    def __init__(self, seed=0, learning_rate=0.04):
        self.rng, self.rate, self.log_tokens = random.Random(seed), learning_rate, math.log(56.0)

    def step(self, coef):
        self.log_tokens = max(self.log_tokens + self.rate * (0.25 - coef), math.log(20.0))
        return 0.9, self.tokens * math.exp(self.rng.gauss(0.0, 0.1))

    @property
    def tokens(self):
        return math.exp(self.log_tokens)


@pytest.mark.parametrize("start", [0.1, 10.0])
@pytest.mark.parametrize("target", [25.0, 40.0, 70.0])
@pytest.mark.parametrize("learning_rate", [0.01, 0.04, 0.1])
def test_a_mean_length_is_reached_and_held_from_both_sides(target, start, learning_rate):
    controller = LengthController(ControllerSettings("tokens", target=target), start)
    policy, lengths = StickyPolicy(learning_rate=learning_rate), []
    for _ in range(300):
        controller.observe(*policy.step(controller.coef))
        lengths.append(policy.tokens)
    assert lengths[-100:] == pytest.approx([target] * 100, rel=0.1)


def test_a_batch_without_a_verdict_says_nothing():
    controller = LengthController(ControllerSettings("accuracy", warmup=2), 1.0)
    for accuracy in (0.5, math.nan, 0.5, math.nan, 0.5):
        controller.observe(accuracy, 50.0)
    assert controller.measured == pytest.approx(0.5) and controller.target == pytest.approx(0.49)


@pytest.mark.parametrize(
    "settings", [ControllerSettings("accuracy", target=0.5), ControllerSettings("tokens", target=9.0)]
)
def test_it_waits_while_the_critic_is_not_trusted(settings):
    controller = LengthController(settings, 1.0)
    for _ in range(40):
        controller.trust = 0.0
        controller.observe(0.9, 50.0)
    # "tokens" answers to the present excess, but has not summed it up
    assert controller.coef == pytest.approx(1.0 if settings.kind == "accuracy" else 3.0 * math.log(50.0 / 9.0))


def test_the_state_of_another_controller_is_refused():
    state = LengthController(ControllerSettings("accuracy"), 1.0).state_dict()
    with pytest.raises(ValueError, match="was under length_controller='accuracy', this run's is under 'tokens'"):
        LengthController(ControllerSettings("tokens", target=9.0), 1.0).load_state_dict(state)


def test_a_length_is_regulated_in_proportion_to_its_logarithm_and_to_the_sum_of_it():
    controller = LengthController(ControllerSettings("tokens", target=40.0, rate=2.0, smoothing=0.0, warmup=1), 1.0)
    seen = []
    for tokens in (50.0, 40.0 * math.e, 40.0 * math.e, 40.0 / math.e, 0.0):
        controller.observe(0.9, tokens)
        seen.append(controller.coef)
    assert seen[0] == 1.0
    assert seen[1:4] == pytest.approx([2.0, 2.0 + 2.0 / INTEGRAL_BATCHES, -2.0 + 4.0 / INTEGRAL_BATCHES])
    assert -10.0 <= seen[4] < -7.0, "a mean of no tokens counts as one"


@pytest.mark.parametrize("start", [80.0, 20.0])
def test_a_length_is_led_evenly_to_its_target_in_half_of_the_training(start):
    controller = LengthController(ControllerSettings("tokens", target=40.0, smoothing=0.0, warmup=1), 1.0)
    controller.observe(0.9, start, progress=0.0)
    for progress, due in ((0.0, start), (DUE / 2, math.sqrt(start * 40.0)), (DUE, 40.0), (1.0, 40.0)):
        controller.observe(0.9, due, progress)
        assert controller.coef == pytest.approx(0.0, abs=1e-12)


def test_lagging_behind_is_summed_up_once_the_target_is_due():
    controller = LengthController(ControllerSettings("tokens", target=40.0, smoothing=0.0, warmup=1), 1.0)
    controller.observe(0.9, 80.0, progress=0.0)
    for progress in (0.1, 0.2, 0.3, 0.4):
        controller.observe(0.9, 80.0, progress)
        assert controller.coef == pytest.approx(3.0 * math.log(2.0) * progress / DUE)
    coefs = []
    for progress in (DUE, 0.6, 0.7):
        controller.observe(0.9, 80.0, progress)
        coefs.append(controller.coef)
    assert coefs == pytest.approx([3.0 * math.log(2.0) * (1.0 + batches / INTEGRAL_BATCHES) for batches in range(3)])


def test_what_is_shorter_than_due_is_summed_up_at_once():
    controller = LengthController(ControllerSettings("tokens", target=40.0, smoothing=0.0, warmup=1), 1.0)
    controller.observe(0.9, 80.0, progress=0.0)
    excess, coefs = math.log(30.0 / math.sqrt(80.0 * 40.0)), []
    for _ in range(3):
        controller.observe(0.9, 30.0, progress=DUE / 2)
        coefs.append(controller.coef)
    assert coefs == pytest.approx([3.0 * excess * (1.0 + batches / INTEGRAL_BATCHES) for batches in range(3)])


class OneWayPolicy(StickyPolicy):
    """Answers late, and hardly comes back once it has become short."""

    def __init__(self, delay=8, **options):
        super().__init__(**options)
        self.queue = [0.0] * delay

    def step(self, coef):
        self.queue.append(coef)
        late = self.queue.pop(0)
        return super().step(late if late > 0.25 else 0.25 + (late - 0.25) / 20)


def test_a_policy_that_does_not_come_back_is_not_driven_past_its_target():
    controller, policy = LengthController(ControllerSettings("tokens", target=30.0), 0.1), OneWayPolicy()
    for step in range(100):
        controller.observe(*policy.step(controller.coef), progress=step / 100)
    assert policy.tokens == pytest.approx(30.0, rel=0.1)


def test_the_sum_does_not_grow_while_the_coefficient_is_at_its_bound():
    controller = LengthController(ControllerSettings("tokens", target=10.0, smoothing=0.0, warmup=1, high=2.0), 1.0)
    for _ in range(200):
        controller.observe(0.9, 100.0)
    assert controller.coef == 2.0
    controller.observe(0.9, 9.0)
    assert controller.coef < 0.0


def test_a_policy_below_a_target_that_is_due_is_left_alone_until_it_is_above():
    controller = LengthController(ControllerSettings("accuracy", target=0.9), 1.0)
    for accuracy in [0.6] * 100:
        controller.observe(accuracy, 50.0)
    assert controller.coef == 0.05
    for accuracy in [0.99] * 100:
        controller.observe(accuracy, 50.0)
    assert controller.coef > 1.0


def test_a_target_above_the_start_rises_to_it_in_the_course_of_training():
    controller = LengthController(ControllerSettings("accuracy", target=0.9, warmup=1, margin=0.0, smoothing=0.0), 1.0)
    controller.observe(0.5, 50.0, progress=0.0)
    for progress, required in ((0.25, 0.525), (0.5, 0.6), (1.0, 0.9)):
        before = controller.coef
        controller.observe(required, 50.0, progress)
        assert controller.coef == pytest.approx(before)
        controller.observe(required + 0.01, 50.0, progress)
        assert controller.coef > before


def test_a_target_below_the_start_is_required_at_once():
    controller = LengthController(ControllerSettings("accuracy", target=0.7, warmup=1, smoothing=0.0), 1.0)
    controller.observe(0.9, 50.0, progress=0.0)
    controller.observe(0.7, 50.0, progress=0.01)
    assert controller.coef == pytest.approx(1.0)


def test_a_policy_that_stops_learning_below_its_target_is_relieved():
    controller = LengthController(ControllerSettings("accuracy", target=0.9, warmup=1), 1.0)
    sizes = []
    for step in range(100):
        controller.observe(0.6 + 0.1 * min(step / 20, 1), 50.0, progress=step / 100)
        sizes.append(controller.coef)
    assert sizes[30] > 1.0 and sizes[-1] == 0.05


def test_without_a_target_it_is_the_start_minus_its_standard_error_and_the_margin():
    controller = LengthController(ControllerSettings("accuracy", warmup=4, margin=0.02), 1.0)
    for accuracy in (0.5, 0.7, 0.6, 0.6):
        controller.observe(accuracy, 50.0)
    assert controller.coef == 1.0 and controller.target is None
    controller.observe(0.6, 50.0)
    # four batches with a standard deviation of sqrt((0.1^2 + 0.1^2) / 3)
    assert controller.target == pytest.approx(0.6 - math.sqrt(0.02 / 3) / 2 - 0.02)


def test_one_step_is_that_of_dual_ascent():
    controller = LengthController(ControllerSettings("accuracy", target=0.8, smoothing=0.0, warmup=1), 2.0)
    assert controller.coef == 0.0, "nothing presses while the start is measured"
    controller.observe(0.9, 50.0)
    assert controller.coef == 2.0
    controller.observe(0.9, 50.0)
    assert controller.coef == pytest.approx(2.0 * math.exp(3.0 * 0.1))


def test_a_coefficient_that_lengthens_keeps_its_sign():
    controller = LengthController(ControllerSettings("accuracy", target=0.8, warmup=1), -1.0)
    for _ in range(3):
        controller.observe(0.9, 30.0)
    assert controller.coef < -1.0


def test_the_mean_over_batches_is_not_biased_towards_its_start():
    controller = LengthController(ControllerSettings("tokens", target=40.0), 1.0)
    assert math.isnan(controller.measured)
    controller.observe(0.5, 30.0)
    assert controller.measured == pytest.approx(30.0)
    controller.observe(0.5, 40.0)
    assert controller.measured == pytest.approx((0.7 * 30 + 40) / 1.7)


@pytest.mark.parametrize(("kind", "target"), [("accuracy", None), ("accuracy", 0.8), ("tokens", 25.0)])
def test_it_continues_from_its_state_through_json(kind, target):
    settings = ControllerSettings(kind, target=target, warmup=3)
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


@pytest.mark.parametrize(
    "coef, message", [(0.0, "means a run without any length signal"), (50.0, "beyond its bounds"), (0.01, "beyond")]
)
def test_a_start_that_it_could_not_go_on_from_is_refused(coef, message):
    with pytest.raises(ValueError, match=message):
        LengthController(ControllerSettings("accuracy", target=0.9), coef)
