import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lenvm_rl.evaluation.prompt_scores import first_token_entropy, linear_prediction, noise_floor, prompt_scores

GAMMA = 0.9


def test_the_error_at_the_prompt_is_that_of_the_paper():
    # LenVM eq. 13-15, by hand: prompts of (2, 4) and (3,) tokens, predicted at lengths 3 and 6
    lengths, groups = np.array([2, 3, 4]), np.array([7, 1, 7])
    values = np.array([0.9**3 - 1, 0.9**6 - 1, 0.9**3 - 1])
    scores = prompt_scores(values, lengths, groups, GAMMA)
    true = math.log((0.9**2 + 0.9**4) / 2) / math.log(0.9)
    assert scores.relative_error == pytest.approx(
        ((3 - true) / true * -1 + 1.0) / 2 if true > 3 else ((3 - true) / true + 1.0) / 2
    )
    g = np.array([0.9**2 - 1, 0.9**3 - 1, 0.9**4 - 1])
    assert scores.explained_variance == pytest.approx(1 - np.var(g - values) / np.var(g))
    assert (scores.prompts, scores.completions) == (2, 3)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 16])
def test_a_critic_that_knows_the_truth_scores_the_noise_floor(count):
    rng = np.random.default_rng(count)
    stop = rng.uniform(0.03, 0.3, 4000)  # prompts whose completions end with these probabilities at each token
    groups = np.repeat(np.arange(4000), count)
    lengths = rng.geometric(stop[groups])
    known = -(1 - GAMMA) / (1 - GAMMA * (1 - stop))
    order = rng.permutation(len(groups))
    scores = prompt_scores(known[groups][order], lengths[order], groups[order], GAMMA)
    # a difference of few lengths is not distributed as a mean of all: the floor is an estimate
    assert scores.noise_floor == pytest.approx(scores.relative_error, rel=0.15)


def test_one_completion_of_each_prompt_shows_no_noise():
    assert math.isnan(noise_floor(np.array([3, 5]), np.array([0, 1]), GAMMA))
    # equal ones show that there is none, and a single one says nothing
    assert noise_floor(np.array([3, 3, 5]), np.array([0, 0, 1]), GAMMA) == pytest.approx(0, abs=1e-12)


def test_a_line_through_other_prompts_predicts_new_ones():
    x = np.array([1.0, 2.0, 3.0])
    assert linear_prediction(x, -0.1 * x, np.array([1.5, 9.0])) == pytest.approx([-0.15, -0.3])  # kept in what was seen
    assert linear_prediction(np.zeros(3), -0.1 * x, np.zeros(2)) == pytest.approx([-0.2, -0.2])


def test_the_entropy_of_the_first_token_is_that_of_the_policys_distribution(policy_folder):
    policy = AutoModelForCausalLM.from_pretrained(policy_folder)
    prompts = [[5, 6, 7], [9], [20, 30, 40, 50, 60], [8, 8]]
    found = first_token_entropy(policy, prompts, temperature=0.7, batch_size=3)
    for ids, entropy in zip(prompts, found, strict=True):
        p = torch.softmax(policy(torch.tensor([ids])).logits[0, -1] / 0.7, -1)
        assert entropy == pytest.approx(-(p * p.log()).sum().item(), rel=1e-4)


def test_no_completions_have_no_scores():
    assert math.isnan(prompt_scores(*[np.zeros(0)] * 2, np.zeros(0, int), GAMMA).relative_error)
