import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_fns import validate_golds
from reward_fns.answers import LONGEST_ANSWER, answer_of, box_spans, gold_of, last_box


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so $\boxed{7}$.", "7"),
        (r"\boxed{ 7 }", "7"),
        (r"\boxed {7}", "7"),
        (r"\fbox{7}", "7"),
        (r"\\boxed{7}", "7"),
        (r"\boxed{\frac{3}{4}} cups", r"\frac{3}{4}"),
        (r"\boxed{\left\{ 1, 2 \right\}}", r"\left\{ 1, 2 \right\}"),
        (r"\boxed{\begin{pmatrix}1\\{2}\end{pmatrix}}", r"\begin{pmatrix}1\\{2}\end{pmatrix}"),
        (r"\boxed{3} no, \boxed{7}", "7"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{7} and then \boxed{8", "7"),
        (r"{ \boxed{7}", "7"),
        (r"} \boxed{7}", "7"),
        (r"<think>\boxed{3}</think> \boxed{7}", "7"),
        (r"\boxed{3}</think>\boxed{7}", "7"),
        (r"\boxed{7} <think> is it 8? \boxed{8}", "7"),
        ("so 3 + 4 = 7\n#### 7", "7"),
        ("#### 7\nbecause I say so", "7"),
        ("#### 3\n#### 7", "7"),
        (r"#### 3 \boxed{7}", "7"),
    ],
)
def test_answer_is_the_last_box_or_what_follows_the_hashes(text, answer):
    assert answer_of(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        "",
        "the answer is 7",
        r"\boxed{}",
        r"\boxed{  }",
        r"\boxed{7",
        r"\boxed 7",
        r"\boxed7",
        "####",
        "#### \n",
        r"<think> perhaps \boxed{7}",
        r"<think> perhaps \boxed{7} </think> the answer is 7",
        "<think> #### 7 </think>",
    ],
)
def test_text_without_a_finished_answer_has_none(text):
    assert answer_of(text) is None


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("7", "7"),
        ("  7\n", "7"),
        ("9 * 2 = $<<9*2=18>>18 a day.\n#### 18", "18"),
        ("#### 109,200,000", "109200000"),
        (r"Hence $\boxed{\frac{14}{3}}$ is our answer.", r"\frac{14}{3}"),
        (r"first \boxed{1}, then $\boxed{p - q}.$", "p - q"),
        (r"Hence $\boxed 7$.", "7"),
        (r"Hence $\boxed \pi$.", r"\pi"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\left( 3, \frac{\pi}{2} \right)"),
    ],
)
def test_gold_is_its_box_else_what_follows_the_hashes_else_all_of_it(gold, answer):
    assert gold_of(gold) == answer


def balanced() -> st.SearchStrategy[str]:
    leaf = st.text(alphabet="ab1+ \\frc", max_size=4).filter(lambda text: not text.endswith("\\"))
    return st.recursive(leaf, lambda inner: st.lists(inner, max_size=3).map(lambda parts: "{" + "".join(parts) + "}"))


@given(before=st.text(max_size=20), contents=balanced(), after=st.text(alphabet="ab }.$", max_size=10))
def test_box_with_balanced_braces_is_found_whatever_surrounds_it(before, contents, after):
    assert last_box(f"{before} \\boxed{{{contents}}}{after}") == contents


@given(st.text(alphabet="\\boxed{} a", max_size=60))
def test_spans_lie_between_the_braces_of_a_box(text):
    for start, end in box_spans(text):
        assert text[end] == "}" and text[:start].rstrip("{ ").endswith(r"\boxed")


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" + "{" * 100_000 + "7" + "}" * 100_001,
        "\\boxed{" * 100_000 + "7" + "}" * 100_000,
        "\\boxed{" * 100_000,
        "\\boxed" * 100_000,
        "\\" * 200_000 + "boxed{7}",
        "\\boxed" + " " * 200_000 + "{7",
        "\\boxed{7}" * 50_000,
        "<think>" * 100_000,
        "####" * 100_000,
    ],
    ids=["nested braces", "nested boxes", "open boxes", "bare", "backslashes", "spaces", "boxes", "think", "hashes"],
)
def test_time_is_linear_in_the_text(text):
    start = time.perf_counter()
    answer_of(text)
    assert time.perf_counter() - start < 2.0


def test_good_golds_pass():
    validate_golds(["7", r"\boxed{7}", "#### 7", "p - q", "x" * LONGEST_ANSWER])


@pytest.mark.parametrize("gold", [4, 4.0, None, True, ["4"], float("nan"), b"4"])
def test_gold_of_the_wrong_type_is_refused_by_row_and_column(gold):
    message = rf"row 2 of column 'target' holds .*{type(gold).__name__}.*must be a string.*Convert the column"
    with pytest.raises(ValueError, match=message):
        validate_golds(["7", "8", gold, None], column="target")


@pytest.mark.parametrize("gold", ["", "  ", r"\boxed{}", "worked out\n####", "#### "])
def test_gold_without_an_answer_is_refused(gold):
    with pytest.raises(ValueError, match=r"row 1 of column 'solution' .* without an answer: fill it in or drop"):
        validate_golds(["7", gold])


def test_prose_without_a_marked_answer_is_refused():
    with pytest.raises(ValueError, match=r"row 0 .* gold of 599 characters .* mark the answer"):
        validate_golds(["because " * 75])
