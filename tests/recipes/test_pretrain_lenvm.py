"""The recipes that make and evaluate a critic, as a user starts them."""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, PreTrainedTokenizerFast

from lenvm_rl.model import LengthValueModel

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = ["--prompts", "8", "--completions_per_prompt", "4", "--held_out_prompts", "6", "--max_new_tokens", "24"]
SMALL += ["--num_train_epochs", "1", "--per_device_train_batch_size", "8", "--warmup_steps", "0"]
SMALL += ["--ceiling_states", "4", "--disable_tqdm", "true"]


def start(recipe, *arguments):
    """What the recipe printed and its exit code, run in this process: the imports take longer than the work."""
    printed, complaints = io.StringIO(), io.StringIO()
    argv, threads = sys.argv, torch.get_num_threads()
    sys.argv = [recipe, *arguments]
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaints):
            runpy.run_path(str(RECIPES / recipe), run_name="__main__")
        code = 0
    except SystemExit as left:
        code = left.code
    finally:
        sys.argv = argv
        torch.set_num_threads(threads)
    return code, printed.getvalue() + complaints.getvalue()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, policy_folder):
    folder = tmp_path_factory.mktemp("pretrained")
    flags = ["--generator", policy_folder, "--rollouts_dir", str(folder / "rollouts"), *SMALL]
    return folder, *start("pretrain_lenvm.py", *flags, "--output_dir", str(folder / "lenvm"))


@pytest.mark.slow
def test_the_recipe_leaves_a_critic_and_a_page_about_it(pretrained, policy_folder):
    folder, code, said = pretrained
    assert code == 0, said[-3000:]
    assert "noise floor" in said and "entropy of the first token" in said
    assert (folder / "lenvm" / "report" / "report.md").read_text().startswith(f"# Length critic of {policy_folder}")
    metrics = json.loads((folder / "lenvm" / "report" / "metrics.json").read_text())
    assert metrics["rollouts"] == 24 and metrics["prompt"]["prompts"] == 6
    assert metrics["trained on"].startswith("32 completions of 8 prompts")
    assert {"gamma", "cut", "mean_squared_error", "explained_variance", "explained_variance_ceiling"} <= metrics.keys()
    critic = LengthValueModel.from_pretrained(folder / "lenvm")
    assert critic.config.gamma == metrics["gamma"] and critic.config.max_tokens == 24


@pytest.mark.slow
def test_evaluation_alone_gives_the_same_numbers(pretrained, policy_folder, tmp_path):
    folder, *_ = pretrained
    flags = ["--lenvm", str(folder / "lenvm"), "--rollouts", str(folder / "rollouts" / "held_out")]
    flags += ["--fit_rollouts", str(folder / "rollouts" / "train"), "--generator", policy_folder]
    code, said = start("evaluate_lenvm.py", *flags, "--output_dir", str(tmp_path))
    assert code == 0, said[-3000:]
    paths = tmp_path / "metrics.json", folder / "lenvm" / "report" / "metrics.json"
    again, before = (json.loads(path.read_text()) for path in paths)
    for name in ("explained_variance", "mean_squared_error", "prompt", "baselines"):
        assert again[name] == before[name], name


@pytest.mark.slow
def test_a_critic_can_be_trained_further_and_with_adapters(pretrained, policy_folder, tmp_path):
    folder, *_ = pretrained
    flags = ["--generator", policy_folder, "--rollouts_dir", str(folder / "rollouts"), *SMALL]
    flags += ["--lenvm", str(folder / "lenvm"), "--lora_rank", "2", "--ceiling_states", "0"]
    code, said = start("pretrain_lenvm.py", *flags, "--output_dir", str(tmp_path))
    assert code == 0, said[-3000:]
    before, after = (LengthValueModel.from_pretrained(path) for path in (folder / "lenvm", tmp_path))
    assert before.config.gamma == after.config.gamma
    assert not torch.equal(before.v_head.fc.weight, after.v_head.fc.weight)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_sample_and_train_together(policy_folder, tmp_path):
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(RECIPES / "accelerate" / "cpu_ddp.yaml")]
    launcher += ["--main_process_port", "0"]
    flags = ["--generator", policy_folder, "--rollouts_dir", str(tmp_path / "rollouts"), *SMALL]
    flags += ["--output_dir", str(tmp_path / "lenvm")]
    done = subprocess.run(
        [sys.executable, *launcher, str(RECIPES / "pretrain_lenvm.py"), *flags],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "rollouts" / "train" / ".lock-1").exists(), "the second process sampled nothing"
    metrics = json.loads((tmp_path / "lenvm" / "report" / "metrics.json").read_text())
    assert metrics["trained on"].startswith("32 completions of 8 prompts")


def test_a_backbone_of_other_tokens_is_refused(policy_folder, tokenizer, tmp_path):
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    turned = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary[::-1])}, unk_token="<eos>"))
    PreTrainedTokenizerFast(tokenizer_object=turned).save_pretrained(tmp_path / "other")
    AutoConfig.from_pretrained(policy_folder).save_pretrained(tmp_path / "other")
    flags = ["--generator", policy_folder, "--lenvm", str(tmp_path / "other"), *SMALL]
    code, said = start("pretrain_lenvm.py", *flags, "--output_dir", str(tmp_path / "lenvm"))
    assert code == 2 and "start it from a model of the generator's family" in said


def test_rollouts_that_are_not_there_are_named(tmp_path):
    code, said = start("evaluate_lenvm.py", "--rollouts", str(tmp_path / "none"))
    assert code == 2 and "is no folder of rollouts" in said
