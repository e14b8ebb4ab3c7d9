"""Shaping, targets, resolutions and safeguards inside the trainer."""

import warnings

import pytest
from torch.testing import assert_close

from lenvm_rl.length_signal import target_signal
from lenvm_rl.trainers.grpo import LenVMGRPOConfig, LenVMGRPOTrainer


class Recording(LenVMGRPOTrainer):
    """Keeps the credit that every batch of rollouts was given."""

    def _use_advantages(self, rollouts, advantages, mask):
        super()._use_advantages(rollouts, advantages, mask)
        target = self.__dict__.get("wanted")
        self.__dict__.setdefault("seen", []).append((rollouts, advantages, mask, self.credit, target))

    def _targets(self, inputs, device):
        self.wanted = super()._targets(inputs, device)
        return self.wanted


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def gates(trainer, rollouts):
    return trainer.credit.gates(rollouts.rewards[:, 0], 4)


def values_of(advantages):
    return advantages.returns - advantages.length


def test_shaping_adds_minus_the_value_to_the_normalised_task_advantage(train, critic_folder):
    trainer = train(
        Recording,
        length_critic=critic_folder,
        length_mode="shaping",
        length_gate="all",
        length_unsolved_groups=True,
        length_coef=0.7,
    )
    for _, advantages, mask, _, _ in trainer.seen:
        assert_close(advantages.total, (advantages.task - 0.7 * values_of(advantages)) * mask)


def test_invariant_settings_are_not_warned_of(train, critic_folder):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*length_mode.*")
        train(
            length_critic=critic_folder,
            length_mode="shaping",
            length_gate="all",
            length_unsolved_groups=True,
            max_steps=1,
        )


@pytest.mark.parametrize(
    "setting, condition",
    [
        ({"length_shaping_discounted": True}, "the discount"),
        ({"length_gate": "correct", "length_unsolved_groups": False}, "the gate"),
        ({"length_unsolved_groups": False}, "the gate"),
        ({"length_scale": "std"}, "the normalisation"),
        ({"length_clip": 0.1}, "the clip"),
        ({"length_resolution": "completion"}, "the resolution"),
        ({"loss_type": "grpo"}, "the loss"),
        ({"mask_truncated_completions": True}, "the mask"),
        ({"dynamic_sampling": True}, "the sampling"),
        ({"length_critic_update": "online"}, "the potential"),
        ({"length_critic": "shared"}, "the potential"),
    ],
)
def test_each_broken_condition_of_invariance_is_named(train, critic_folder, setting, condition):
    invariant = {"length_critic": critic_folder, "length_gate": "all", "length_unsolved_groups": True}
    with pytest.warns(UserWarning, match=f"breaks? a condition of invariance: {condition}"):
        train(length_mode="shaping", max_steps=1, **(invariant | setting))


def test_a_target_presses_from_both_sides(train, critic_folder):
    trainer = train(
        Recording, length_critic=critic_folder, length_target=6, length_gate="all", length_unsolved_groups=True
    )
    for _, advantages, mask, _, target in trainer.seen:
        gamma = trainer.length_critic.gamma
        signal = target_signal(values_of(advantages), advantages.returns, mask, target, gamma)
        assert target.tolist() == [6.0] * len(mask)
        assert_close(advantages.total, (advantages.task + signal) * mask)


@pytest.mark.parametrize("sampling", [{}, {"dynamic_sampling": True, "max_resample_rounds": 1}])
def test_every_prompt_may_have_a_target_of_its_own(train, critic_folder, prompts, sampling):
    data = prompts().map(lambda row: {"wanted": 3 + row["number"] % 5})
    trainer = train(
        Recording, length_critic=critic_folder, length_target_column="wanted", train_dataset=data, **sampling
    )
    for rollouts, *_, target in trainer.seen:
        assert all(len(set(group.tolist())) == 1 for group in target.view(-1, 4))
        assert "length_target" not in rollouts.batch


def test_a_prompt_without_a_usable_target_is_named(train, critic_folder, prompts):
    data = prompts().map(lambda row: {"wanted": 0})
    with pytest.raises(ValueError, match="A prompt's wanted=0 is no length"):
        train(length_critic=critic_folder, length_target_column="wanted", train_dataset=data)
    with pytest.raises(ValueError, match="length_target_column='goal' is no column of the dataset, which has prompt"):
        train(length_critic=critic_folder, length_target_column="goal")


def test_the_batch_resolution_says_nothing_of_length(train, critic_folder):
    trainer = train(Recording, length_critic=critic_folder, length_resolution="batch")
    for rollouts, advantages, mask, _, _ in trainer.seen:
        part = (advantages.total - advantages.task) * mask
        felt = part[mask & (gates(trainer, rollouts) > 0)[:, None]]
        assert felt.numel() > 1 and felt[0] != 0
        assert_close(felt, felt[:1].expand_as(felt))
        assert (part[gates(trainer, rollouts) == 0] == 0).all()


def test_a_critic_that_explains_nothing_is_not_heard(train, critic_folder, caplog):
    # the tiny critic was never trained: its explained variance is near 0 or below
    trainer = train(Recording, length_critic=critic_folder, length_critic_trust=0.9, length_coef=2.0)
    trusted = logged(trainer, "length/trust")
    assert all(trust < 0.2 for trust in trusted)
    for (rollouts, advantages, mask, credit, _), trust in zip(trainer.seen, trusted, strict=True):
        assert credit.coef == pytest.approx(2.0 * trust)
        signal = 2.0 * trust * gates(trainer, rollouts)[:, None] * advantages.length
        assert_close(advantages.total, (advantages.task + signal) * mask)
    assert caplog.text.count("the length signal is scaled by") == 1
    trusting = train(length_critic=critic_folder, length_critic_trust=0.0)
    assert logged(trusting, "length/trust") == [1.0, 1.0]


def test_the_spread_that_is_logged_is_that_of_the_signal(train, critic_folder):
    options = {"length_critic": critic_folder, "length_gate": "all", "length_unsolved_groups": True, "max_steps": 1}
    trainer = train(Recording, length_target=6, **options)
    _, advantages, mask, _, _ = trainer.seen[0]
    signal = (advantages.total - advantages.task)[mask]
    assert logged(trainer, "length/advantage_std") == [pytest.approx(signal.std(correction=0).item(), rel=1e-4)]


def test_completions_without_a_verdict_are_neither_right_nor_wrong(train, critic_folder):
    def half_is_unknown(completions, **_):
        return [1.0 if place % 2 else None for place in range(len(completions))]

    trainer = train(length_critic=critic_folder, reward_funcs=half_is_unknown, length_controller="accuracy")
    assert logged(trainer, "length/correct_rate") == [1.0, 1.0]
    assert trainer.length_controller.measured == pytest.approx(1.0)


def test_a_collapse_ends_training_with_a_checkpoint(train, critic_folder, tmp_path, caplog):
    calls = []

    def ever_worse(completions, **_):
        calls.append(None)
        return [float(len(calls) < 16)] * len(completions)

    class Shortening(LenVMGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            self.generation_config.max_new_tokens = max(12 - len(calls) // 2, 2)
            return super()._generate_and_score_completions(inputs)

    trainer = train(
        Shortening,
        reward_funcs=ever_worse,
        length_critic=critic_folder,
        length_collapse_patience=3,
        max_steps=60,
        save_strategy="steps",
        save_steps=1000,
    )
    stopped = trainer.state.global_step
    assert 18 < stopped < 40
    assert (tmp_path / "run" / f"checkpoint-{stopped}").is_dir()
    assert "The policy is collapsing" in caplog.text


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"length_target": 5, "length_target_column": "n"}, "both say how long"),
        ({"length_target": 500}, "length_target=500 lies beyond max_completion_length=12"),
        ({"length_target": -3}, "length_target=-3 is no length"),
        ({"length_target": 5, "length_controller": "tokens", "length_controller_target": 4}, "choose one of the two"),
        ({"length_critic_update": "sometimes"}, "must be one of frozen, online, refresh, got 'sometimes'"),
        ({"length_critic": "shared", "length_critic_update": "refresh"}, "nothing to refresh"),
        ({"length_critic": None, "length_coef": 0, "length_critic_update": "online"}, "updates nothing"),
        ({"length_critic_steps": 0}, "length_critic_steps=0 is out of range"),
        ({"length_critic_learning_rate": 0.0}, "length_critic_learning_rate=0.0 is out of range"),
        ({"length_critic_trust": 1.0}, "length_critic_trust=1.0 is out of range"),
        ({"length_collapse_drop": 0.0}, "length_collapse_drop=0.0 is out of range"),
        ({"length_target": 5, "length_controller": "linear", "length_controller_end": -1.0}, "press away"),
        ({"length_mode": "shaping", "length_controller": "accuracy"}, "does not shorten"),
        ({"length_controller_target": 0.9}, "has an effect only where length_controller is 'accuracy' or 'tokens'"),
        ({"length_controller_end": 0.5}, "has an effect only where length_controller is 'linear' or 'cosine'"),
        ({"length_unsolved_groups": True}, "has an effect only where length_gate is 'all'"),
        ({"length_critic_steps": 2}, "has an effect only where the critic learns"),
        ({"length_critic_refresh_window": 2}, "has an effect only where length_critic_update is 'refresh'"),
        ({"length_coef": 50.0, "length_controller": "accuracy"}, "length_coef=50.0, which lies beyond its bounds"),
        ({"length_coef": -20.0, "length_controller": "tokens", "length_controller_target": 6}, "beyond its bounds"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, tiny_run, setting, message):
    with pytest.raises(ValueError, match=message):
        LenVMGRPOConfig(str(tmp_path), **({"length_critic": "somewhere"} | tiny_run | setting))
