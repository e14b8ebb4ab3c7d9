import asyncio
import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn, tensor
from transformers import AutoModelForCausalLM
from trl.trainer.utils import get_callable_name, is_async_callable

from lenvm_rl.trainers.finite_rewards import guard
from reward_fns import accuracy_reward

NAN, INF = float("nan"), float("inf")


def brevity(completions, **kwargs):
    return kwargs["rewards"]


async def judge(completions, **kwargs):
    await asyncio.sleep(0)
    return kwargs["rewards"]


class Scorer:
    """A reward function with state, as users write them."""

    def __init__(self):
        self.calls = 0

    def __call__(self, completions, **kwargs):
        self.calls += 1
        return kwargs["rewards"]


class AsyncScorer:
    async def __call__(self, completions, **kwargs):
        return kwargs["rewards"]


def test_finite_rewards_and_none_pass_as_they_are():
    rewards = [1.0, None, 0, -3.5, True, np.float32(0.5), tensor(0.25)]
    assert guard(brevity)(completions=["a"] * 7, rewards=rewards) is rewards


@pytest.mark.parametrize("reward", [NAN, INF, -INF, np.float32("nan"), tensor(INF)])
def test_a_reward_that_is_not_finite_raises_with_the_function_and_the_row(reward):
    with pytest.raises(ValueError) as caught:
        guard(brevity)(completions=["a"] * 3, rewards=[0.0, None, reward])
    assert str(caught.value) == (
        f"The reward function 'brevity' returned {reward} for row 2 of the batch. Rewards must be finite; return None "
        "for a completion that cannot be scored."
    )


def test_arrays_are_checked_too():
    guard(brevity)(completions=["a"] * 2, rewards=np.array([0.0, 1.0]))
    with pytest.raises(ValueError, match="'brevity' returned inf for row 1"):
        guard(brevity)(completions=["a"] * 2, rewards=np.array([0.0, INF]))


def test_arguments_reach_the_reward_function():
    seen = {}

    def spy(prompts, completions, **kwargs):
        seen.update(kwargs, prompts=prompts, completions=completions)
        return [0.0]

    guard(spy)(prompts=["p"], completions=["c"], solution=["s"])
    assert seen == {"prompts": ["p"], "completions": ["c"], "solution": ["s"]}


@pytest.mark.parametrize("reward_func", [judge, AsyncScorer(), partial(judge)], ids=["function", "instance", "partial"])
def test_an_async_reward_function_stays_one_and_is_checked(reward_func):
    guarded = guard(reward_func)
    assert is_async_callable(guarded)
    assert asyncio.run(guarded(completions=["a"] * 2, rewards=[0.5, None])) == [0.5, None]
    with pytest.raises(ValueError, match=rf"'{get_callable_name(reward_func)}' returned nan for row 0"):
        asyncio.run(guarded(completions=["a"], rewards=[NAN]))


@pytest.mark.parametrize("reward_func", [brevity, Scorer(), partial(brevity)], ids=["function", "instance", "partial"])
def test_a_synchronous_reward_function_stays_one(reward_func):
    assert not is_async_callable(guard(reward_func))


def test_reward_models_pass_through():
    model = nn.Linear(2, 1)
    assert guard(model) is model
    assert guard("org/reward-model") == "org/reward-model"


@pytest.mark.parametrize("reward_func", [brevity, judge, Scorer(), partial(brevity), partial(partial(judge))])
def test_the_name_under_which_trl_logs_a_reward_is_kept(reward_func):
    guarded = guard(reward_func)
    assert guarded.__name__ == get_callable_name(guarded) == get_callable_name(reward_func)


def test_the_state_of_a_reward_function_is_shared_not_copied():
    scorer = Scorer()
    guard(scorer)(completions=["a"], rewards=[0.0])
    assert scorer.calls == 1


def test_a_guarded_reward_function_survives_pickling():
    for reward_func in (accuracy_reward, partial(accuracy_reward)):
        copy = pickle.loads(pickle.dumps(guard(reward_func)))
        assert copy.__name__ == "accuracy_reward"
        assert copy(completions=["\\boxed{19}", "\\boxed{18}"], solution=["19", "19"]) == [1.0, 0.0]
        with pytest.raises(ValueError, match="'accuracy_reward' returned inf for row 0"):
            copy._checked([math.inf])


def test_a_reward_too_few_ends_a_run_with_the_function_and_both_numbers(train):
    def one_too_few(completions, **_):
        return [1.0] * (len(completions) - 1)

    with pytest.raises(ValueError, match="'one_too_few' returned 7 rewards, but 8 were expected"):
        train(length_coef=0.0, reward_funcs=one_too_few)


def test_a_batch_that_nobody_could_score_teaches_nothing(train, critic_folder, policy_folder):
    def unscored(completions, **_):
        return [None] * len(completions)

    trainer = train(length_critic=critic_folder, reward_funcs=unscored, learning_rate=1.0, max_steps=1)
    before = AutoModelForCausalLM.from_pretrained(policy_folder).state_dict()
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, before[name]), name
