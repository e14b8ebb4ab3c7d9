import subprocess
import sys

import pytest

from reward_fns.prompts import prompt_keys


def test_equal_prompts_have_equal_keys_wherever_they_stand():
    assert [key == prompt_keys(["a"], None, 1)[0] for key in prompt_keys(["b", "a", "a "], None, 3)] == [0, 1, 0]


def test_conversations_are_told_apart_by_content_and_role_and_not_by_the_order_of_fields():
    user = [{"role": "user", "content": "a"}]
    same = [{"content": "a", "role": "user"}]
    other = [{"role": "system", "content": "a"}]
    longer = [*user, {"role": "assistant", "content": "b"}]
    keys = prompt_keys([user, same, other, longer, "a"], None, 5)
    assert keys[0] == keys[1] and len(set(keys)) == 4


def test_prompt_id_goes_before_the_text_and_never_meets_it():
    keys = prompt_keys(["a", "a", "7", "a"], [7, "7", None, 7], 4)
    assert keys == ["id:7", 'id:"7"', prompt_keys(["7"], None, 1)[0], "id:7"]


def test_keys_are_the_same_in_every_process():
    code = "from reward_fns.prompts import prompt_keys; print(prompt_keys(['12 + 7 ='], None, 1)[0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == prompt_keys(["12 + 7 ="], None, 1)[0]


@pytest.mark.parametrize(
    ("prompts", "ids", "message"),
    [
        (None, None, "neither prompts nor a column prompt_id"),
        (["a"], None, "prompts has 1 rows for 2 completions"),
        ("ab", None, "prompts has one string for 2 completions"),
        (["a", "b"], [1], "prompt_id has 1 rows for 2 completions"),
        (["a", "b"], [1, 2.5], r"row 1 of column 'prompt_id' holds 2.5 \(float\)"),
        (["a", "b"], [True, 2], r"row 0 of column 'prompt_id' holds True \(bool\)"),
        (None, [1, None], "row 1 of column 'prompt_id' is None and there are no prompts"),
        ([[{"content": [{"type": "image", "image": object()}]}], "b"], None, "row 0 holds more than text"),
    ],
)
def test_prompts_that_cannot_be_told_apart_are_refused(prompts, ids, message):
    with pytest.raises(ValueError, match=message):
        prompt_keys(prompts, ids, 2)


def test_no_completion_needs_no_prompt():
    assert prompt_keys(None, None, 0) == []
