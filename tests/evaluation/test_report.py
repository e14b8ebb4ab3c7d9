import json
import os

import pytest
from rich.console import Console

from lenvm_rl.evaluation.accuracy import Score
from lenvm_rl.evaluation.report import (
    comparison_table,
    console,
    plot_training_curves,
    sample_table,
    write_json,
    write_results,
)

BEFORE = Score(
    accuracy=0.8125,
    accuracy_low=0.7951,
    accuracy_high=0.8288,
    completion_tokens=40.0,
    tokens_per_correct=49.23,
    finished=0.97,
    problems=2000,
)
AFTER = Score(
    accuracy=0.0,
    accuracy_low=0.0,
    accuracy_high=0.0019,
    completion_tokens=25.0,
    tokens_per_correct=None,
    finished=1.0,
    problems=2000,
)


def rendered(table):
    plain = Console(width=160, force_terminal=False, no_color=True)
    with plain.capture() as capture:
        plain.print(table)
    return capture.get()


def cells(line):
    return [cell.strip() for cell in line.strip("│┃ \n").replace("┃", "│").split("│")]


def test_a_comparison_shows_the_change_of_tokens_against_the_first_row():
    lines = rendered(comparison_table({"before": BEFORE, "after": AFTER}, title="arithmetic")).splitlines()
    assert lines[0].strip() == "arithmetic"
    before = next(line for line in lines if "before" in line)
    after = next(line for line in lines if "after" in line)
    assert cells(before) == ["before", "81.2 %", "79.5 .. 82.9", "40.0", "", "49.2", "97.0 %"]
    assert cells(after) == ["after", "0.0 %", "0.0 .. 0.2", "25.0", "-38 %", "-", "100.0 %"]


def test_a_comparison_of_one_and_names_with_brackets_are_shown_as_they_are():
    shown = rendered(comparison_table({"run[red]": BEFORE}, title="file[v2].jsonl"))
    assert "run[red]" in shown and "file[v2].jsonl" in shown


def test_what_was_not_evaluated_is_left_out_of_a_comparison():
    lines = rendered(comparison_table({"before": None, "after": AFTER})).splitlines()
    assert not any("before" in line for line in lines)
    assert cells(next(line for line in lines if "after" in line))[4] == ""  # the first row that there is


def test_sample_completions_stand_beside_their_prompts():
    prompts = ["12 + 7 =", [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1 + 1 = ?"}]]
    table = sample_table(prompts, {"before": ["check [bold]19", "2"], "after": ["\\boxed{19}", "two"]})
    shown = rendered(table)
    rows = [cells(line) for line in shown.splitlines() if "+" in line and "│" in line]
    assert rows == [["12 + 7 =", "check [bold]19", "\\boxed{19}"], ["1 + 1 = ?", "2", "two"]]
    assert "be brief" not in shown


def test_json_is_written_whole_and_replaces_the_old_one(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"accuracy": 0.5, "after": None})
    write_json(path, {"accuracy": 0.75})
    assert json.loads(path.read_text()) == {"accuracy": 0.75}
    assert path.read_text().endswith("}\n")
    assert os.listdir(tmp_path) == ["summary.json"]


def test_what_cannot_be_written_leaves_the_old_json(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json(path, {"accuracy": 0.5})
    with pytest.raises(TypeError):
        write_json(path, {"accuracy": object()})
    assert json.loads(path.read_text()) == {"accuracy": 0.5}

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"accuracy": 0.6})
    assert json.loads(path.read_text()) == {"accuracy": 0.5}


LOGS = [
    {"step": 1, "length/correct_rate": 0.8, "completions/mean_length": 40.0, "length/correct_tokens": 38.0},
    {"step": 2, "length/correct_rate": 0.9, "completions/mean_length": 30.0, "length/explained_variance": float("nan")},
    {"step": 2, "train_runtime": 12.0},
]


def test_curves_are_drawn_from_the_log(tmp_path):
    plot_training_curves(LOGS, tmp_path / "curves.png", title="LenVM-GRPO")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_panels_without_data_are_left_out(tmp_path, monkeypatch):
    from matplotlib import pyplot as plt

    figures, close = [], plt.close
    monkeypatch.setattr(plt, "close", lambda figure: figures.append(figure) or close(figure))
    plot_training_curves([{**entry, "length/explained_variance": None} for entry in LOGS], tmp_path / "curves.png")
    accuracy, length = figures[0].axes
    assert (accuracy.get_title(), length.get_title()) == ("accuracy", "completion length")
    assert accuracy.lines[0].get_xydata().tolist() == [[1.0, 0.8], [2.0, 0.9]]
    assert [line.get_label() for line in length.lines] == ["mean length", "correct tokens"]
    assert length.get_legend() is not None and accuracy.get_legend() is None
    for coefficients, panels in (([1.0, 1.0], 2), ([1.0, 1.5], 3)):
        log = [{**LOGS[0], "step": step, "length/coef": value} for step, value in enumerate(coefficients)]
        plot_training_curves(log, tmp_path / "curves.png")
        assert len(figures[-1].axes) == panels


@pytest.mark.parametrize("log", [[], [{"step": 1, "loss": 0.1}], [{"step": 1, "length/correct_rate": None}]])
def test_without_data_no_curves_are_written(log, tmp_path):
    plot_training_curves(log, tmp_path / "curves.png")
    assert os.listdir(tmp_path) == []


def results(folder, scores, log_history, critic):
    write_results(
        folder,
        policy="embedded/policy",
        critic=critic,
        task="arithmetic",
        scores=scores,
        log_history=log_history,
        summary={"steps": 80, "seconds": 12.5},
    )
    return json.loads((folder / "summary.json").read_text()), (folder / "README.md").read_text()


def test_results_are_a_summary_a_model_card_and_curves(tmp_path):
    summary, card = results(tmp_path, {"before": BEFORE, "after": AFTER}, LOGS, "embedded/length_critic")
    assert sorted(os.listdir(tmp_path)) == ["README.md", "curves.png", "summary.json"]
    assert summary["before"] == BEFORE.to_dict() and summary["after"]["tokens_per_correct"] is None
    assert (summary["steps"], summary["seconds"]) == (80, 12.5)
    assert summary["curve"] == [
        {"step": 1, "accuracy": 0.8, "tokens": 40.0},
        {"step": 2, "accuracy": 0.9, "tokens": 30.0},
    ]
    assert f"# {tmp_path.name}" in card
    assert "`embedded/policy`, trained for 80 optimizer steps of LenVM-GRPO with the length critic" in card
    assert "| before | 81.2% (79.5% to 82.9%) | 40.0 | 2,000 |" in card.splitlines()


def test_an_interrupted_run_without_evaluation_leaves_results_too(tmp_path):
    summary, card = results(tmp_path, {"before": None, "after": None}, [], critic=None)
    assert sorted(os.listdir(tmp_path)) == ["README.md", "summary.json"]
    assert summary == {"before": None, "after": None, "steps": 80, "seconds": 12.5, "curve": []}
    assert "optimizer steps of GRPO on the task `arithmetic`" in card and "It was not evaluated." in card


def test_tables_are_wide_where_the_output_is_no_terminal(capsys):
    console().print(comparison_table({"before": BEFORE}))
    assert "tokens per correct" in capsys.readouterr().out
    assert console().width == 140
