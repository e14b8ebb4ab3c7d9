from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from lenvm_rl.evaluation.accuracy import evaluate_policy, wilson_interval
from lenvm_rl.sampling import SamplingSettings, prompt_token_ids, sample_completions
from lenvm_rl.tasks.arithmetic import build_tokenizer

SAMPLED, GREEDY = SamplingSettings(10), SamplingSettings(10, top_p=1e-6)
NAN = float("nan")


@pytest.fixture(scope="module")
def policy(policy_folder):
    return AutoModelForCausalLM.from_pretrained(policy_folder)


@pytest.fixture
def evaluate(policy, tokenizer, problems):
    def scored(reward_func, settings=SAMPLED, problems=problems, **options):
        return evaluate_policy(policy, tokenizer, problems, reward_func, settings, **options)

    return scored


def rewarding(*rewards):
    """A reward function that hands these out in turn, and the calls that it got."""
    calls, left = [], list(rewards)

    def reward_func(**kwargs):
        calls.append(kwargs)
        return [left.pop(0) for _ in kwargs["completions"]]

    return reward_func, calls


def length_reward(completion_ids, **kwargs):
    return [None if len(ids) < 3 else float(sum(ids) % 2) for ids in completion_ids]


@pytest.mark.parametrize(
    "successes, trials, low, high",
    [
        # Newcombe (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (10, 10, 0.7225, 1.0),
    ],
)
def test_the_wilson_interval_has_its_published_values(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_wilson_interval_holds_the_rate_and_stays_within_0_and_1(counts):
    low, high = wilson_interval(*counts)
    rate = counts[0] / counts[1]
    assert 0.0 <= low <= rate + 1e-12 and rate - 1e-12 <= high <= 1.0
    mirrored = wilson_interval(counts[1] - counts[0], counts[1])
    assert (low, high) == pytest.approx((1 - mirrored[1], 1 - mirrored[0]))


def test_a_score_counts_what_a_plain_loop_counts(evaluate, policy, tokenizer, problems):
    completions = sample_completions(policy, tokenizer, prompt_token_ids(tokenizer, problems["prompt"]), GREEDY)
    rewards = length_reward([completion.ids for completion in completions])
    tokens, correct = sum(len(completion.ids) for completion in completions), rewards.count(1.0)
    assert 0 < correct < 16
    score = evaluate(length_reward, GREEDY)
    assert score.accuracy == correct / 16 and score.problems == 16
    assert (score.accuracy_low, score.accuracy_high) == wilson_interval(correct, 16)
    assert score.completion_tokens == tokens / 16
    assert score.tokens_per_correct == tokens / correct
    assert score.finished == sum(completion.finished for completion in completions) / 16


def test_a_completion_is_correct_from_the_threshold_on_and_never_without_a_score(evaluate):
    rewards = [None, NAN, 0.0, 0.49, 0.5, 0.75, 1.0, 2.0] * 2
    assert evaluate(rewarding(*rewards)[0]).accuracy == 4 / 16
    assert evaluate(rewarding(*rewards)[0], threshold=0.5).accuracy == 8 / 16


def test_without_a_correct_completion_there_are_no_tokens_per_correct(evaluate):
    score = evaluate(lambda completions, **kwargs: [0.0] * len(completions))
    assert score.accuracy == 0.0 and score.tokens_per_correct is None
    assert score.to_dict()["tokens_per_correct"] is None and score.to_dict()["problems"] == 16


def test_the_reward_function_is_called_as_trl_calls_it(evaluate, problems, tokenizer):
    reward_func, calls = rewarding(*[1.0] * 16)
    evaluate(reward_func, batch_size=7)
    assert [len(call["completions"]) for call in calls] == [7, 7, 2]
    assert all(call.keys() == {"prompts", "completions", "completion_ids", "solution"} for call in calls)
    assert [prompt for call in calls for prompt in call["prompts"]] == problems["prompt"][:]
    assert [solution for call in calls for solution in call["solution"]] == problems["solution"][:]
    for call in calls:
        assert call["completions"] == tokenizer.batch_decode(call["completion_ids"], skip_special_tokens=True)
        assert "<eos>" not in " ".join(call["completions"])


def test_a_conversational_problem_is_answered_by_a_message(policy, problems):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    conversations = Dataset.from_dict({"prompt": [[{"role": "user", "content": p}] for p in problems["prompt"]]})
    reward_func, calls = rewarding(*[1.0] * 16)
    evaluate_policy(policy, tokenizer, conversations, reward_func, GREEDY)
    assert calls[0]["prompts"] == conversations["prompt"][:]
    for completion in calls[0]["completions"]:
        assert len(completion) == 1 and completion[0]["role"] == "assistant"
        assert isinstance(completion[0]["content"], str)


def process(index, world, reduce):
    return SimpleNamespace(process_index=index, num_processes=world, device="cpu", reduce=reduce)


@pytest.mark.parametrize("world", [2, 3, 20])  # of 20, some have no problem at all
def test_processes_share_the_problems_and_get_the_score_of_one(evaluate, world):
    alone = evaluate(length_reward, GREEDY)
    sums = []
    for rank in range(world):
        evaluate(length_reward, GREEDY, accelerator=process(rank, world, lambda own: sums.append(own) or own + 1))
    total = torch.stack(sums).sum(0)
    for rank in (0, world - 1):
        assert evaluate(length_reward, GREEDY, accelerator=process(rank, world, lambda own: total)) == alone


# 16 problems: of three processes, one has six and two have five; of twenty, some have none
@pytest.mark.parametrize("world, batch_size, expected", [(3, 5, 2), (3, 2, 3), (20, 4, 1), (1, 7, 3)])
def test_all_processes_generate_equally_often(evaluate, policy, monkeypatch, world, batch_size, expected):
    calls, generate = [], policy.generate
    monkeypatch.setattr(policy, "generate", lambda **inputs: calls.append(None) or generate(**inputs))
    counts = []
    for rank in range(world):
        evaluate(length_reward, GREEDY, accelerator=process(rank, world, lambda own: own + 1), batch_size=batch_size)
        counts.append(len(calls))
        calls.clear()
    assert set(counts) == {expected}


def test_every_problem_falls_to_one_process(evaluate, problems):
    seen = []

    def reward_func(prompts, **kwargs):
        seen.extend(prompts)
        return [1.0] * len(prompts)

    for rank in range(3):
        evaluate(reward_func, accelerator=process(rank, 3, lambda own: own))
    assert sorted(seen) == sorted(problems["prompt"])


def test_processes_sample_with_different_seeds(evaluate, problems):
    same, calls = problems.select([0] * 8), []
    for rank in range(2):
        reward_func, called = rewarding(*[1.0] * 4)
        evaluate(reward_func, problems=same, accelerator=process(rank, 2, lambda own: own))
        calls.append(called[0]["completion_ids"])
    assert calls[0] != calls[1]


def test_the_random_state_is_left_as_it_was_and_the_seed_decides(evaluate):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = evaluate(length_reward)
    assert torch.equal(torch.rand(3), expected)
    assert evaluate(length_reward) == first
    assert evaluate(length_reward, seed=1) != first


def test_no_problems_are_refused(evaluate):
    with pytest.raises(ValueError, match="There are no problems to evaluate on"):
        evaluate(length_reward, problems=Dataset.from_dict({"prompt": []}))
