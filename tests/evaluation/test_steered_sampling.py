import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from lenvm_rl.decoding import AtMost, LengthTarget, LengthTilt
from lenvm_rl.evaluation.steered_sampling import EndBias, SteeredSampler, correct_completions
from lenvm_rl.model import LengthValueModel
from lenvm_rl.sampling import Completion

PROMPTS = [[5, 6, 7], [9], [20, 30, 40, 50], [8, 8]] * 8
EOS = 1


@pytest.fixture(scope="module")
def sampler(policy_folder, critic_folder, tokenizer):
    policy = AutoModelForCausalLM.from_pretrained(policy_folder)
    return SteeredSampler(
        policy, LengthValueModel.from_pretrained(critic_folder), tokenizer, 24, top_k=4, batch_size=16
    )


def test_a_tilt_of_zero_and_a_bias_of_zero_draw_what_no_steering_draws(sampler):
    plain = sampler(PROMPTS, seed=3)
    assert sampler(PROMPTS, LengthTilt(0.0), seed=3) == plain == sampler(PROMPTS, end_bias=0.0, seed=3)
    assert sampler(PROMPTS, seed=4) != plain


def test_guided_and_unguided_tokens_are_among_the_most_probable_ones(sampler):
    for controls in (None, LengthTilt(-3.0)):
        for prompt, completion in zip(PROMPTS[:4], sampler(PROMPTS[:4], controls), strict=True):
            logits = sampler.policy(torch.tensor([prompt + completion.ids])).logits[0, len(prompt) - 1 : -1]
            best = logits.topk(4, -1).indices
            assert all(token in row for token, row in zip(completion.ids, best.tolist(), strict=True))


def test_each_request_gets_its_own_control(sampler):
    controls = [LengthTarget(5), None, AtMost(3), LengthTarget(9)] * 8
    found = sampler(PROMPTS, controls)
    lengths = np.array([len(one.ids) for one in found])
    assert (lengths[2::4] <= 3).all() and (lengths[0::4] <= 5).all() and (lengths[3::4] <= 9).all()
    assert lengths[1::4].max() > 9


def test_a_bias_of_the_end_token_adds_to_its_score_alone():
    scores = torch.tensor([[1.0, 2.0, 3.0]])
    assert EndBias(2.5, [1])(torch.zeros(1, 1), scores).tolist() == [[1.0, 4.5, 3.0]]
    assert scores.tolist() == [[1.0, 2.0, 3.0]]


def test_a_large_bias_ends_at_once_and_a_negative_one_never(sampler):
    assert all(one.ids == [EOS] for one in sampler(PROMPTS, end_bias=100.0))
    assert not any(one.finished for one in sampler(PROMPTS[:4], end_bias=-100.0))


def test_the_random_state_is_left_as_it_was(sampler):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    sampler(PROMPTS[:2])
    assert torch.equal(torch.rand(1), expected)


def test_completions_are_judged_in_their_own_rows(tokenizer):
    rows = Dataset.from_dict({"prompt": ["1 + 1 =", "2 + 2 ="], "solution": ["2", "4"]})
    completions = [Completion([*tokenizer("2").input_ids, EOS], True)] * 2

    def reward(prompts, completions, completion_ids, solution):
        assert prompts == ["1 + 1 =", "2 + 2 ="] and len(completion_ids) == 2
        return [1.0 if text.strip() == gold else None for text, gold in zip(completions, solution, strict=True)]

    assert correct_completions(tokenizer, rows, completions, reward).tolist() == [True, False]


def test_a_negative_number_of_candidates_is_refused(sampler):
    with pytest.raises(ValueError, match="0 for all of them, got -1"):
        SteeredSampler(sampler.policy, sampler.critic, sampler.tokenizer, 8, top_k=-1)
