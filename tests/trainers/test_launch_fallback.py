import pytest

from lenvm_rl.trainers.drpo import DRPOConfig, DRPOTrainer
from lenvm_rl.trainers.grpo import LenVMGRPOConfig, LenVMGRPOTrainer


@pytest.mark.parametrize(
    "trainer, config, options",
    [(LenVMGRPOTrainer, LenVMGRPOConfig, {"length_coef": 0.0}), (DRPOTrainer, DRPOConfig, {})],
)
def test_a_trainer_refuses_a_launch_that_fell_back_to_one_process(train, monkeypatch, trainer, config, options):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")  # both by accelerate launch --cpu --num_processes 2
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ValueError, match="asked for several processes and started one"):
        train(trainer, config, **options)
