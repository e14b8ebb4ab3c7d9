import asyncio
import functools
import gc
import os
import pickle
import threading
import time
import weakref
from types import SimpleNamespace

import pytest

from lenvm_rl.trainers.finite_rewards import guard
from reward_fns import AccuracyReward, ShorterBetterReward, TruncationReward, share
from reward_fns.verdicts import SharedReward, verdicts_of


class Counting:
    """Correct if the text is "right"; counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, completions, log_extra=None, log_metric=None, **_):
        self.calls += 1
        if log_extra is not None:
            log_extra("texts", list(completions))
        if log_metric is not None:
            log_metric("calls", float(self.calls))
        return [float(completion == "right") for completion in completions]


def module_level(completions, **_):
    return [1.0] * len(completions)


async def asynchronous(completions, **_):
    return [1.0] * len(completions)


class Asynchronous:
    async def __call__(self, completions, **_):
        return [1.0] * len(completions)


def test_three_rewards_of_a_batch_ask_once():
    counting = Counting()
    functions = [share(counting), TruncationReward(4, None, counting), ShorterBetterReward(counting)]
    inputs = {"prompts": ["p", "p"], "completions": ["right", "wrong"], "completion_ids": [[7] * 5, [7] * 2]}
    rewards = [function(**inputs) for function in functions]
    assert rewards == [[1.0, 0.0], [-1.0, 0.0], [0.0, -0.003]]
    assert counting.calls == 1


def test_accuracy_reward_is_shared_through_the_guard_of_our_trainer(monkeypatch):
    accuracy = AccuracyReward()
    scored = []
    monkeypatch.setattr(accuracy, "_score", lambda *args: scored.append(1) or AccuracyReward._score(accuracy, *args))
    functions = [guard(f) for f in (accuracy, TruncationReward(4, None, accuracy), ShorterBetterReward(accuracy))]
    inputs = {
        "prompts": ["p", "p"],
        "completions": [r"\boxed{7}", r"\boxed{8}"],
        "completion_ids": [[7] * 5, [7] * 2],
        "solution": ["7", "7"],
    }
    assert [function(**inputs) for function in functions] == [[1.0, 0.0], [-1.0, 0.0], [0.0, -0.003]]
    assert len(scored) == 1


@pytest.mark.parametrize("first", ["accuracy", "length"])
def test_trainer_logs_once_whoever_asks_first(first):
    accuracy, metrics, extras = AccuracyReward(), [], []
    hooks = {"log_metric": lambda *metric: metrics.append(metric), "log_extra": lambda *extra: extras.append(extra)}
    inputs = {"completions": [r"\boxed{7}"], "completion_ids": [[7]], "solution": ["7"], **hooks}
    functions = [accuracy, TruncationReward(4, None, accuracy)]
    for function in functions if first == "accuracy" else functions[::-1]:
        assert function(**inputs) == ([1.0] if function is accuracy else [0.0])
    assert extras == [("accuracy_reward/gold", ["7"]), ("accuracy_reward/answer", ["7"])]
    names = sorted(name for name, _ in metrics)
    assert names == [
        "accuracy_reward/crashes",
        "accuracy_reward/no_answer",
        "accuracy_reward/timeouts",
        "truncation_reward/cut",
    ]


CHANGES = {
    "a completion replaced in place": lambda inputs: inputs["completions"].__setitem__(0, "wrong"),
    "a list of equal completions": lambda inputs: inputs.update(completions=list(inputs["completions"])),
    "a column replaced in place": lambda inputs: inputs["solution"].__setitem__(0, "8"),
    "another column": lambda inputs: inputs.update(level=[1, 2]),
    "a prompt": lambda inputs: inputs["prompts"].__setitem__(0, "q"),
    "token ids": lambda inputs: inputs["completion_ids"][1].append(7),
    "another step": lambda inputs: setattr(inputs["trainer_state"], "global_step", 5),
    "another object": lambda inputs: inputs.update(environments=[object(), object()]),
    "a nested value": lambda inputs: inputs["nested"][0]["a"].append(1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_batch_is_scored_again(change):
    counting = Counting()
    shared = share(counting)
    inputs = {
        "prompts": ["p", "p"],
        "completions": ["right", "wrong"],
        "completion_ids": [[7] * 5, [7] * 2],
        "solution": ["7", "7"],
        "trainer_state": SimpleNamespace(global_step=4),
        "environments": [object(), object()],
        "nested": [{"a": [0]}, {"a": [0]}],
    }
    shared(**inputs)
    shared(**inputs)
    assert counting.calls == 1
    change(inputs)
    expected = [float(text == "right") for text in inputs["completions"]]
    assert shared(**inputs) == expected and counting.calls == 2


def test_message_changed_in_place_is_scored_again():
    accuracy = AccuracyReward()
    completions = [[{"role": "assistant", "content": r"\boxed{7}"}]]
    assert accuracy(completions=completions, solution=["7"]) == [1.0]
    completions[0][0]["content"] = r"\boxed{8}"
    assert accuracy(completions=completions, solution=["7"]) == [0.0]


def test_setting_changed_between_calls_is_seen():
    accuracy = AccuracyReward()
    completions, solution = [r"\boxed{14/2}"], ["7"]
    assert accuracy(completions=completions, solution=solution) == [0.0]
    accuracy.simplest_form = False
    assert accuracy(completions=completions, solution=solution) == [1.0]


def test_changing_what_came_back_changes_nothing_for_others():
    shared = share(Counting())
    completions = ["right"]
    shared(completions=completions).append(5.0)
    assert shared(completions=completions) == [1.0]


def test_memory_is_bounded():
    counting = Counting()
    shared = share(counting)
    batches = [["right"] for _ in range(50)]
    for completions in batches:
        shared(completions=completions)
    assert len(shared._memory._batches) == 4
    shared(completions=batches[-1])
    assert counting.calls == 50
    shared(completions=batches[0])
    assert counting.calls == 51


def test_failure_is_not_remembered():
    calls = []

    def fails_once(completions, **_):
        calls.append(1)
        if len(calls) == 1:
            raise OSError("no judge")
        return [1.0]

    shared, completions = share(fails_once), ["right"]
    with pytest.raises(OSError, match="no judge"):
        shared(completions=completions)
    assert shared(completions=completions) == [1.0]


def test_threads_get_the_verdicts_of_their_own_batch_and_score_it_once():
    calls = []

    def slow(completions, **_):
        calls.append(completions[0])
        time.sleep(0.005)
        return [float(completion) for completion in completions]

    shared, seen = share(slow), []
    batches = [[str(i)] for i in range(3)]

    def ask(i: int) -> None:
        seen.append((i, shared(completions=batches[i % 3])))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == [(i, [float(i % 3)]) for i in range(12)]
    assert sorted(calls) == ["0", "1", "2"]


def test_forked_child_does_not_wait_for_a_thread_of_its_parent():
    shared = share(Counting())
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with shared._memory._lock:
            held.set()
            release.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    child = os.fork()
    if child == 0:
        os._exit(0 if shared(completions=["right"]) == [1.0] else 1)
    deadline = time.monotonic() + 20
    while (status := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    release.set()
    thread.join()
    if status[0] == 0:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert status == (child, 0)


def test_share_is_one_object_for_one_function_and_keeps_none_alive():
    counting = Counting()
    assert share(counting) is share(counting) is share(share(counting))
    assert share(counting) is not share(Counting())
    accuracy = AccuracyReward()
    assert share(accuracy) is accuracy
    dead = weakref.ref(counting)
    del counting
    gc.collect()
    assert dead() is None


def test_shared_function_has_its_name_and_survives_pickling():
    shared = share(module_level)
    assert shared.__name__ == "module_level" and share(functools.partial(module_level)).__name__ == "module_level"
    assert share(Counting()).__name__ == "Counting"
    copy = pickle.loads(pickle.dumps(shared))
    assert copy is shared and isinstance(copy, SharedReward)
    first, second = pickle.loads(pickle.dumps([share(Counting()), TruncationReward(4, None, Counting())]))
    assert first(completions=["right"]) == [1.0] and second(completions=["right"], completion_ids=[[7] * 9]) == [-1.0]


def test_rewards_pickled_together_still_ask_once():
    counting = Counting()
    functions = [share(counting), TruncationReward(4, None, counting), ShorterBetterReward(counting)]
    functions = pickle.loads(pickle.dumps(functions))
    inputs = {"prompts": ["p"], "completions": ["right"], "completion_ids": [[7] * 5]}
    for function in functions:
        function(**inputs)
    assert functions[0].reward_func.calls == 1


@pytest.mark.parametrize("function", [asynchronous, Asynchronous(), functools.partial(asynchronous, extra=1)])
def test_asynchronous_correctness_is_refused_at_once(function):
    with pytest.raises(ValueError, match=r"asynchronous.*pass a synchronous function"):
        TruncationReward(4, None, function)


def test_function_that_turns_out_to_be_asynchronous_is_refused_on_the_call():
    def hidden(completions, **_):
        return asynchronous(completions)

    with pytest.raises(ValueError, match="'hidden' is asynchronous"):
        share(hidden)(completions=["a"])
    assert asyncio.run(asynchronous(["a"])) == [1.0]


@pytest.mark.parametrize("function", ["Qwen/reward-model", 7, Counting, None])
def test_correctness_must_be_a_function(function):
    with pytest.raises(
        ValueError, match="must be a reward function that says what is correct, such as accuracy_reward"
    ):
        share(function)


def test_reward_model_is_no_correctness_function():
    import torch

    with pytest.raises(ValueError, match="reward models and their names are not supported"):
        TruncationReward(4, None, torch.nn.Linear(1, 1))


def test_none_and_nan_cannot_be_scored_and_numbers_become_floats():
    verdicts = verdicts_of(share(lambda **_: [None, float("nan"), 1, True]), ["a"] * 4, {})
    assert verdicts == [None, None, 1.0, 1.0] and type(verdicts[2]) is type(verdicts[3]) is float


@pytest.mark.parametrize(
    ("returned", "message"),
    [([1.0], "returned 1 verdicts for 2 completions"), ([1.0, float("inf")], "returned inf for row 1")],
)
def test_correctness_function_must_keep_its_contract(returned, message):
    def broken(**_):
        return returned

    with pytest.raises(ValueError, match=f"'broken' {message}"):
        verdicts_of(share(broken), ["a", "b"], {})
