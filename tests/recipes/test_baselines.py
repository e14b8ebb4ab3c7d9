"""The recipes of the baselines, as a user starts them."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
PAPER = {"grpo_dler": "dler-r1-distill-1.5b-deepscaler", "grpo_hapo": "hapo-r1-distill-1.5b-deepscaler"}


@pytest.mark.slow
def test_dler_trains_with_its_reward_and_its_optimiser(tmp_path):
    flags = ["--max_steps", "2", "--per_device_train_batch_size", "16", "--eval_problems", "20", "--limit", "24"]
    done = subprocess.run(
        [sys.executable, str(RECIPES / "grpo_dler.py"), *flags, "--output_dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    settings = {"limit": 24, "kept": 0.0, "easy_limit": None, "easy_ratio": 0.5}
    assert summary["reward"] == {"name": "DLER", "reward": "dler", "settings": settings}
    config = summary["config"]
    assert (config["advantage_normalization"], config["dynamic_sampling"]) == ("group_centred_batch_std", True)
    assert (config["epsilon"], config["epsilon_high"], config["length_coef"]) == (0.2, 0.28, 0.0)
    assert summary["before"]["problems"] == summary["after"]["problems"] == 20
    assert "GRPO with the length reward of DLER" in (tmp_path / "run" / "README.md").read_text()


@pytest.fixture
def recipe(monkeypatch, capsys):
    """Run a recipe in this process until it stops with an error; returns exit code and the error's line."""

    def run(name: str, *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
        return exit_.value.code, capsys.readouterr().err.strip().splitlines()[-1]

    return run


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_configuration_is_read_up_to_its_problems(recipe, tmp_path, name):
    config = RECIPES / "configs" / f"{PAPER[name]}.yaml"
    flags = ["--config", str(config), "--task", "no_data.jsonl", "--output_dir", str(tmp_path)]
    code, line = recipe(name, *flags)
    assert code == 2 and line.startswith("error: ") and "no_data.jsonl" in line


def test_the_papers_batches_are_those_of_the_papers():
    dler = yaml.safe_load((RECIPES / "configs" / f"{PAPER['grpo_dler']}.yaml").read_text())
    processes = 8
    update = processes * dler["per_device_train_batch_size"] * dler["gradient_accumulation_steps"]
    assert update == 64 * 16  # prompts of a mini-batch
    rollouts = processes * dler["per_device_train_batch_size"] * dler["steps_per_generation"]
    assert rollouts == 512 * 16  # prompts of a batch
    assert dler["save_steps"] * dler["gradient_accumulation_steps"] % dler["steps_per_generation"] == 0
    hapo = yaml.safe_load((RECIPES / "configs" / f"{PAPER['grpo_hapo']}.yaml").read_text())
    assert 4 * hapo["per_device_train_batch_size"] * hapo["gradient_accumulation_steps"] == 16


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("grpo_dler", ["--limit", "200"], "limit of 200 tokens"),
        ("grpo_dler", ["--limit", "40", "--easy_limit", "50"], "easy_limit is 50"),
        ("grpo_hapo", ["--weight", "2"], "weight"),
        ("grpo_baseline", ["--method", "dlre"], "There is no method 'dlre'"),
        ("grpo_baseline", ["--method", "laser", "--reward_settings", "{goal: 3}"], "has no setting goal"),
        ("grpo_baseline", [], "--method"),
    ],
)
def test_bad_input_is_one_line_that_names_the_fix(recipe, tmp_path, name, arguments, message):
    code, line = recipe(name, *arguments, "--eval_problems", "4", "--output_dir", str(tmp_path))
    assert code == 2 and message in line
