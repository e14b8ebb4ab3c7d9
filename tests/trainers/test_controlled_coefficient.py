"""The coefficient under a controller, inside the trainer."""

import math

import pytest
import torch

from lenvm_rl.length_controller import INTEGRAL_BATCHES
from lenvm_rl.trainers.grpo import LenVMGRPOConfig


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_the_coefficient_follows_the_lengths_that_were_sampled(train, critic_folder):
    trainer = train(
        length_critic=critic_folder,
        length_controller="tokens",
        length_controller_target=2.0,
        length_controller_rate=0.5,
        length_controller_smoothing=0.0,
        length_controller_warmup=1,
        max_steps=4,
    )
    tokens, found = logged(trainer, "length/tokens"), logged(trainer, "length/coef")
    # the first batch changes nothing, and what the second one says is for the third: a quarter of the training is done
    # then, and half of the way to the target; what it lags behind is not summed up
    excess = [math.log(tokens[1] / math.sqrt(tokens[0] * 2.0)), math.log(tokens[2] / 2.0)]
    summed = 0.5 * min(excess[0], 0.0) / INTEGRAL_BATCHES
    expected = [1.0, 1.0, 0.5 * excess[0], 0.5 * excess[1] + summed]
    assert found == pytest.approx(expected) and found[3] > 0.0


def test_evaluation_leaves_the_controller_alone(train, critic_folder, prompts):
    options = {"length_critic": critic_folder, "length_controller": "accuracy", "length_controller_warmup": 1}
    plain = train(**options)
    evaluated = train(**options, eval_strategy="steps", eval_steps=1, eval_dataset=prompts(4), num_generations_eval=4)
    seen = evaluated.length_controller.state_dict()["batches"]
    assert seen == plain.length_controller.state_dict()["batches"] == 2


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_schedule_falls_to_its_end(train, critic_folder, kind):
    trainer = train(length_critic=critic_folder, length_controller=kind, length_coef=2.0, max_steps=4)
    coefficients = logged(trainer, "length/coef")
    assert coefficients[0] == 2.0 and coefficients == sorted(coefficients, reverse=True)
    assert coefficients[2] == pytest.approx(1.0)


def test_a_resumed_run_goes_on_with_its_coefficient(train, critic_folder, tmp_path):
    options = {
        "length_critic": critic_folder,
        "length_controller": "tokens",
        "length_controller_target": 3.0,
        "length_controller_warmup": 1,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = train(**options)
    resumed = train(**options, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.length_controller.state_dict() == whole.length_controller.state_dict()
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_controller_needs_a_coefficient_to_start_from(tiny_run, tmp_path):
    with pytest.raises(ValueError, match="starts from length_coef, which is 0"):
        LenVMGRPOConfig(str(tmp_path), length_coef=0.0, length_controller="accuracy", **tiny_run)
    with pytest.raises(ValueError, match="needs the mean length to reach"):
        LenVMGRPOConfig(str(tmp_path), length_controller="tokens", **tiny_run)
    limit = tiny_run.get("max_completion_length", 512)
    with pytest.raises(ValueError, match="lies beyond max_completion_length"):
        LenVMGRPOConfig(str(tmp_path), length_controller="tokens", length_controller_target=limit + 1.0, **tiny_run)
