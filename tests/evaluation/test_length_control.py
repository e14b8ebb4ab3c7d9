import math

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from lenvm_rl.decoding import AtLeast, AtMost, LengthTarget
from lenvm_rl.evaluation.length_control import (
    ControlledRun,
    TargetRequest,
    control_of,
    lengths_of,
    run_targets,
    score_targets,
    token_targets,
)
from lenvm_rl.evaluation.steered_sampling import SteeredSampler
from lenvm_rl.evaluation.text_quality import text_quality
from lenvm_rl.model import LengthValueModel
from lenvm_rl.sampling import Completion

EOS = 1


@pytest.fixture(scope="module")
def policy(policy_folder):
    return AutoModelForCausalLM.from_pretrained(policy_folder)


def completion(length, finished=True):
    return Completion([7] * (length - finished) + [EOS] * finished, finished)


def test_each_constraint_has_its_control():
    assert control_of("equal", 9) == LengthTarget(9)
    assert control_of("at_most", 9) == AtMost(9)
    assert control_of("at_least", 9) == AtLeast(9, foresight=True)


def test_scores_are_means_over_targets_of_each_constraint_by_hand(policy):
    asked = [(10, "equal"), (10, "equal"), (20, "equal"), (20, "at_most")]
    requests = [TargetRequest([5, 6], target, constraint) for target, constraint in asked]
    completions = [completion(n) for n in (8, 10, 30, 30)]
    run = ControlledRun(completions, np.array([8, 10, 30, 30]))
    found = score_targets(policy, requests, run, correct=lambda rows: np.array([row == 0 for row in rows]))
    # 10: exp(-1) and 1; 20: half too long, exp(-1)
    assert found["equal"].per_target == pytest.approx({10: 50 * (1 + math.exp(-1)), 20: 100 * math.exp(-1)})
    assert found["equal"].score == pytest.approx((50 * (1 + math.exp(-1)) + 100 * math.exp(-1)) / 2)
    assert found["equal"].deviation == pytest.approx((0.2 + 0 + 0.5) / 3)
    assert (found["equal"].accuracy, found["at_most"].accuracy) == (pytest.approx(1 / 3), 0)
    assert found["at_most"].score == pytest.approx(100 * math.exp(-1))
    assert found["at_most"].quality == text_quality(policy, [[5, 6]], completions[3:])
    assert found["equal"].precise_match is None


def test_words_have_rulers_matches(policy):
    requests = [TargetRequest([5, 6], 10, "equal")] * 2
    run = ControlledRun([completion(12), completion(25)], np.array([11, 24]))
    found = score_targets(policy, requests, run, unit="words")["equal"]
    assert (found.precise_match, found.flexible_match) == (0.5, 0.5)


def test_a_target_in_words_takes_the_tokens_per_word_of_its_language():
    requests = [TargetRequest([5], 10, "equal", "en"), TargetRequest([5], 10, "equal", "cn")]
    unguided = ControlledRun([completion(31), completion(16, finished=False)], np.array([20, 10]))
    # 30 tokens for 20 words, 16 for 10; and the end token
    assert token_targets(requests, unguided, "words") == [16, 17]
    assert token_targets(requests, unguided, "tokens") == [10, 10]
    silent = ControlledRun([completion(1), completion(16, finished=False)], np.array([0, 10]))
    assert token_targets(requests, silent, "words")[0] == 11


def test_lengths_count_the_end_token_or_words(tokenizer):
    ids = [*tokenizer("12 + 7").input_ids, EOS]
    assert lengths_of([Completion(ids, True)], tokenizer, "tokens").tolist() == [4]
    assert lengths_of([Completion(ids, True)], tokenizer, "words").tolist() == [3]


def test_guided_runs_keep_what_unguided_ones_do_not(policy, critic_folder, tokenizer):
    critic = LengthValueModel.from_pretrained(critic_folder)
    sampler = SteeredSampler(policy, critic, tokenizer, 24)
    requests = [TargetRequest([n], 6, constraint) for constraint in ("at_most", "at_least") for n in range(5, 17)]
    controls = [control_of(one.constraint, one.target) for one in requests]
    plain, guided = run_targets(sampler, requests), run_targets(sampler, requests, controls=controls)
    scores = {name: score_targets(policy, requests, run) for name, run in [("plain", plain), ("guided", guided)]}
    for constraint in ("at_most", "at_least"):
        assert scores["guided"][constraint].score == 100 > scores["plain"][constraint].score
