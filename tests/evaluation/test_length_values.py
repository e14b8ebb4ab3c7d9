import math
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from rollouts import rollout
from torch import tensor
from transformers import AutoModelForCausalLM

from lenvm_rl.evaluation.length_scores import LengthValueStatistics
from lenvm_rl.evaluation.length_values import evaluate_lenvm
from lenvm_rl.model import LengthValueModel
from lenvm_rl.pretraining.data import LengthValueCollator

GAMMA = 0.9


@pytest.fixture
def critic(critic_folder):
    return LengthValueModel.from_pretrained(critic_folder)


def many(prompts=12, completions=4, seed=0):
    rng = random.Random(seed)
    found = []
    for number in range(prompts):
        prompt = [rng.randint(2, 90) for _ in range(rng.randint(1, 6))]
        for sample in range(completions):
            found.append(rollout(prompt, rng.randint(1, 12), rng.random() < 0.8, seed=(number, sample)))
    return Dataset.from_list(found)


@pytest.mark.parametrize("token_budget", [20, 100_000])
def test_an_evaluation_scores_every_rollout_once_in_its_place(critic, token_budget):
    rollouts = many()
    evaluation = evaluate_lenvm(critic, rollouts, token_budget=token_budget, curves=5)
    batch = LengthValueCollator(0)(list(rollouts))
    logits = critic(batch["input_ids"]).logits
    statistics = LengthValueStatistics(critic.config.gamma)
    statistics.add(logits, batch["labels"])
    assert evaluation.scores.metrics() == pytest.approx(statistics.scores().metrics(), rel=1e-4)
    prompts = {}
    for row in rollouts:
        prompts.setdefault(tuple(row["prompt_ids"]), []).append(len(row["completion_ids"]))
    for (ids, lengths), predicted, true in zip(prompts.items(), evaluation.predicted, evaluation.true, strict=True):
        value = critic.values(tensor([ids]))[0, -1].item()
        assert predicted == pytest.approx(math.log(1 + value) / math.log(GAMMA), rel=1e-3)
        assert true == pytest.approx(math.log(np.mean([GAMMA**n for n in lengths])) / math.log(GAMMA), rel=1e-6)
    assert len(evaluation.curves) == 5
    for curve in evaluation.curves:
        alone = critic(tensor([curve.prompt_ids + curve.completion_ids])).logits[0, len(curve.prompt_ids) - 1 :]
        assert torch.from_numpy(curve.logits).allclose(alone, atol=1e-4)
        assert curve.true[0] == len(curve.completion_ids) and curve.true[-1] == 0


def test_baselines_are_fitted_to_other_prompts(critic, policy_folder):
    policy = AutoModelForCausalLM.from_pretrained(policy_folder)
    rollouts, others = many(), many(seed=1)
    evaluation = evaluate_lenvm(critic, rollouts, fit_on=others, policy=policy)
    assert list(evaluation.baselines) == ["mean length", "length of the prompt", "entropy of the first token"]
    # the mean over the other prompts, whatever is asked
    prompts = {}
    for row in others:
        prompts.setdefault(tuple(row["prompt_ids"]), []).append(GAMMA ** len(row["completion_ids"]) - 1)
    mean = np.mean([np.mean(values) for values in prompts.values()])
    length = math.log(1 + mean) / math.log(GAMMA)
    expected = np.mean(np.abs(length - evaluation.true) / evaluation.true)
    assert evaluation.baselines["mean length"].relative_error == pytest.approx(expected)
    assert list(evaluate_lenvm(critic, rollouts).baselines) == ["mean length", "length of the prompt"]
    assert evaluation.to_dict()["prompt"]["prompts"] == 12


def test_an_evaluation_leaves_the_model_as_it_was(critic):
    critic.train()
    evaluate_lenvm(critic, many(2))
    assert critic.training and all(parameter.requires_grad for parameter in critic.parameters())
