"""The PPO recipe, as a user starts it."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification
from trl import ModelConfig

from lenvm_rl.experiment import ExperimentArguments
from lenvm_rl.trainers.ppo import VALUE_FOLDER, LenVMPPOConfig

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "ppo_lenvm.py"
SMALL = ["--max_steps", "2", "--per_device_train_batch_size", "16", "--eval_problems", "24", "--train_problems", "32"]
SMALL += ["--value_warmup_steps", "1"]


def launch(*arguments, config=None):
    single = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    accelerate = ["accelerate.commands.launch", *(["--config_file", config] if config else single)]
    return subprocess.run(
        [sys.executable, "-m", *accelerate, str(RECIPE), *SMALL, *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_recipe_trains_both_models_and_leaves_its_results(tmp_path):
    output = tmp_path / "run"
    done = launch("--output_dir", str(output))
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((output / "summary.json").read_text())
    assert summary["method"] == "LenVM-PPO" and summary["steps"] == 2 and summary["after"]["problems"] == 24
    assert "LenVM-PPO" in (output / "README.md").read_text()
    AutoModelForCausalLM.from_pretrained(output)
    critic = AutoModelForTokenClassification.from_pretrained(output / VALUE_FOLDER)
    assert critic.score.weight.any()
    again = launch("--output_dir", str(tmp_path / "again"), "--value_model", str(output / VALUE_FOLDER))
    assert again.returncode == 0, again.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_two_processes_train_under_zero_3(tmp_path):
    config = str(ROOT / "recipes" / "accelerate" / "cpu_zero3.yaml")
    done = launch("--output_dir", str(tmp_path / "run"), config=config)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["distributed"] == {"type": "DEEPSPEED", "num_processes": 2, "zero_stage": 3}
    critic = AutoModelForTokenClassification.from_pretrained(tmp_path / "run" / VALUE_FOLDER)
    assert critic.score.weight.any()


@pytest.mark.parametrize("name", ["ppo_embedded", "ppo_qwen2.5-1.5b-gsm8k"])
def test_the_files_hold_settings_that_exist(name, tmp_path):
    settings = yaml.safe_load((ROOT / "recipes" / "configs" / f"{name}.yaml").read_text())
    known = {field.name for kind in (ExperimentArguments, LenVMPPOConfig, ModelConfig) for field in fields(kind)}
    assert set(settings) <= known
    own = {field.name for field in fields(LenVMPPOConfig)}
    args = LenVMPPOConfig(
        **{key: value for key, value in settings.items() if key in own}
        | {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "bf16": False}
    )
    # a checkpoint falls between two batches of rollouts
    window = args.steps_per_generation * args.num_iterations
    assert args.save_steps * args.gradient_accumulation_steps % window == 0
