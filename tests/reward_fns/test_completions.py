import pytest

from reward_fns.completions import completion_text


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("plain", "plain"),
        ("", ""),
        (None, ""),
        ([], ""),
        ([{"role": "assistant", "content": "said"}], "said"),
        ([{"content": "said"}], "said"),
        ({"role": "assistant", "content": "said"}, "said"),
        ([{"role": "assistant", "content": None}], ""),
        ([{"role": "assistant"}], ""),
        ([{"role": "assistant", "content": []}], ""),
        ([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], "ab"),
        ([{"role": "assistant", "content": [{"type": "image", "url": "u"}, {"type": "text", "text": "b"}]}], "b"),
        ([{"role": "assistant", "content": ["a", {"type": "text", "text": None}]}], "a"),
        ([{"role": "assistant", "content": "first"}, {"role": "assistant", "content": "last"}], "last"),
        ([{"role": "assistant", "content": "call"}, {"role": "tool", "content": r"\boxed{7}"}], "call"),
        ([{"role": "tool", "content": r"\boxed{7}"}], ""),
        ([{"role": "assistant", "content": "call"}, {"role": "assistant", "content": None}], ""),
    ],
)
def test_text_is_what_the_assistant_wrote_last(completion, text):
    assert completion_text(completion) == text


@pytest.mark.parametrize("completion", [7, ["text"], [{"role": "assistant", "content": 7}]])
def test_what_no_trainer_sends_is_refused(completion):
    with pytest.raises(ValueError, match=r"'role'|a string, None or"):
        completion_text(completion)
