"""The main recipe, as a user starts it."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lenvm_rl.assets import model_path
from lenvm_rl.trainers.grpo import LenVMGRPOTrainer

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "grpo_lenvm.py"
SMALL = ["--max_steps", "2", "--per_device_train_batch_size", "16", "--eval_problems", "24", "--train_problems", "32"]


def launch(*arguments: str, config: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    single = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    accelerate = ["accelerate.commands.launch", *(["--config_file", config] if config else single)]
    return subprocess.run(
        [sys.executable, "-m", *accelerate, str(RECIPE), *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
    )


def documented_metrics() -> set[str]:
    return set(re.findall(r"length/\w+", LenVMGRPOTrainer.__doc__ or ""))


@pytest.mark.slow
def test_the_recipe_trains_evaluates_and_leaves_its_results(tmp_path):
    output = tmp_path / "run"
    done = launch(
        *SMALL, "--output_dir", str(output), "--report_to", "wandb", WANDB_MODE="offline", WANDB_DIR=str(tmp_path)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "before" in done.stdout and "after" in done.stdout and "tokens per correct" in done.stdout
    summary = json.loads((output / "summary.json").read_text())
    for name in ("before", "after"):
        assert 0 <= summary[name]["accuracy"] <= 1
        assert summary[name]["completion_tokens"] > 1
        assert summary[name]["problems"] == 24
    assert summary["distributed"] == {"type": "NO", "num_processes": 1, "zero_stage": None}
    assert summary["steps"] == 2 and summary["seconds"] > summary["training_seconds"] > 0
    assert summary["config"]["length_coef"] == 1.0
    assert {"README.md", "curves.png", "model.safetensors", "tokenizer.json"} <= {f.name for f in output.iterdir()}
    trained = AutoModelForCausalLM.from_pretrained(output)
    start = AutoModelForCausalLM.from_pretrained(model_path("embedded/policy"))
    assert not torch.equal(trained.model.norm.weight, start.model.norm.weight)
    assert documented_metrics() - {"length/critic_loss"} <= logged_to_wandb(tmp_path)  # a frozen critic has none


def logged_to_wandb(folder: Path) -> set[str]:
    """Names of the metrics in the offline run file."""
    content = b"".join(path.read_bytes() for path in folder.rglob("*.wandb"))
    return {name.decode() for name in re.findall(rb"length/\w+", content)}


@pytest.mark.slow
def test_plain_grpo_with_lora_is_two_flags(tmp_path):
    output = tmp_path / "run"
    flags = ["--length_coef", "0", "--use_peft", "--lora_target_modules", "q_proj", "v_proj", "--eval_problems", "1"]
    done = launch(*SMALL, *flags, "--output_dir", str(output))
    assert done.returncode == 0, done.stderr[-3000:]
    assert (output / "adapter_model.safetensors").exists()
    assert json.loads((output / "summary.json").read_text())["config"]["use_peft"] is True


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "file, kind, stage",
    [("cpu_ddp", "MULTI_CPU", None), ("cpu_zero2", "DEEPSPEED", 2), ("cpu_zero3", "DEEPSPEED", 3)],
)
def test_two_processes_train_and_evaluate(tmp_path, file, kind, stage):
    config = str(ROOT / "recipes" / "accelerate" / f"{file}.yaml")
    # 13 problems for one process and 12 for the other: two calls of generate, and one
    uneven = ["--eval_problems", "25", "--eval_batch_size", "12", "--max_steps", "1"]
    # as on a machine without a compiler
    done = launch(
        *SMALL, *uneven, "--output_dir", str(tmp_path / "run"), config=config, CXX="/bin/false", CC="/bin/false"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["distributed"] == {"type": kind, "num_processes": 2, "zero_stage": stage}
    assert summary["steps"] == 1
    assert summary["before"]["problems"] == summary["after"]["problems"] == 25
    assert "shm_comm" not in done.stdout + done.stderr
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    start = AutoModelForCausalLM.from_pretrained(model_path("embedded/policy"))
    assert not torch.equal(trained.model.norm.weight, start.model.norm.weight)


@pytest.fixture
def recipe(monkeypatch, capsys):
    """Run the recipe in this process; returns exit code and what it wrote to stderr."""

    def _run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [str(RECIPE), *arguments])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(RECIPE), run_name="__main__")
        return exit_.value.code, capsys.readouterr().err

    return _run


BAD_INPUT = {
    "a policy folder that does not exist": (
        ["--model_name_or_path", "./no_policy"],
        "there is no folder './no_policy'",
    ),
    "a critic folder that does not exist": (["--length_critic", "./no_critic"], "./no_critic"),
    "a gamma outside (0, 1)": (["--length_gamma", "1.5"], "length_gamma must lie in the open interval (0, 1), got 1.5"),
    "a task that does not exist": (["--task", "arithmetics"], "There is no task 'arithmetics'"),
    "a data file that does not exist": (["--task", "no_data.jsonl"], "no_data.jsonl"),
    "an option that does not exist": (["--length_coefficient", "2"], "length_coefficient"),
    "a gate that does not exist": (["--length_gate", "some"], "length_gate must be one of"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_that_names_the_fix(recipe, tmp_path, case):
    arguments, message = BAD_INPUT[case]
    code, error = recipe(*SMALL, "--output_dir", str(tmp_path), *arguments)
    assert code == 2
    line = error.strip().splitlines()[-1]
    assert line.startswith("error: ") and message in line
    assert "Traceback" not in error


def test_a_config_key_that_does_not_exist_is_named(recipe, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("lenght_coef: 2\n")
    code, error = recipe("--config", str(config))
    assert code == 2 and "lenght_coef" in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('{"question": "1 + 1", "result": "2"}\n', "result"),
        ("", "empty"),
        ('{"question": "1 + 1", "answer": null}\n', "row"),
    ],
    ids=["no answer column", "an empty file", "an answer that is null"],
)
def test_a_dataset_that_cannot_be_used_is_refused(recipe, tmp_path, rows, message):
    data = tmp_path / "data.jsonl"
    data.write_text(rows)
    code, error = recipe(*SMALL, "--eval_problems", "0", "--task", str(data), "--output_dir", str(tmp_path / "run"))
    assert code == 2 and "Traceback" not in error
    assert message in error.strip().splitlines()[-1]


def test_a_critic_of_another_tokenizer_is_refused(recipe, tmp_path, critic_folder):
    config = json.loads((Path(critic_folder) / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    for file in Path(critic_folder).iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config["tokenizer_fingerprint"] = "0" * 64 + ":1"
    (other / "config.json").write_text(json.dumps(config))
    code, error = recipe(*SMALL, "--output_dir", str(tmp_path / "run"), "--length_critic", str(other))
    assert code == 2 and "must share the policy's tokenizer" in error
