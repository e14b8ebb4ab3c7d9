import pickle
import time

import pytest

from reward_fns import FormatReward, format_reward


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{7}",
        r"3 + 4 makes 7, so the answer is $\boxed{7}$.",
        r"\[ \boxed{\frac{3}{4}} \]",
        r"\boxed{7} dollars per day.",
        "\\boxed{7}\n\n\n" + " " * 100,
        r"<think> 3 + 4 = 7 </think> \boxed{7}",
        r"  <think> maybe \boxed{8} or \boxed{9} </think> So \boxed{7}.",
        r"<think></think>\boxed{7}",
    ],
)
def test_one_box_at_the_end_is_the_format(text):
    assert format_reward([text]) == [1.0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7",
        "#### 7",
        r"\fbox{7}",
        r"\boxed{}",
        r"\boxed{ }",
        r"\boxed{7",
        r"\boxed 7",
        r"\boxed{7} \boxed{7}",
        r"\boxed{7} or \boxed{8",
        r"\boxed{\boxed{7}}",
        r"\boxed{7} and here is why: three and four make seven",
        r"<think> \boxed{7}",
        r"<think> \boxed{7} </think>",
        r"<think> \boxed{7} </think> 7",
        r"</think> \boxed{7}",
        r"3 + 4 </think> \boxed{7}",
        r"So: <think> 3 + 4 </think> \boxed{7}",
        r"<think> a <think> b </think> \boxed{7}",
        r"<think> a </think> b </think> \boxed{7}",
        r"<think> a </think> <think> b </think> \boxed{7}",
        r"\boxed{7} <think> done </think>",
    ],
)
def test_anything_else_is_not_the_format(text):
    assert format_reward([text]) == [0.0]


def test_reasoning_can_be_required():
    reward = FormatReward(think="required")
    assert reward([r"\boxed{7}", r"<think> a </think> \boxed{7}"]) == [0.0, 1.0]


def test_reasoning_can_be_opened_by_the_prompt():
    reward = FormatReward(think="opened_by_prompt")
    assert reward([r"a </think> \boxed{7}", r"\boxed{7}", r"<think> a </think> \boxed{7}"]) == [1.0, 0.0, 0.0]


def test_room_after_the_box_can_be_set():
    assert FormatReward(trailing_characters=0)([r"\boxed{7}.", r"\boxed{7}"]) == [0.0, 1.0]


def test_every_shape_of_completion_is_scored():
    parts = [{"type": "text", "text": r"\boxed{7}"}]
    completions = [None, [], [{"role": "assistant", "content": None}], [{"role": "assistant", "content": parts}]]
    assert format_reward(completions=completions, prompts=[""] * 4, solution=["7"] * 4) == [0.0, 0.0, 0.0, 1.0]


def test_time_is_linear_in_the_text():
    start = time.perf_counter()
    format_reward(["\\boxed{" * 50_000, "\\boxed{" + "{" * 50_000 + "}" * 50_001, "<think>" * 50_000])
    assert time.perf_counter() - start < 2.0


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"think": "always"}, "think is 'always', but must be one of"),
        ({"trailing_characters": -1}, "trailing_characters is -1"),
        ({"trailing_characters": 1.5}, "trailing_characters is 1.5"),
        ({"trailing_characters": True}, "trailing_characters is True"),
    ],
)
def test_parameters_are_checked(parameters, message):
    with pytest.raises(ValueError, match=message):
        FormatReward(**parameters)


def test_copy_by_pickle_scores_the_same():
    copy = pickle.loads(pickle.dumps(FormatReward(think="required", trailing_characters=3)))
    assert copy.__name__ == "format_reward"
    assert copy([r"\boxed{7}", r"<think></think>\boxed{7}"]) == [0.0, 1.0]
