"""What needs no launch; the recipe samples from a sharded policy in tests/recipes/test_grpo_lenvm.py."""

import pytest
import torch

from lenvm_rl.trainers.whole_policy import whole_policy


def test_it_is_the_policy_itself_before_and_after_training(train):
    trainer = train(length_coef=0.0, max_steps=1)
    trainer.model.train()
    with whole_policy(trainer) as policy:
        assert policy is trainer.accelerator.unwrap_model(trainer.model)
        assert policy.training and policy.device == trainer.accelerator.device
    trainer.model_wrapped = trainer.model
    with whole_policy(trainer) as policy:
        assert policy is trainer.model


def test_gradient_checkpointing_rests_meanwhile(train):
    trainer = train(length_coef=0.0, max_steps=1, gradient_checkpointing=True)
    assert trainer.model.is_gradient_checkpointing
    with whole_policy(trainer) as policy:
        assert not policy.is_gradient_checkpointing
    assert trainer.model.is_gradient_checkpointing


def test_a_policy_that_nothing_would_gather_is_refused(train, monkeypatch):
    trainer = train(length_coef=0.0, max_steps=1, ds3_gather_for_generation=False)
    with whole_policy(trainer):  # nothing is sharded
        pass
    monkeypatch.setattr(torch.nn.Parameter, "ds_id", 0, raising=False)
    trainer.model_wrapped = trainer.model
    with pytest.raises(ValueError, match="set evaluate_before=False, or ds3_gather_for_generation=True"):
        whole_policy(trainer).__enter__()
