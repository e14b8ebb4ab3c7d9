import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lenvm_rl.evaluation.text_quality import repeated_share, surprises, text_quality
from lenvm_rl.sampling import Completion


@pytest.fixture(scope="module")
def policy(policy_folder):
    return AutoModelForCausalLM.from_pretrained(policy_folder)


def test_repetition_is_the_share_of_ngrams_that_were_there_before():
    assert repeated_share([1, 2, 3, 1, 2, 3], 2) == pytest.approx(2 / 5)  # 12 23 31 12 23
    assert repeated_share([7] * 10, 4) == pytest.approx(6 / 7)
    assert repeated_share([1, 2, 3], 4) == 0.0


PROMPTS = [[5, 6, 7], [9], [20, 30, 40, 50], [8, 8]]
COMPLETIONS = [
    Completion([3, 4, 1], True),
    Completion([10, 11, 12, 13, 14], False),
    Completion([1], True),
    Completion([], False),
]


def test_surprises_are_those_of_one_row_at_a_time(policy):
    found = surprises(policy, PROMPTS, COMPLETIONS, token_budget=12)
    for prompt, completion, nats in zip(PROMPTS, COMPLETIONS, found, strict=True):
        log_p = torch.log_softmax(policy(torch.tensor([prompt + completion.ids])).logits[0], -1)
        expected = [-log_p[len(prompt) - 1 + t, token].item() for t, token in enumerate(completion.ids)]
        assert nats == pytest.approx(expected, abs=1e-4)


def test_perplexity_leaves_the_end_token_to_a_number_of_its_own(policy):
    nats = surprises(policy, PROMPTS, COMPLETIONS)
    quality = text_quality(policy, PROMPTS, COMPLETIONS)
    body = np.concatenate([nats[0][:2], nats[1]])
    assert quality.perplexity == pytest.approx(math.exp(body.mean()))
    assert quality.end_surprise == pytest.approx((nats[0][2] + nats[2][0]) / 2)
    assert quality.finished == 0.5 and quality.repeated == 0.0
    assert not policy.training


def test_a_single_unfinished_token_has_no_end(policy):
    quality = text_quality(policy, [[5]], [Completion([6], False)])
    assert math.isnan(quality.end_surprise) and quality.perplexity > 1
    assert math.isnan(text_quality(policy, [[5]], [Completion([1], True)]).perplexity)
    with pytest.raises(ValueError, match="no completions to judge"):
        text_quality(policy, [], [])
