"""A model beside the policy, in one process."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.testing import assert_close

from lenvm_rl.trainers.side_model import SideModel, check_settings, engine_config, schedule_factor


class Lever(torch.nn.Module):
    """Two numbers; the second one is not trained."""

    def __init__(self, first=1.0, second=5.0):
        super().__init__()
        self.first = torch.nn.Parameter(torch.tensor(first))
        self.second = torch.nn.Parameter(torch.tensor(second), requires_grad=False)

    def forward(self, x):
        return self.first * x + self.second


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


# The settings


def test_the_schedule_rises_in_equal_parts_and_falls_to_zero_after_the_last_update():
    factors = [schedule_factor("linear", step, warmup_steps=2, total_steps=6) for step in range(7)]
    assert factors == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert [schedule_factor("constant", step, warmup_steps=2) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="set total_steps"):
        schedule_factor("linear", 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "learning rate of the task critic is 0.0, under which it never learns"),
        ({"learning_rate": float("nan")}, "learning rate of the task critic is nan"),
        ({"learning_rate": 1e-3, "schedule": "cosine"}, "must be one of constant, linear, got 'cosine'"),
        ({"learning_rate": 1e-3, "warmup_steps": -1}, "has -1 steps"),
        ({"learning_rate": 1e-3, "max_grad_norm": -1.0}, "max_grad_norm of the task critic is -1.0"),
    ],
)
def test_settings_under_which_nothing_is_learnt_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        check_settings("task critic", **{"schedule": "constant"} | settings)


def test_launches_that_cannot_train_it_are_refused():
    class Launch:
        distributed_type = DistributedType.FSDP
        mixed_precision = "no"

    with pytest.raises(ValueError, match=r"The critic cannot be trained under FSDP. Launch with DeepSpeed"):
        SideModel(Lever(), Launch(), learning_rate=0.1, name="critic")
    Launch.distributed_type, Launch.mixed_precision = DistributedType.NO, "fp16"
    with pytest.raises(ValueError, match="cannot be trained in float16 without DeepSpeed"):
        SideModel(Lever(), Launch(), learning_rate=0.1, name="critic")


def test_a_second_engine_takes_the_first_ones_settings_without_what_is_its_own():
    first = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 16,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": "auto",
        "optimizer": {"type": "AdamW"},
        "scheduler": {"type": "WarmupLR"},
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto", "loss_scale": 0, "hysteresis": "auto"},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": 5,
            "offload_optimizer": {"device": "cpu", "pin_memory": "auto"},
        },
    }
    second = engine_config(first, precision="bf16", hidden_size=10, max_grad_norm=0.5)
    assert second == {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.5,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False, "loss_scale": 0},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 100,
            "stage3_prefetch_bucket_size": 5,
            "offload_optimizer": {"device": "cpu"},
        },
    }
    assert first["train_batch_size"] == "auto" and "optimizer" in first


# One process


def test_an_update_is_that_of_the_sum_of_its_losses(accelerator):
    side = SideModel(Lever(), accelerator, learning_rate=0.1, max_grad_norm=0.0)
    x = torch.tensor([1.0, 2.0])
    for part in x:
        side.backward(((side(x=part) - 3.0) ** 2).sum() / 2)
    # d/da of ((a+5-3)^2 + (2a+5-3)^2) / 2 at a = 1: 3 + 8
    assert side.step() == pytest.approx(11.0)
    # Adam's first step has the size of the learning rate
    assert_close(side.model.first.detach(), torch.tensor(0.9))
    assert side.model.second == 5.0 and side.model.first.grad is None and side.steps == 1


def test_the_gradient_is_clipped_and_its_norm_told_as_it_was(accelerator):
    side = SideModel(Lever(), accelerator, learning_rate=0.1, max_grad_norm=1.0, eps=1.0)
    side.backward(((side(x=torch.tensor(2.0)) - 3.0) ** 2).sum())
    assert side.step() == pytest.approx(16.0)  # 2 * (2 + 5 - 3) * 2
    # clipped to 1; with eps = 1 a step is 0.1 * 1 / (1 + 1)
    assert_close(side.model.first.detach(), torch.tensor(0.95))


def test_the_learning_rate_follows_its_schedule(accelerator):
    side = SideModel(Lever(), accelerator, learning_rate=0.4, schedule="linear", warmup_steps=2)
    side.total_steps = 4
    seen = []
    for _ in range(4):
        side.backward(side(x=torch.tensor(1.0)).sum())
        seen.append(side.learning_rate)
        side.step()
        assert side.optimizer.param_groups[0]["lr"] == seen[-1]
    assert seen == pytest.approx([0.2, 0.4, 0.4, 0.2])


def test_bfloat16_weights_are_trained_in_float32(accelerator):
    side = SideModel(Lever(1.0).bfloat16(), accelerator, learning_rate=1e-4)
    side.backward(side(x=torch.tensor(1.0)).sum())
    side.step()
    assert side.model.first.dtype == torch.float32
    assert_close(side.model.first.detach(), torch.tensor(0.9999))  # would round back to 1 in bfloat16


def test_it_computes_in_the_precision_of_the_policy():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        side = SideModel(torch.nn.Linear(2, 1), Accelerator(cpu=True, mixed_precision="bf16"), learning_rate=0.1)
        assert side(input=torch.ones(1, 2)).dtype == torch.bfloat16
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_a_gradient_that_is_not_finite_stops_with_what_to_do(accelerator):
    side = SideModel(Lever(), accelerator, learning_rate=0.1, name="task critic")
    side.backward(side(x=torch.tensor(float("nan"))).sum())
    with pytest.raises(ValueError, match=r"gradient of the task critic is not finite \(norm nan\) at its update 1: "):
        side.step()


def test_a_state_that_is_not_there_is_said(accelerator, tmp_path):
    side = SideModel(Lever(), accelerator, learning_rate=0.1, name="task critic")
    with pytest.raises(ValueError, match=r"state of the task critic cannot be read from .*: it is not there"):
        side.load(tmp_path)
    (tmp_path / "engine").mkdir()
    with pytest.raises(ValueError, match="it was saved with DeepSpeed"):
        side.load(tmp_path)
