import json
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset

from lenvm_rl.evaluation.length_report import doubts, prompt_table, write_length_report
from lenvm_rl.evaluation.length_values import evaluate_lenvm
from lenvm_rl.evaluation.prompt_scores import PromptScores
from lenvm_rl.model import LengthValueModel

FIGURES = {"predicted_and_true.png", "calibration.png", "error_by_position.png", "lengths.png", "curves.png"}


def rollouts(cut, count=40):
    rng = np.random.default_rng(0)
    return Dataset.from_list(
        [
            {
                "prompt_ids": [5 + i // 4],
                "completion_ids": rng.integers(2, 100, rng.integers(1, 20)).tolist(),
                "finished": i % 4 != 3 if cut is None else not cut,
            }
            for i in range(count)
        ]
    )


@pytest.fixture(scope="module")
def critic(critic_folder):
    return LengthValueModel.from_pretrained(critic_folder)


@pytest.fixture(scope="module")
def evaluation(critic):
    return evaluate_lenvm(critic, rollouts(None))


def test_the_page_shows_its_figures_and_numbers(evaluation, tokenizer, tmp_path):
    facts = {"generator": "tiny", "trained on": "nothing"}
    page = write_length_report(
        evaluation, tmp_path / "report", title="A critic", tokenizer=tokenizer, facts=facts, ceiling=0.5
    )
    text = page.read_text()
    assert text.startswith("# A critic\n\n* generator: tiny\n* trained on: nothing\n* gamma 0.9: half of the range")
    assert {path.name for path in page.parent.iterdir()} == FIGURES | {"report.md", "metrics.json"}
    assert all(f"]({name})" in text for name in FIGURES)
    assert prompt_table(evaluation) in text and "(ceiling 0.500)" in text
    assert "evaluated on 40 completions of 10 prompts, of which 10 were cut" in text
    assert tokenizer.decode(evaluation.curves[0].prompt_ids) in text
    numbers = json.loads((page.parent / "metrics.json").read_text())
    assert numbers["explained_variance"] == pytest.approx(evaluation.scores.explained_variance)
    assert numbers["explained_variance_ceiling"] == 0.5 and numbers["generator"] == "tiny"
    assert numbers["prompt"]["relative_error"] == pytest.approx(evaluation.prompt.relative_error)


def test_a_page_without_a_finished_completion_shows_what_there_is(critic, tmp_path):
    page = write_length_report(evaluate_lenvm(critic, rollouts(cut=True)), tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"lengths.png", "curves.png"}
    assert "explained variance | - |" in page.read_text()
    assert json.loads((tmp_path / "metrics.json").read_text())["explained_variance"] is None


def test_the_table_puts_the_noise_floor_and_the_baselines_beside_the_critic(evaluation):
    lines = prompt_table(evaluation).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| noise floor (the truth, known)",
        "| **the critic**",
        "| mean length",
        "| length of the prompt",
    ]
    assert f"{evaluation.prompt.relative_error:.1%}" in lines[3]


def test_what_speaks_against_a_critic_is_said(evaluation):
    said = " ".join(doubts(evaluation))
    assert "rest on 30 finished completions" in said and "25.0% of the completions were cut" in said
    assert "As a baseline in RL it would remove little noise" in said
    worse = replace(evaluation, baselines={"mean length": replace(evaluation.prompt, relative_error=0.0)})
    assert any("it is no better than mean length" in doubt for doubt in doubts(worse))


def test_nothing_is_held_against_a_good_critic(evaluation):
    good = replace(
        evaluation,
        finished=np.ones(40, dtype=bool),
        scores=replace(evaluation.scores, completions=400, explained_variance=0.7, calibration_error=0.01),
        prompt=PromptScores(0.2, 0.1, 0.5, 0.01, 100, 400),
        baselines={"mean length": PromptScores(0.5, 0.1, 0.0, 0.0, 100, 400)},
    )
    assert doubts(good) == []
