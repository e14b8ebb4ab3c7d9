"""The report of a comparison, from folders of made-up runs."""

import json

import numpy as np
import pytest

from lenvm_rl.evaluation.contest_report import contest_table, plot_frontier, read_run, read_runs, summarise
from lenvm_rl.evaluation.report import write_json

PROBLEMS = 200


@pytest.fixture
def made_up(tmp_path):
    """Writes a run: the first `right` problems are solved, every completion has so many tokens."""

    def write(method, seed, right, tokens, knob=None, interrupted=False, problems=PROBLEMS):
        folder = tmp_path / "runs" / f"{method}-{knob}-{seed}"
        folder.mkdir(parents=True)
        text = "" if knob is None else str(knob)
        write_json(folder / "run.json", {"method": method, "knob": knob, "knob_text": text, "seed": seed})
        name = "before" if method == "start" else "after"
        arrays = {f"{name}_correct": np.arange(problems) < right, f"{name}_tokens": np.full(problems, tokens)}
        np.savez_compressed(folder / "outcomes.npz", **arrays)
        summary = {"before": None, "after": None, name: {"accuracy": right / problems}}
        summary |= {"interrupted": interrupted, "step_seconds": 100.0 + seed, "sampled_tokens": 2_000_000}
        write_json(folder / "summary.json", {**summary, "config": {"max_completion_length": 100}})
        return folder

    return write


@pytest.fixture
def contest(made_up, tmp_path):
    """Start at 50 % and 50 tokens; GRPO longer; LenVM in three settings; DLER in between."""
    made_up("start", 0, 100, 50)
    for seed in range(3):
        made_up("grpo", seed, 180 + seed, 60)
        made_up("lenvm", seed, 180 + 2 * seed, 25, knob=1.0)
        made_up("lenvm", seed, 160, 20, knob=2.0)
        made_up("lenvm", seed, 190, 45, knob=0.5)
        made_up("dler", seed, 170, 30, knob=48)
    return tmp_path


def test_a_summary_holds_what_was_computed_by_hand(contest):
    summary = summarise(contest)
    assert summary["problems"] == 200
    assert summary["start"] == {"accuracy": 0.5, "tokens": 50.0}
    assert summary["reference_point"] == {"tokens": 100.0, "accuracy": 0.5}
    rows = {(row["method"], row["knob"]): row for row in summary["rows"]}
    assert list(rows) == [("grpo", None), ("lenvm", 0.5), ("lenvm", 1.0), ("lenvm", 2.0), ("dler", 48)]
    lenvm = rows["lenvm", 1.0]
    assert lenvm["seeds"] == 3 and lenvm["seed_values"] == [0, 1, 2] and lenvm["recommended"] is True
    # .90, .91, .92: standard deviation .01, t(2) = 4.3027, half width .0248
    assert lenvm["accuracy"]["mean"] == pytest.approx(0.91)
    assert lenvm["accuracy"]["high"] == pytest.approx(0.91 + 0.02484, abs=1e-4)
    assert lenvm["tokens"] == {
        "mean": 25.0, "low": 25.0, "high": 25.0, "values": [25.0] * 3,
        "bootstrap_low": pytest.approx(25.0), "bootstrap_high": pytest.approx(25.0),
    }  # fmt: skip
    assert lenvm["tokens_per_correct"]["mean"] == pytest.approx(25 / 0.91)
    # half the tokens of the start, accuracy up by .41/.5; 35/60 of GRPO's tokens saved, up by .005/.905
    assert lenvm["efficiency_score"]["start"] == pytest.approx(0.5 + 3 * 0.82)
    assert lenvm["efficiency_score"]["grpo"] == pytest.approx(35 / 60 + 3 * 0.005 / 0.905)
    assert lenvm["hypervolume"] == pytest.approx(75 * 0.41 / 50)
    assert lenvm["training_seconds"] == pytest.approx(101.0)
    # 80 tokens * .3 at (20, .8), 75 * .11 more at (25, .91), 55 * .04 at (45, .95)
    methods = {m["method"]: m for m in summary["methods"]}
    assert methods["lenvm"]["hypervolume"] == pytest.approx((80 * 0.3 + 75 * 0.11 + 55 * 0.04) / 50)
    assert json.loads(json.dumps(summary)) == summary


def test_lenvm_is_compared_with_every_other_row(contest):
    comparisons = {one["baseline"]: one for one in summarise(contest)["comparisons"]}
    assert set(comparisons) == {"grpo", "dler"}
    dler = comparisons["dler"]
    assert dler["ours"] == "1.0" and dler["seeds"] == [0, 1, 2]
    assert dler["accuracy"]["mean"] == pytest.approx(0.06)
    assert dler["tokens"]["mean"] == pytest.approx(-5.0)
    # from (25, .91) to (45, .95): .92 at 30 tokens; .85 lies between (20, .8) and (25, .91)
    assert dler["accuracy_within"]["mean"] == pytest.approx(0.92 - 0.85)
    assert dler["tokens_for"]["mean"] == pytest.approx(20 + 5 * 0.05 / 0.11 - 30)
    assert comparisons["grpo"]["accuracy_within"]["mean"] == pytest.approx(0.95 - 0.905)


def test_the_table_says_it_for_people(contest):
    table = contest_table(summarise(contest))
    row = next(line for line in table.splitlines() if line.startswith("| LenVM | length_coef 1.0"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2] == "3" and cells[3] == "91.0 % (88.5 to 93.5)" and cells[5] == "25.0 (25.0 to 25.0)"
    assert cells[8] == "+2.96" and cells[11] == "2.00 M" and cells[12] == "101 s"
    assert "| start | | | 50.0 % | | 50.0 |" in table
    assert "from 100.0 tokens and 50.0 % accuracy to 0 tokens and 100 %" in table
    assert any(line.startswith("| DLER 48 | +6.0 (") for line in table.splitlines())
    for part in table.strip().split("\n\n"):
        if part.startswith("|"):
            assert len({line.count("|") for line in part.splitlines()}) == 1


def test_one_seed_takes_the_interval_over_problems_and_the_start_may_be_missing(made_up, tmp_path):
    made_up("lenvm", 0, 180, 25, knob=1.0)
    summary = summarise(tmp_path)
    accuracy = summary["rows"][0]["accuracy"]
    assert (accuracy["low"], accuracy["high"]) == (accuracy["bootstrap_low"], accuracy["bootstrap_high"])
    assert accuracy["low"] < 0.9 < accuracy["high"]
    assert "| start | | | - |" in contest_table(summary)
    plot_frontier(summary, tmp_path / "frontier.png")


def test_the_figure_has_a_point_with_intervals_for_each_row_and_a_line_along_a_knob(contest, tmp_path, monkeypatch):
    from matplotlib import pyplot as plt

    figures, close = [], plt.close
    monkeypatch.setattr(plt, "close", lambda figure: figures.append(figure) or close(figure))
    plot_frontier(summarise(contest), tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    (axis,) = figures[0].axes
    lines = {container.get_label(): container.lines[0] for container in axis.containers}
    assert list(lines) == ["GRPO", "LenVM", "DLER"]
    assert lines["LenVM"].get_xdata().tolist() == [20.0, 25.0, 45.0]
    assert lines["LenVM"].get_linestyle() == "-" and lines["GRPO"].get_linestyle() == "None"
    assert [text.get_text() for text in axis.texts] == ["2.0", "1.0", "0.5"]
    assert len({line.get_color() for line in lines.values()}) == 3
    assert len({line.get_marker() for line in lines.values()}) == 3


def test_all_methods_together_still_differ_in_the_figure(made_up, tmp_path, monkeypatch):
    from matplotlib import pyplot as plt

    from lenvm_rl.evaluation.contest import CONTENDERS

    for number, method in enumerate(CONTENDERS):
        made_up(method, 0, 150 + number, 20 + number)
    figures, close = [], plt.close
    monkeypatch.setattr(plt, "close", lambda figure: figures.append(figure) or close(figure))
    plot_frontier(summarise(tmp_path), tmp_path / "frontier.png")
    lines = [container.lines[0] for container in figures[0].axes[0].containers]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(CONTENDERS)


def test_a_second_panel_shows_closely_what_is_near_the_fewest_tokens(made_up, tmp_path, monkeypatch):
    from matplotlib import pyplot as plt

    for method, tokens in (("grpo", 60), ("lenvm", 25), ("dler", 24), ("hapo", 26), ("alp", 40)):
        made_up(method, 0, 150, tokens)
    figures, close = [], plt.close
    monkeypatch.setattr(plt, "close", lambda figure: figures.append(figure) or close(figure))
    plot_frontier(summarise(tmp_path), tmp_path / "frontier.png")
    whole, closely = figures[0].axes
    assert whole.get_xlim()[1] > 60 and 26 < closely.get_xlim()[1] < 40
    assert 23 < closely.get_xlim()[0] < 24


def test_what_is_not_finished_does_not_count(contest, made_up):
    assert read_run(made_up("hapo", 0, 10, 10, knob=1.0, interrupted=True)) is None
    half = made_up("kimi", 0, 10, 10, knob=0.4)
    (half / "outcomes.npz").unlink()
    assert read_run(half) is None
    assert ("kimi", "0.4") not in read_runs(contest) and ("hapo", "1.0") not in read_runs(contest)


def test_runs_of_different_evaluations_are_refused(contest, made_up):
    made_up("kimi", 0, 10, 10, knob=0.4, problems=100)
    with pytest.raises(ValueError, match="different numbers of problems"):
        summarise(contest)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no finished run"):
        summarise(tmp_path)
