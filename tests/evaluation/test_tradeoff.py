import json

import numpy as np
import pytest

from lenvm_rl.evaluation.frontier import Outcomes
from lenvm_rl.evaluation.tradeoff import Curve, CurvePoint, area_under, gaps, hard_budget, summarise_curves


def outcomes(correct, tokens):
    return Outcomes(np.array([correct], dtype=bool), np.array([tokens]), (0,))


def curve(name, *points, knob_name=None):
    return Curve(name, tuple(CurvePoint(str(i), point, float(i)) for i, point in enumerate(points)), knob_name)


def test_a_hard_budget_takes_what_ended_within_it():
    unguided = outcomes([1, 1, 0, 1], [10, 30, 5, 40])
    finished = np.array([[True, True, True, False]])
    cut = hard_budget(unguided, finished, [8, 10, 40])
    # at 8 tokens nothing right has ended; at 10 the first; at 40 the last was still being written, but had an answer
    assert [point.outcomes.correct[0].tolist() for point in cut.points] == [
        [False] * 4,
        [True, False, False, False],
        [True, True, False, False],
    ]
    assert cut.means == [(7.25, 0.0), (8.75, 0.25), (21.25, 0.5)]
    with pytest.raises(ValueError, match="at least one token"):
        hard_budget(unguided, finished, [0])


def test_the_area_under_a_frontier_by_hand():
    # a straight line from the origin to (10, 1), then flat to 20: 5 + 10 of 20
    assert area_under([(10, 1.0)], 20) == pytest.approx(15 / 20)
    # cut off in the middle of the rise
    assert area_under([(10, 1.0)], 5) == pytest.approx(0.25)
    # a point below the line adds nothing, one above it does: 0.6 at 4, so 1.2 + 0.8 * 6 of 10
    assert area_under([(10, 1.0), (5, 0.2)], 10) == pytest.approx(0.5)
    assert area_under([(10, 1.0), (4, 0.6)], 10) == pytest.approx((1.2 + 4.8) / 10)
    with pytest.raises(ValueError, match="above 0 tokens"):
        area_under([(10, 1.0)], 0)


def test_a_gap_is_the_distance_of_the_frontiers_at_the_others_tokens():
    ours = curve("tilt", outcomes([1, 1, 1, 1], [10] * 4))
    theirs = curve("budget", outcomes([1, 0, 0, 0], [5] * 4), outcomes([1, 1, 1, 1], [20] * 4))
    first, last = gaps(ours, theirs, replicates=50)
    # ours reaches 0.5 at 5 tokens by answering half; theirs lies at 0.25, on its own line from (0, 0) to (20, 1)
    assert (first.tokens, first.ours, first.theirs) == (5.0, 0.5, pytest.approx(0.25))
    assert first.difference.mean == pytest.approx(0.25) and first.difference.low <= 0.25 <= first.difference.high
    assert (last.ours, last.theirs, last.difference.mean) == (1.0, 1.0, 0.0)


def test_equal_curves_have_no_gap_in_any_draw():
    rng = np.random.default_rng(0)
    points = [outcomes(rng.random(50) < p, rng.integers(1, 40, 50)) for p in (0.3, 0.6, 0.9)]
    for gap in gaps(curve("a", *points), curve("b", *points), replicates=30):
        assert gap.difference == (0, 0, 0)


def test_curves_of_other_problems_cannot_be_paired():
    with pytest.raises(ValueError, match="cannot be paired"):
        gaps(curve("a", outcomes([1], [2])), curve("b", outcomes([1, 1], [2, 2])))


def test_the_summary_holds_the_curves_their_areas_and_gaps_as_json():
    unguided = outcomes([1, 1, 0, 1], [10, 30, 5, 35])
    budget = hard_budget(unguided, np.ones((1, 4), bool), [10, 35])
    tilt = curve("tilt", outcomes([1, 1, 0, 1], [5, 5, 5, 5]), knob_name="beta")
    summary = json.loads(
        json.dumps(summarise_curves([tilt, budget], unguided=unguided, compare={"tilt": "hard budget"}))
    )
    assert (summary["problems"], summary["unguided"]["tokens"]["mean"]) == (4, 20.0)
    first, second = summary["curves"]
    assert (first["name"], first["knob_name"], second["name"]) == ("tilt", "beta", "hard budget")
    # (5, 0.75), then flat to 20 tokens: 1.875 + 11.25 of 20
    assert first["area"] == pytest.approx((1.875 + 11.25) / 20) and first["hypervolume"] == pytest.approx(0.75 * 0.75)
    assert [gap["budget"] for gap in summary["gaps"]["tilt over hard budget"]] == ["10", "35"]
    assert summary["curves"][0]["points"][0]["tokens_per_correct"]["mean"] == pytest.approx(20 / 3)
