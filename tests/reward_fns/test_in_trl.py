"""Length rewards in stock TRL trainers and in ours, and the contracts with TRL 1.16 that they stand on."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

import lenvm_rl.assets
from lenvm_rl.trainers.grpo import LenVMGRPOConfig, LenVMGRPOTrainer
from reward_fns import (
    AccuracyReward,
    HistoryAwareLengthReward,
    LaserDReward,
    TruncationReward,
    length_reward,
    share,
)

LIMIT = 12
OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": LIMIT,
    "max_steps": 2,
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


@pytest.fixture
def trainer_of(tokenizer, policy_folder, problems, tmp_path):
    def build(trainer_class, config_class, reward_funcs, **options):
        return trainer_class(
            model=AutoModelForCausalLM.from_pretrained(policy_folder),
            reward_funcs=reward_funcs,
            args=config_class(output_dir=str(tmp_path / "run"), **(OPTIONS | options)),
            train_dataset=problems,
            eval_dataset=problems.select(range(4)),
            processing_class=tokenizer,
        )

    return build


def short_is_right(completions, **_):
    return [float(len(completion.split()) < LIMIT - 2) for completion in completions]


TRAINERS = pytest.mark.parametrize(
    ("trainer_class", "config_class", "options"),
    [
        pytest.param(GRPOTrainer, GRPOConfig, {}, id="GRPO"),
        pytest.param(RLOOTrainer, RLOOConfig, {}, id="RLOO"),
        pytest.param(LenVMGRPOTrainer, LenVMGRPOConfig, {"length_coef": 0.0}, id="LenVM-GRPO"),
    ],
)


@TRAINERS
def test_every_batch_is_judged_once_and_state_changes_in_training_only(
    trainer_of, tokenizer, trainer_class, config_class, options
):
    calls = []

    def counted(completions, **inputs):
        calls.append(len(completions))
        return short_is_right(completions)

    hapo, laser = HistoryAwareLengthReward(counted), LaserDReward(counted, 2, LIMIT, 1, update_every=1, group_size=4)
    rewards = [share(counted), TruncationReward(LIMIT - 4, tokenizer.eos_token_id, counted), hapo, laser]
    trainer = trainer_of(trainer_class, config_class, rewards, **options)
    before = trainer.evaluate()
    assert hapo.fingerprint() == (0, 0, 0) and laser.fingerprint()[0] == 0 and len(calls) == 2
    trainer.train()
    state = hapo.state_dict()
    assert hapo.fingerprint()[0] == laser.fingerprint()[0] == 2 and len(calls) == 4
    assert 1 <= len(state["history"]) <= 4
    trainer.evaluate()
    assert hapo.state_dict() == state and laser.fingerprint()[0] == 2 and len(calls) == 6
    logged = trainer.state.log_history[0]
    assert {
        "eval_rewards/truncation_reward/mean",
        "eval_rewards/history_aware_length_reward/mean",
        "eval_truncation_reward/cut",
    } <= set(before) | set(logged)


def test_accuracy_is_verified_once_per_batch_and_logged_once(trainer_of, tokenizer, monkeypatch):
    accuracy = AccuracyReward()
    scored = []
    monkeypatch.setattr(accuracy, "_score", lambda *args: scored.append(1) or AccuracyReward._score(accuracy, *args))
    # the length reward comes first, so that it is the one that makes accuracy_reward score
    rewards = [
        TruncationReward(8, tokenizer.eos_token_id, accuracy),
        accuracy,
        length_reward("kimi", correctness=accuracy),
    ]
    trainer = trainer_of(GRPOTrainer, GRPOConfig, rewards, log_completions=False)
    trainer.train()
    assert len(scored) == 2
    assert len(trainer._logs["extra"]["accuracy_reward/gold"]) == len(trainer._logs["prompt"])
    assert "accuracy_reward/no_answer" in trainer.state.log_history[0]


def test_ten_line_script(policy_folder, tmp_path, monkeypatch):
    """The script of docs/rewards.md, with the smallest policy."""
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    script = page.partition("```python\n")[2].partition("```")[0]
    assert 8 <= len(script.strip().splitlines()) <= 14
    monkeypatch.setattr(lenvm_rl.assets, "model_path", lambda name: policy_folder)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(script, names)
    assert names["trainer"].state.global_step == 2
