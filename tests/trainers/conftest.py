from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM

from lenvm_rl.trainers.grpo import LenVMGRPOConfig, LenVMGRPOTrainer
from lenvm_rl.trainers.length_settings import LengthSettings

LIMIT = 12


@pytest.fixture
def tiny_run() -> dict[str, Any]:
    """The settings of a run of two steps, with two groups of four completions each."""
    return {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": LIMIT,
        "learning_rate": 1e-3,
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


def _short_is_right(completions: list[str], **_: Any) -> list[float]:
    return [float(len(completion.split()) < LIMIT - 2) for completion in completions]


_short_is_right.__name__ = "short_is_right"


@pytest.fixture
def short_is_right():
    """Reward function: right if the completion has few words: some of every group, with random weights."""
    return _short_is_right


@pytest.fixture
def prompts():
    """Makes a dataset of so many prompts, with the column `number`."""

    def _prompts(count: int = 16) -> Dataset:
        texts = [f"{i} + 7 =" if i % 2 else f"{i} + 7 - 2 + 1 =" for i in range(count)]
        return Dataset.from_dict({"prompt": texts, "number": list(range(count))})

    return _prompts


@pytest.fixture
def train(tokenizer, policy_folder, tmp_path, tiny_run, prompts, short_is_right):
    """Train a fresh copy of the tiny policy; returns the trainer."""

    def _train(trainer_class=LenVMGRPOTrainer, config_class=LenVMGRPOConfig, **options: Any):
        arguments = {"train_dataset": prompts(), "reward_funcs": short_is_right}
        for name in ("train_dataset", "reward_funcs", "peft_config", "eval_dataset", "rollout_func"):
            if name in options:
                arguments[name] = options.pop(name)
        if issubclass(config_class, LengthSettings):
            options.setdefault("length_critic_trust", 0.0)  # the tiny critic explains next to nothing
        if "loaded_critic" in options:
            arguments["length_critic"] = options.pop("loaded_critic")
        trainer = trainer_class(
            model=AutoModelForCausalLM.from_pretrained(policy_folder),
            args=config_class(output_dir=str(tmp_path / "run"), **(tiny_run | options)),
            processing_class=tokenizer,
            **arguments,
        )
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
        return trainer

    return _train
