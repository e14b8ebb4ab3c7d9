import math

import pytest
import torch
from torch.testing import assert_close

from lenvm_rl.decoding import AtLeast, AtMost, Candidates, LengthTarget, LengthTilt, SoftTarget
from lenvm_rl.decoding.steering import reweight

GAMMA = 0.9


def candidates(probs, remaining, generated=0, ends=(0,)):
    """One request; a remaining length of 0 belongs to the end token in the first place."""
    lengths = torch.tensor([remaining], dtype=torch.float64)
    logits = torch.log(torch.expm1(-lengths * math.log(GAMMA)))
    is_end = torch.zeros(lengths.shape, dtype=torch.bool)
    is_end[:, list(ends)] = True
    return Candidates(
        log_probs=torch.tensor([probs]).log(),
        logits=logits.masked_fill(is_end, -math.inf).float(),
        present=torch.ones_like(is_end),
        is_end=is_end,
        generated=torch.tensor([generated]),
        gamma=GAMMA,
    )


def distribution(control, *args, **kwargs):
    return reweight(candidates(*args, **kwargs), [control]).softmax(1)[0]


def logit(value):
    return math.log(value / (1 - value))


def test_tilt_multiplies_probabilities_by_the_exponential_of_the_value():
    # u = 0, 0.5, 0.8 and beta = -2: 0.5, 0.3 e^-1 = 0.110364, 0.2 e^-1.6 = 0.040379, sum 0.650743
    remaining = [0.0, math.log(0.5) / math.log(GAMMA), math.log(0.2) / math.log(GAMMA)]
    q = distribution(LengthTilt(-2.0), [0.5, 0.3, 0.2], remaining)
    assert_close(q, torch.tensor([0.768352, 0.169597, 0.062051]), atol=1e-5, rtol=0)
    longer = distribution(LengthTilt(2.0), [0.5, 0.3, 0.2], remaining)
    assert longer[2] > 0.2 and longer[0] < 0.5


def test_target_takes_the_candidate_that_ends_nearest_to_n():
    # n = 12, 3 tokens are there, this one is the 4th: 8 should remain
    q = distribution(LengthTarget(12), [0.1, 0.2, 0.3, 0.4], [0, 6.9, 8.6, 9.5], generated=3)
    assert q.tolist() == [0, 0, 1, 0]


def test_target_gives_ties_to_the_more_probable_candidate_and_then_to_the_smaller_id():
    assert distribution(LengthTarget(9), [0.1, 0.2, 0.3], [0, 8, 8])[2] == 1
    assert distribution(LengthTarget(9), [0.1, 0.45, 0.45], [0, 8, 8])[1] == 1


def test_target_tells_neighbours_apart_where_float32_values_are_equal():
    remaining = [0, 195.0, 196.0, 197.0]
    values = torch.sigmoid(candidates([0.25] * 4, remaining).logits)
    assert values[0, 1] == values[0, 2] == values[0, 3]
    assert distribution(LengthTarget(197), [0.25] * 4, remaining)[2] == 1


def test_target_ends_early_only_where_all_else_overshoots_by_more():
    # one token should remain: 1 too short against 2 too long, and against 1 too long
    assert distribution(LengthTarget(5), [0.5, 0.5], [0, 3], generated=3)[0] == 1
    assert distribution(LengthTarget(5), [0.4, 0.6], [0, 1.9], generated=3)[1] == 1


def test_at_most_does_not_touch_a_distribution_that_fits():
    given = candidates([0.1, 0.5, 0.4], [0, 4.4, 2], generated=1)  # 4 may remain
    assert torch.equal(reweight(given, [AtMost(6)]), given.log_probs)


def test_at_most_shares_the_mass_among_candidates_that_fit_and_leaves_the_end_its_own():
    # 4 may remain: 9 is too long, 4 and 3 keep their odds 1 : 3 and share 0.9
    q = distribution(AtMost(6), [0.1, 0.5, 0.1, 0.3], [0, 9, 4, 3], generated=1)
    assert_close(q, torch.tensor([0.1, 0.0, 0.225, 0.675]))


def test_at_most_takes_the_shortest_where_none_fits():
    q = distribution(AtMost(6), [0.1, 0.5, 0.3, 0.1], [0, 9, 7, 8], generated=1)
    assert_close(q, torch.tensor([0.1, 0.0, 0.9, 0.0]))


def test_at_most_goes_on_where_the_end_is_impossible():
    q = distribution(AtMost(6), [0.0, 0.6, 0.4], [0, 9, 7])
    assert_close(q, torch.tensor([0.0, 0.0, 1.0]))


def test_at_least_with_foresight_keeps_what_reaches_n_or_the_longest():
    no_end = {"ends": ()}
    q = distribution(AtLeast(10, foresight=True), [0.2, 0.3, 0.5], [9, 8.6, 4], **no_end)
    assert_close(q, torch.tensor([0.4, 0.6, 0.0]))
    assert distribution(AtLeast(30, foresight=True), [0.2, 0.3, 0.5], [9, 8.6, 4], **no_end)[0] == 1


def test_at_least_needs_no_critic_without_foresight_or_once_n_is_reached():
    assert not AtLeast(10).needs_critic(0)
    assert AtLeast(10, foresight=True).needs_critic(8) and not AtLeast(10, foresight=True).needs_critic(9)
    assert AtLeast(10).bans_end(8) and not AtLeast(10).bans_end(9)


def test_soft_target_moves_the_mean_value_to_that_of_what_should_remain():
    given = candidates([0.1, 0.3, 0.6], [0, 5, 20], generated=4)
    q = reweight(given, [SoftTarget(15)]).double().softmax(1)
    assert_close((q * given.values).sum(1), torch.tensor([1 - GAMMA**10], dtype=torch.float64), atol=1e-6, rtol=0)


def test_soft_target_bends_no_further_than_its_bound():
    # 30 should remain, and the longest candidate has 20: the bound decides
    given = candidates([0.5, 0.5], [0, 20])
    u = 1 - GAMMA**20
    expected = 1 / (1 + math.exp(-3.0 * u))
    assert_close(distribution(SoftTarget(31, max_beta=3.0), [0.5, 0.5], [0, 20])[1].item(), expected, atol=1e-5, rtol=0)
    assert reweight(given, [SoftTarget(31, max_beta=math.inf)]).softmax(1).tolist() == [[0, 1]]


def test_a_combination_tilts_what_is_left_after_the_budget():
    # with 4 left: 9 is out; the tilt by -2 applies to what stays, before the end keeps its share
    both = distribution(LengthTilt(-2.0) & AtMost(6), [0.1, 0.5, 0.4], [0, 9, 4], generated=1)
    tilted = distribution(LengthTilt(-2.0), [0.1, 0.5, 0.4], [0, 9, 4])
    assert_close(both, torch.tensor([tilted[0], 0.0, 1 - tilted[0]]))


def test_each_row_follows_its_own_control():
    one = candidates([0.1, 0.5, 0.4], [0, 9, 4], generated=1)
    batch = Candidates(
        *(torch.cat([x] * 3) for x in (one.log_probs, one.logits, one.present, one.is_end, one.generated)), GAMMA
    )
    controls = [LengthTilt(3.0), AtMost(6), LengthTilt(-1.0)]
    together = reweight(batch, controls)
    for row, control in enumerate(controls):
        assert torch.equal(together[row : row + 1], reweight(one, [control]))


@pytest.mark.parametrize("beta", [math.inf, -math.inf, math.nan, True, "2"])
def test_a_tilt_must_be_a_finite_number(beta):
    with pytest.raises(ValueError, match="finite beta"):
        LengthTilt(beta)


@pytest.mark.parametrize("control", [LengthTarget, AtMost, AtLeast, SoftTarget])
@pytest.mark.parametrize("n", [0, -3, 2.5, True])
def test_a_length_is_a_whole_number_of_at_least_one_token(control, n):
    with pytest.raises(ValueError, match="at least 1 token"):
        control(n)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((AtLeast(50), AtMost(20)), "contradict"),
        ((AtLeast(31), LengthTarget(30)), "contradict"),
        ((AtMost(20), AtMost(30)), "twice"),
        ((LengthTilt(1.0), LengthTarget(30)), "two lengths at once"),
        ((SoftTarget(10), LengthTilt(1.0)), "two lengths at once"),
        ((LengthTarget(30), AtMost(40)), "nothing to add"),
    ],
)
def test_contradictions_are_refused_where_they_are_written(parts, message):
    with pytest.raises(ValueError, match=message):
        parts[0] & parts[1]
    with pytest.raises(ValueError, match=message):
        parts[1] & parts[0]


def test_a_bound_of_zero_is_refused():
    with pytest.raises(ValueError, match="positive max_beta"):
        SoftTarget(10, max_beta=0)


def test_a_combination_reweights_as_its_parts_do_one_after_the_other():
    control = LengthTilt(-2.0) & AtLeast(9, foresight=True)
    some = candidates([0.5, 0.3, 0.2], [0, 2.0, 9.0], generated=3)
    alone = control.reweight(some.log_probs, some, torch.empty(1, 0)).softmax(1)
    assert_close(alone, reweight(some, [control]).softmax(1))
    assert alone[0, 2] == 1  # the tilt sees all three, and only the last one reaches 9 tokens
