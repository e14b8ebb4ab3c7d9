import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_fns import GRPOLambdaReward

ROWS = st.lists(st.tuples(st.sampled_from("pqr"), st.integers(1, 40), st.booleans()), max_size=20)


def right(completions, **_):
    return [float(completion == "right") for completion in completions]


def test_only_the_best_solved_prompt_feels_its_length(batch):
    best = [("a", 10, True), ("a", 30, True)]
    rows = [("b", 10, True), ("b", 30, False), *best, ("c", 5, False), ("d", 5, False), ("e", 5, False)]
    terms = GRPOLambdaReward(right, top_share=0.2, alpha=0.4)(**batch(rows))
    assert terms == pytest.approx([0, 0, -0.107576, -0.292424, 0, 0, 0], abs=1e-6)


def test_share_is_rounded_up_and_the_first_of_equals_wins(batch):
    rows = [(prompt, 5, True) for prompt in "abcdef"]
    chosen = [
        sum(term < 0 for term in GRPOLambdaReward(right, top_share=share)(**batch(rows)))
        for share in (0.0, 0.1, 1 / 6, 0.2, 0.5, 1.0)
    ]
    assert chosen == [0, 1, 1, 2, 3, 6]
    assert GRPOLambdaReward(right, top_share=0.1)(**batch(rows)) == [-0.3, 0.0, 0.0, 0.0, 0.0, 0.0]


@given(rows=ROWS, share=st.sampled_from([0.2, 0.5, 1.0]))
def test_terms_agree_with_a_loop(batch, rows, share):
    terms = GRPOLambdaReward(right, top_share=share)(**batch(rows))
    prompts = list(dict.fromkeys(row[0] for row in rows))
    solved = [np.mean([row[2] for row in rows if row[0] == prompt]) for prompt in prompts]
    count = {0.2: [0, 1, 1, 1], 0.5: [0, 1, 1, 2], 1.0: [0, 1, 2, 3]}[share][len(prompts)]
    top = {prompts[i] for i in np.argsort(-np.array(solved), kind="stable")[:count]}
    for (prompt, tokens, correct), term in zip(rows, terms, strict=True):
        expected = 0.0
        if correct and prompt in top:
            lengths = [row[1] for row in rows if row[0] == prompt and row[2]]
            expected = -0.6 / (1 + np.exp(-(tokens - np.mean(lengths)) / (np.std(lengths) + 1e-7)))
        assert term == pytest.approx(expected)


@pytest.mark.parametrize("settings", [{"alpha": -0.1}, {"alpha": 1.1}, {"top_share": 1.1}, {"top_share": -1}])
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} is .*, but must be a finite number from 0 to 1"):
        GRPOLambdaReward(right, **settings)
