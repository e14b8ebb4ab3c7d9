"""docs/metrics.md explains everything that is logged."""

import re
from pathlib import Path

import pytest

from lenvm_rl.trainers.grpo import LenVMGRPOTrainer
from lenvm_rl.trainers.ppo import LenVMPPOConfig, LenVMPPOTrainer

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
OF_THE_RUN = {"step", "total_flos", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}


def explained():
    rows = re.findall(r"^\| (`.+?) \|", PAGE.read_text(), flags=re.M)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def unexplained(trainer):
    logged = {re.sub(r"^rewards/\w+/", "rewards/NAME/", name) for entry in trainer.state.log_history for name in entry}
    return logged - explained() - OF_THE_RUN


LEARNING = {"length_critic_update": "online", "length_critic_trust": 0.0}
PPO = {"num_generations": 1}


@pytest.mark.parametrize(
    "options",
    [
        {**LEARNING, "dynamic_sampling": True, "beta": 0.1},
        {**LEARNING, **PPO, "beta": 0.1, "kl_in_reward": True, "entropy_coef": 0.01},
        {**PPO, "length_coef": 0.0, "length_adaptive_lambda": 0.5, "loss_type": "cispo"},
    ],
    ids=["GRPO", "PPO with two critics", "plain PPO"],
)
def test_every_logged_metric_is_explained(train, critic_folder, options):
    if "length_critic_update" in options:
        options = {**options, "length_critic": critic_folder}
    of_ppo = (LenVMPPOTrainer, LenVMPPOConfig) if "num_generations" in options else ()
    trainer = train(*of_ppo, **options)
    assert len(trainer.state.log_history) > 1 and not unexplained(trainer)


@pytest.mark.parametrize("trainer_class", [LenVMGRPOTrainer, LenVMPPOTrainer])
def test_the_page_knows_what_the_trainers_say_they_log(trainer_class):
    names = set(re.findall(r"``((?:length|sampling|value|ppo)/\w+)``", trainer_class.__doc__ or ""))
    assert len(names) > 10 and names <= explained()
