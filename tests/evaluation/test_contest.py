"""The table of methods, and how they are named on a command line."""

import dataclasses

import pytest

from lenvm_rl.evaluation.contest import (
    CONTENDERS,
    Entry,
    build_length_reward,
    find_contender,
    read_entries,
    read_value,
    trainer_flags,
)
from lenvm_rl.trainers.grpo import LenVMGRPOConfig
from lenvm_rl.trainers.ppo import LenVMPPOConfig
from reward_fns import METHODS, TruncationReward, accuracy_reward

CONFIGS = {"grpo": LenVMGRPOConfig, "ppo": LenVMPPOConfig}


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_has_a_reward_that_exists_and_a_knob_to_turn(name):
    contender = CONTENDERS[name]
    assert contender.reward is None or contender.reward in METHODS
    fields = {field.name for field in dataclasses.fields(CONFIGS[contender.algorithm])}
    assert set(contender.trainer) <= fields and "length_coef" in contender.trainer
    assert contender.recommended in contender.sweep
    assert name in ("grpo", "ppo") or len(contender.sweep) >= 3
    for value in contender.sweep:
        settings, trainer = contender.turned(value)
        assert contender.knob is None or {**settings, **trainer}[contender.knob] == value
        if contender.reward is not None:
            reward = build_length_reward(contender.reward, settings, correctness=accuracy_reward, eos_token_ids=[1])
            assert getattr(reward, "correctness", accuracy_reward) is accuracy_reward


def test_dler_is_a_reward_and_an_optimiser():
    dler = CONTENDERS["dler"]
    assert dler.settings == {"limit": 48}
    assert dler.trainer == {
        "length_coef": 0.0,
        "advantage_normalization": "group_centred_batch_std",
        "dynamic_sampling": True,
        "epsilon": 0.2,
        "epsilon_high": 0.28,
    }


def test_a_truncation_knows_the_end_tokens_but_thinkprune_counts_tokens_alone():
    built = build_length_reward("dler", {"limit": 48}, correctness=accuracy_reward, eos_token_ids=[1, 7])
    assert isinstance(built, TruncationReward) and built.eos_token_ids == frozenset({1, 7})
    pruned = build_length_reward("thinkprune", {}, correctness=accuracy_reward, eos_token_ids=[1])
    assert pruned.eos_token_ids is None


def test_methods_are_read_with_values_or_at_the_recommended_one():
    assert read_entries(["lenvm", "DLER=40,32", "grpo"]) == [
        Entry("lenvm", 1.0),
        Entry("dler", 40),
        Entry("dler", 32),
        Entry("grpo", None),
    ]
    assert [entry.value for entry in read_entries(["dler"], sweep=True)] == [64, 48, 40, 32]
    assert [entry.value for entry in read_entries(["dler=50"], sweep=True)] == [50]
    assert [entry.name for entry in read_entries(["da_dler", "thinkprune"])] == ["da-dler=32", "thinkprune=64-48-32"]


def test_one_setting_has_one_name():
    assert read_entries(["lenvm=1", "lenvm=1.0", "lenvm"]) == [Entry("lenvm", 1.0)]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("dlre", "There is no method 'dlre' (did you mean 'dler'?): choose among grpo, lenvm"),
        ("dler=abc", "limit"),
        ("dler=0", "limit"),
        ("hapo=2", "weight"),
        ("grpo=1", "GRPO has no knob that could be set to 1"),
    ],
)
def test_what_no_method_takes_is_refused_by_name(word, message):
    with pytest.raises(ValueError) as error:
        read_entries([word])
    assert message in str(error.value)


def test_case_and_underscores_do_not_matter():
    assert find_contender("Arora_Zanette")[0] == "arora-zanette"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("48", 48),
        ("1e-3", 0.001),
        ("{limit: 48}", {"limit": 48}),
        ('{"limit": 48}', {"limit": 48}),
        ("{0: 64, 40: 48}", {0: 64, 40: 48}),
        ("min", "min"),
    ],
)
def test_values_are_json_or_yaml(text, value):
    assert read_value(text) == value


def test_fields_become_flags():
    assert trainer_flags({"reward_weights": [2.0, 1.0], "dynamic_sampling": True}) == [
        *("--reward_weights", "2.0", "1.0"),
        *("--dynamic_sampling", "True"),
    ]
