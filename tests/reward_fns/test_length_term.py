"""What holds for every length reward."""

import math
import pickle

import pytest

from reward_fns import METHODS, LengthReward, length_reward
from reward_fns.completions import completion_text
from reward_fns.length_term import Completion, by_prompt

OURS = {
    "dler": {"limit": 5, "eos_token_ids": 1},
    "da-dler": {"limit": 5, "easy_limit": 3, "eos_token_ids": [1, 2]},
    "thinkprune": {"limit": 5},
    "hapo": {},
    "kimi": {},
    "arora-zanette": {"eos_token_ids": 1},
    "grpo-lambda": {},
    "shorterbetter": {},
    "alp": {"beta": 0.01},
    "l1-exact": {"target": 4},
    "l1-max": {"target": 4},
    "laser": {"target": 4},
    "laser-d": {"shortest": 2, "longest": 16, "spacing": 2, "update_every": 1, "group_size": 4},
    "format-length": {"longest": 10},
}
ROWS = [("p", 3, True), ("q", 8, True), ("p", 6, True), ("p", 9, False), ("q", 2, False), ("q", 4, True)]


def right(completions, **_):
    verdicts = {"right": 1.0, "wrong": 0.0, "unknown": None}
    return [verdicts[completion_text(completion)] for completion in completions]


def build(name, correctness=right):
    reward = length_reward(name, **OURS[name])
    key = "format_func" if name == "format-length" else "correctness"
    return length_reward(name, **OURS[name], **{key: correctness}) if name != "l1-exact" else reward


def test_every_method_of_ours_is_here():
    theirs = {"dapo-overlong", "cosine", "repetition"}
    assert set(OURS) == set(METHODS) - theirs


@pytest.fixture(params=list(OURS))
def reward(request):
    return build(request.param)


def test_rewards_are_finite_floats_one_per_completion(reward, batch):
    for inputs in (batch(ROWS), batch(ROWS, cut=range(6)), batch([("p", 0, False), ("p", 0, True)]), batch([])):
        rewards = reward(**inputs)
        assert len(rewards) == len(inputs["completions"])
        assert all(type(value) is float and math.isfinite(value) for value in rewards)


def test_conversations_earn_what_texts_earn(reward, batch):
    plain = [reward(**batch(ROWS)) for _ in range(2)]
    fresh = build(reward_name(reward))
    assert [fresh(**batch(ROWS, conversational=True)) for _ in range(2)] == plain


@pytest.mark.parametrize("name", sorted(set(OURS) - {"grpo-lambda"}))  # of equally solved prompts, it takes the first
def test_order_of_the_completions_does_not_matter(name, batch):
    forward, backward = build(name)(**batch(ROWS)), build(name)(**batch(ROWS[::-1]))
    assert backward[::-1] == pytest.approx(forward)


def test_prompt_id_alone_makes_the_groups(reward, batch):
    texts = reward(**batch(ROWS))
    inputs = batch(ROWS, prompt_id=[5 if prompt == "p" else 6 for prompt, _, _ in ROWS])
    inputs["prompts"] = ["all the same"] * len(ROWS)
    assert build(reward_name(reward))(**inputs) == texts
    del inputs["prompts"]
    assert build(reward_name(reward))(**inputs) == texts


@pytest.mark.parametrize("name", sorted(set(OURS) - {"l1-exact"}))  # which asks nobody what is correct
def test_what_cannot_be_scored_gets_none_and_is_no_part_of_its_group(name, batch):
    reward, fresh = build(name), build(name)
    without = [reward(**batch(ROWS)) for _ in range(2)]
    rows = [ROWS[0], ("p", 500, "unknown"), *ROWS[1:], ("r", 1, "unknown")]
    for expected in without:
        rewards = fresh(**batch(rows))
        assert rewards[1] is rewards[7] is None
        assert [rewards[0], *rewards[2:7]] == expected
    assert fresh(**batch([("p", 3, "unknown")] * 2)) == [None, None]


def test_verdict_that_is_nan_is_none(batch):
    reward = length_reward("kimi", correctness=lambda completions, **_: [float("nan"), 1.0, 1.0])
    assert reward(**batch([("p", 1, True), ("p", 3, True), ("p", 2, True)])) == [None, -0.5, 0.5]


def test_copy_by_pickle_rewards_alike_and_keeps_its_name_and_state(reward, batch):
    reward(**batch(ROWS))
    reward.__name__ = "renamed"
    copy = pickle.loads(pickle.dumps(reward))
    assert copy.__name__ == "renamed" and repr(copy) == repr(reward)
    assert copy(**batch(ROWS)) == reward(**batch(ROWS))
    assert copy.fingerprint() == reward.fingerprint()


def test_missing_lengths_are_explained(reward, batch):
    inputs = batch(ROWS)
    del inputs["completion_ids"]
    with pytest.raises(ValueError, match=r"counts tokens, but completion_ids is missing: TRL's trainers pass it"):
        reward(**inputs)
    with pytest.raises(ValueError, match="completion_ids is 1 rows for 6 completions"):
        reward(**inputs, completion_ids=[[1]])


def test_missing_prompts_are_explained_where_they_matter(reward, batch):
    inputs = batch(ROWS)
    del inputs["prompts"]
    if reward.grouped:
        with pytest.raises(ValueError, match=r"neither prompts nor a column prompt_id.*as TRL's trainers do"):
            reward(**inputs)
    else:
        assert len(reward(**inputs)) == 6


def test_nothing_is_negative_zero(reward, batch):
    assert all(math.copysign(1.0, value) > 0 or value < 0 for value in reward(**batch(ROWS)))


def test_evaluation_by_hand_leaves_the_state_alone(reward, batch):
    before = pickle.dumps(reward.fingerprint())
    reward.training = False
    reward(**batch(ROWS))
    assert pickle.dumps(reward.fingerprint()) == before


def test_correctness_gets_all_that_the_trainer_passes_but_its_hooks(batch):
    seen = []

    def asked(completions, log_extra, log_metric, **inputs):
        seen.append(inputs)
        log_extra("column", ["a"])
        log_metric("metric", 1.0)
        return [1.0] * len(completions)

    def fail(*_):
        raise AssertionError("logged twice")

    inputs = batch(ROWS, solution=["7"] * 6, level=[1] * 6)
    length_reward("shorterbetter", correctness=asked)(**inputs, log_extra=fail, log_metric=fail)
    del inputs["completions"]
    assert seen == [inputs]


def test_trl_knows_its_name(reward):
    from trl.trainer.utils import get_callable_name, is_async_callable

    assert get_callable_name(reward) == reward.__name__ and reward.__name__.endswith("_reward")
    assert not is_async_callable(reward)


def test_settings_show_in_its_repr():
    shown = repr(build("dler"))
    assert shown.startswith("TruncationReward(") and "limit=5" in shown and "correctness=share(" in shown


def test_base_has_no_terms(batch):
    with pytest.raises(NotImplementedError):
        LengthReward("length_reward")(**batch(ROWS))


def test_groups_come_in_the_order_of_their_first_completion():
    completions = [Completion(prompt, 1, 1.0, True, True) for prompt in "bab"]
    assert list(by_prompt(completions).items()) == [("b", [0, 2]), ("a", [1])]


def reward_name(reward):
    built = {build(name).__name__: name for name in OURS}
    if reward.__name__ == "truncation_reward":
        return "da-dler" if reward.easy_limit else "thinkprune" if reward.eos_token_ids is None else "dler"
    return built[reward.__name__]
