import math

import numpy as np
import pytest

from lenvm_rl.evaluation.length_tokens import (
    TokenType,
    compare_tokens,
    length_changes,
    rank_correlation,
    strongest,
    td_scores,
    token_types,
)

GAMMA = 0.9


def logits_of(remaining):
    """z of known remaining lengths: u = 1 - gamma^l."""
    u = 1 - GAMMA ** np.array(remaining, dtype=float)
    return np.log(u / (1 - u))


def test_a_critic_that_knows_the_remainder_scores_zero():
    z = np.append(logits_of([4, 3, 2, 1]), 123.0)  # after the end token it may say anything
    assert td_scores(z, GAMMA, finished=True) == pytest.approx(np.zeros(4), abs=1e-12)
    assert length_changes(z, GAMMA, finished=True) == pytest.approx(np.zeros(4), abs=1e-9)


def test_scores_have_the_sign_of_the_surprise_by_hand():
    # 5 tokens expected, 7 after the first one: u goes from 1 - .9^5 to 1 - .9^7
    z = logits_of([5, 7, 6])
    scores = td_scores(z, GAMMA, finished=False)
    assert scores == pytest.approx([0.9 * (1 - 0.9**7) - (1 - 0.9**5) + 0.1, 0], abs=1e-9)
    assert scores[0] == pytest.approx(0.9**5 - 0.9**8) and scores[0] > 0
    assert length_changes(z, GAMMA, finished=False) == pytest.approx([3, 0], abs=1e-9)
    # an end that comes 3 tokens early
    assert td_scores(logits_of([4, 9]), GAMMA, finished=True) == pytest.approx([0.9**4 - 0.9], abs=1e-9)


def test_types_sum_up_all_occurrences_with_their_contexts():
    # token 7 adds 2 tokens once and takes 1 away once; token 8 is as expected
    completions = [[7, 8], [8, 7, 1]]
    logits = [logits_of([5, 6, 5]), logits_of([9, 8, 6, 1])]
    types = token_types(completions, logits, [False, True], GAMMA, leave_out=[1])
    assert set(types) == {7, 8} and [types[7].count, types[8].count] == [2, 2]
    assert types[7].per_completion == 1.0
    up, down = 0.9 * (1 - 0.9**6) - (1 - 0.9**5) + 0.1, 0.9 * (1 - 0.9**6) - (1 - 0.9**8) + 0.1
    assert types[7].score == pytest.approx((up + down) / 2)
    assert types[7].error == pytest.approx(abs(up - down) / 2)  # standard deviation of two over sqrt(2)
    assert types[7].tokens == pytest.approx((2 - 1) / 2)
    assert types[8].score == pytest.approx(0, abs=1e-9)
    first = types[7].contexts[0]
    assert (first.score, first.before, first.after) == (pytest.approx(up), [], [8])
    assert types[7].contexts[1].before == [8] and types[7].contexts[1].after == [1]


def kind(token, score, count=100, error=0.01, per_completion=1.0):
    return TokenType(token, count, per_completion, score, error, 10 * score)


def test_lists_hold_what_is_frequent_and_certain():
    kinds = [kind(1, 0.5), kind(2, 0.9, count=3), kind(3, 0.7, error=0.4), kind(4, 0.1), kind(5, -0.2), kind(6, 0.8)]
    longer, shorter = strongest({one.token: one for one in kinds}, 2, least_count=10)
    assert [one.token for one in longer] == [6, 1] and [one.token for one in shorter] == [5]
    assert not kind(1, 0.5, count=1, error=math.nan).certain


def test_rl_that_removes_what_was_marked_has_a_rank_correlation_of_minus_one():
    before = {
        t: kind(t, s, per_completion=f) for t, s, f in [(1, 0.3, 4.0), (2, 0.1, 2.0), (3, -0.1, 1.0), (4, -0.3, 1.0)]
    }
    after = {1: kind(1, 0, per_completion=1.0), 2: kind(2, 0, per_completion=1.0), 4: kind(4, 0, per_completion=1.5)}
    found = compare_tokens(before, after, least_count=10)
    # changes -3, -1, -1 (token 3 vanished) and +0.5, scores .3, .1, -.1, -.3: ranks 4 3 2 1 against 1 2.5 2.5 4
    assert found.correlation == pytest.approx(-4.5 / math.sqrt(5 * 4.5))
    assert (found.changes[0].token, found.changes[0].change) == (1, -3.0)
    assert found.removed_marked == pytest.approx(4 / 5) and found.marked_before == pytest.approx(6 / 8)
    assert found.low <= found.correlation
    # by ratio token 3, which vanished, lost most: ratios 1/4, 1/2, ~0, 3/2
    assert found.relative_correlation == pytest.approx(rank_correlation(np.array([4, 3, 2, 1]), np.array([2, 3, 1, 4])))


def test_equal_values_share_their_rank():
    assert rank_correlation(np.array([1, 2, 2, 3]), np.array([10, 20, 20, 40])) == pytest.approx(1)
    assert math.isnan(rank_correlation(np.ones(3), np.arange(3)))


def test_too_few_tokens_cannot_be_correlated():
    with pytest.raises(ValueError, match="2 tokens occurred 10 times or more"):
        compare_tokens({1: kind(1, 0.1), 2: kind(2, 0.1)}, {}, least_count=10)
    with pytest.raises(ValueError, match="no completions to count"):
        token_types([], [], [], GAMMA)
