import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lenvm_rl.evaluation.target_scores import (
    count_words,
    length_deviation,
    length_scores,
    mean_over_targets,
    ruler_matches,
    ruler_ranges,
)


def test_length_scores_are_those_of_lifebench():
    # by hand: 80, 100 and 150 tokens for 100 asked, deviations -0.2, 0 and 0.5
    lengths, targets = np.array([80, 100, 150]), np.array([100, 100, 100])
    assert length_deviation(lengths, targets) == pytest.approx([-0.2, 0, 0.5])
    assert length_scores(lengths, targets, "equal") == pytest.approx([100 / math.e, 100, 100 / math.e])
    assert length_scores(lengths, targets, "at_most") == pytest.approx([100, 100, 100 / math.e])
    assert length_scores(lengths, targets, "at_least") == pytest.approx([100 / math.e, 100, 100])


@given(st.integers(1, 2000), st.integers(1, 2000))
def test_the_score_of_equal_is_the_worse_of_the_other_two(length, target):
    pair = np.array([length]), np.array([target])
    equal, most, least = (length_scores(*pair, constraint)[0] for constraint in ("equal", "at_most", "at_least"))
    assert equal == min(most, least) and max(most, least) == 100


def test_every_target_counts_the_same_however_many_completions_it_has():
    scores, targets = np.array([100.0, 100, 100, 40]), np.array([32, 32, 32, 64])
    assert mean_over_targets(scores, targets) == 70


def test_words_stand_between_spaces_and_chinese_characters_alone():
    assert count_words("It's late -- 3 o'clock.") == 5  # a dash between spaces counts, as it does for split()
    assert count_words("你好，世界。") == 4
    assert count_words("用GPU训练 models") == 5
    assert count_words(" \n") == 0


@pytest.mark.parametrize(
    ("target", "precise", "flexible"),
    [
        (10, (0, 20), (0, 20)),
        (80, (70, 90), (60, 100)),
        (700, (630, 770), (600, 800)),
        (801, (800, math.inf), (800, math.inf)),
    ],
)
def test_rulers_ranges_are_the_released_ones(target, precise, flexible):
    assert ruler_ranges(target) == (precise, flexible)


def test_rulers_ranges_are_open_below_and_closed_above():
    # 150 words: precise (130, 170], flexible (100, 200]
    assert ruler_matches([130, 131, 170, 171, 100, 200], [150] * 6) == (2 / 6, 5 / 6)
    assert ruler_matches([900, 800], [1000, 1000]) == (0.5, 0.5)


def test_targets_between_rulers_levels_have_no_match():
    assert ruler_matches([40], [64]) is None and ruler_matches([800], [800]) is None and ruler_matches([], []) is None


def test_an_impossible_target_or_constraint_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        length_scores(np.array([5]), np.array([0]), "equal")
    with pytest.raises(ValueError, match="equal, at_most, at_least, got 'exactly'"):
        length_scores(np.array([5]), np.array([5]), "exactly")
