"""Statistics of a comparison, against values computed by hand."""

import math

import numpy as np
import pytest

from lenvm_rl.evaluation.frontier import (
    Outcomes,
    accuracy_within,
    bootstrap,
    concave_hull,
    efficiency_score,
    hypervolume,
    paired_bootstrap,
    percentile_interval,
    resampling,
    seed_interval,
    student_t,
    tokens_for,
)


def approx(*values):
    return pytest.approx(values, abs=1e-4)


def test_the_interval_over_seeds_is_students():
    # deviations -1, 0, 1: standard deviation 1; t(2) = 4.3027; half width 4.3027 / sqrt(3)
    assert seed_interval([1.0, 2.0, 3.0]) == approx(2.0, 2 - 2.48417, 2 + 2.48417)
    # five seeds: variance (4 + 1 + 0 + 1 + 4) / 4 = 2.5, t(4) = 2.7764, half width 2.7764 * sqrt(2.5 / 5)
    assert seed_interval([1.0, 2.0, 3.0, 4.0, 5.0]) == approx(3.0, 3 - 1.96321, 3 + 1.96321)


def test_equal_seeds_have_an_interval_of_no_width_and_one_seed_has_none():
    assert seed_interval([0.5, 0.5]) == (0.5, 0.5, 0.5)
    mean, low, high = seed_interval([0.5])
    assert mean == 0.5 and math.isnan(low) and math.isnan(high)


def test_quantiles_go_on_beyond_the_table():
    # t tables: 1 -> 12.706, 30 -> 2.0423, 31 -> 2.0395, 40 -> 2.0211, 120 -> 1.9799
    assert [student_t(d) for d in (1, 30, 31, 40, 120)] == approx(12.7062, 2.0423, 2.0395, 2.0211, 1.9799)


@pytest.mark.parametrize(
    ("accuracy", "tokens", "expected"),
    [
        (0.6, 50.0, 0.5 + 3 * 0.2),  # half the tokens, accuracy up by a fifth of 0.5
        (0.4, 50.0, 0.5 - 5 * 0.2),  # a loss weighs 5
        (0.5, 100.0, 0.0),
        (0.5, 150.0, -0.5),  # longer
    ],
)
def test_the_efficiency_score_weighs_a_loss_of_accuracy_more_than_a_gain(accuracy, tokens, expected):
    assert efficiency_score(accuracy, tokens, 0.5, 100.0) == pytest.approx(expected)


@pytest.mark.parametrize("base", [(0.0, 100.0), (0.5, 0.0), (math.nan, 100.0)])
def test_an_efficiency_score_needs_a_base(base):
    with pytest.raises(ValueError, match="nothing can be said"):
        efficiency_score(0.5, 50.0, *base)


def test_hypervolume_is_the_dominated_share_of_the_rectangle():
    # 100 tokens and accuracy 0.5 to 0 tokens and 1: an area of 50
    assert hypervolume([(40.0, 0.8)], (100.0, 0.5)) == pytest.approx(60 * 0.3 / 50)
    # (20, .6) adds 80 * .1 below it; of (40, .8) what is above .6: 60 * .2
    assert hypervolume([(40.0, 0.8), (20.0, 0.6)], (100.0, 0.5)) == pytest.approx((80 * 0.1 + 60 * 0.2) / 50)


def test_what_is_dominated_or_beyond_the_reference_adds_nothing():
    alone = hypervolume([(40.0, 0.8)], (100.0, 0.5))
    beyond = [(40.0, 0.8), (50.0, 0.7), (40.0, 0.7), (100.0, 0.9), (120.0, 0.99), (10.0, 0.5), (10.0, 0.2)]
    assert hypervolume(beyond, (100.0, 0.5)) == pytest.approx(alone)
    assert hypervolume([], (100.0, 0.5)) == 0.0
    assert hypervolume([(0.0, 1.0)], (100.0, 0.5)) == 1.0


@pytest.mark.parametrize("reference", [(0.0, 0.5), (100.0, 1.0)])
def test_a_reference_point_without_a_rectangle_is_refused(reference):
    with pytest.raises(ValueError, match="nothing to dominate"):
        hypervolume([(1.0, 0.9)], reference)


POINTS = [(20.0, 0.6), (30.0, 0.65), (40.0, 0.8), (50.0, 0.79), (60.0, 0.85), (20.0, 0.5)]


def test_the_frontier_is_the_upper_concave_hull():
    # (30, .65) lies below the line from (20, .6) to (40, .8), (50, .79) is dominated, (20, .5) too
    assert concave_hull(POINTS) == [(20.0, 0.6), (40.0, 0.8), (60.0, 0.85)]
    assert concave_hull([(30.0, 0.7)]) == [(30.0, 0.7)]


def test_accuracy_within_a_budget_of_tokens():
    assert accuracy_within(POINTS, 30.0) == pytest.approx(0.7)
    assert accuracy_within(POINTS, 20.0) == 0.6
    assert accuracy_within(POINTS, 99.0) == 0.85  # no more tokens than needed
    assert math.isnan(accuracy_within(POINTS, 19.9))


def test_tokens_for_an_accuracy():
    assert tokens_for(POINTS, 0.7) == pytest.approx(30.0)
    assert tokens_for(POINTS, 0.825) == pytest.approx(50.0)
    assert tokens_for(POINTS, 0.1) == 20.0
    assert math.isnan(tokens_for(POINTS, 0.86))


def outcomes(correct, tokens, seeds=None):
    correct, tokens = np.array(correct, dtype=bool), np.array(tokens)
    return Outcomes(correct, tokens, tuple(range(len(correct))) if seeds is None else seeds)


def test_outcomes_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="shape"):
        outcomes([[1, 0]], [[3, 4]], seeds=(0, 1))
    with pytest.raises(ValueError, match="shape"):
        outcomes([[1, 0]], [[3, 4, 5]])


def test_draws_are_shares_of_seeds_and_problems():
    draws = resampling(3, 5, replicates=7, seed=1)
    assert draws.of_seeds.shape == (7, 3) and draws.of_problems.shape == (7, 5)
    assert draws.of_seeds.sum(1) == pytest.approx(1.0) and draws.of_problems.sum(1) == pytest.approx(1.0)
    values = np.arange(15.0).reshape(3, 5)
    # replicate 0 by hand: the seeds' shares of the means over the problems' shares
    expected = sum(draws.of_seeds[0, s] * draws.of_problems[0, p] * values[s, p] for s in range(3) for p in range(5))
    assert draws.means(values)[0] == pytest.approx(expected)
    assert not np.array_equal(draws.of_problems, resampling(3, 5, 7, seed=2).of_problems)


def test_the_bootstrap_of_a_proportion_has_its_known_width():
    # 300 of 400 right: standard error sqrt(.75 * .25 / 400) = .02165, 1.96 of them .0424
    rng = np.random.default_rng(0)
    correct = rng.permutation(np.arange(400) < 300)[None]
    result = bootstrap(outcomes(correct, np.full((1, 400), 30)), resampling(1, 400, 8000))
    assert result.accuracy == pytest.approx((0.75, 0.75 - 0.0424, 0.75 + 0.0424), abs=0.003)
    assert result.tokens == (30.0, pytest.approx(30.0), pytest.approx(30.0))
    # 30 tokens / .75, and at the ends 30 / .7924 and 30 / .7076
    assert result.tokens_per_correct == pytest.approx((40.0, 37.86, 42.40), abs=0.2)


def test_seeds_that_differ_widen_the_interval():
    correct = np.concatenate([np.ones((1, 200)), np.zeros((1, 200))])
    result = bootstrap(outcomes(correct, np.ones((2, 200))))
    assert result.accuracy == approx(0.5, 0.0, 1.0)  # both seeds the same in half of the draws


def test_without_a_correct_answer_there_is_no_cost_of_one():
    cost = bootstrap(outcomes(np.zeros((1, 10)), np.ones((1, 10)))).tokens_per_correct
    assert math.isnan(cost.mean)


def test_percentiles_are_of_the_replicates():
    assert percentile_interval(50.0, np.arange(101.0)) == (50.0, 2.5, 97.5)


def test_pairing_removes_what_the_problems_have_in_common():
    # the same half of the problems is solved by both, and one method is 2 tokens longer on every problem
    rng = np.random.default_rng(0)
    correct, tokens = rng.random((3, 100)) < 0.5, rng.integers(10, 90, (3, 100))
    difference = paired_bootstrap(outcomes(correct, tokens + 2), outcomes(correct, tokens))
    assert difference.accuracy == approx(0.0, 0.0, 0.0)
    assert difference.tokens == approx(2.0, 2.0, 2.0)


def test_only_common_seeds_are_paired():
    ours = outcomes([[1, 1], [0, 0]], [[1, 1], [9, 9]], seeds=(0, 7))
    theirs = outcomes([[0, 0], [1, 1], [1, 1]], [[5, 5], [1, 1], [2, 2]], seeds=(7, 1, 2))
    difference = paired_bootstrap(ours, theirs)
    assert difference.tokens == approx(4.0, 4.0, 4.0)  # seed 7: 9 against 5
    assert difference.accuracy == approx(0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="no seed in common"):
        paired_bootstrap(outcomes([[1]], [[1]], seeds=(3,)), outcomes([[1]], [[1]], seeds=(4,)))
    with pytest.raises(ValueError, match="different numbers of problems"):
        paired_bootstrap(outcomes([[1]], [[1]]), outcomes([[1, 1]], [[1, 1]]))


def test_a_frontier_is_compared_at_the_tokens_and_at_the_accuracy_of_the_baseline():
    # constant per seed and problem but for the shares that are right, which repeat in blocks of ten problems
    def constant(accuracy, tokens):
        right = np.tile(np.arange(10) < 10 * accuracy, 40)[None]
        return outcomes(right, np.full((1, 400), tokens))

    short, long, theirs = constant(0.6, 20), constant(0.8, 40), constant(0.6, 30)
    difference = paired_bootstrap(short, theirs, [long])
    assert difference.accuracy == approx(0.0, 0.0, 0.0)
    assert difference.tokens == approx(-10.0, -10.0, -10.0)
    assert difference.accuracy_within.mean == pytest.approx(0.1)  # .7 at 30 tokens, halfway
    assert 0.05 < difference.accuracy_within.low < 0.1 < difference.accuracy_within.high < 0.15
    assert difference.accuracy_within_defined == 1.0
    assert difference.tokens_for.mean == pytest.approx(-10.0)  # .6 costs 20 tokens


def test_what_the_frontier_does_not_reach_is_left_open():
    ours, theirs = outcomes([[0, 0, 1, 0]], [[30] * 4]), outcomes([[1, 1, 1, 1]], [[20] * 4])
    difference = paired_bootstrap(ours, theirs)
    assert math.isnan(difference.accuracy_within.mean) and difference.accuracy_within_defined == 0.0
    assert math.isnan(difference.tokens_for.mean)
    # only where all four draws fall on the third problem
    assert difference.tokens_for_defined < 0.05
