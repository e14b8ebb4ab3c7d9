"""A model that is trained beside the policy: the task critic of PPO, a length critic that follows the policy.

1. It is no submodule of the policy: vLLM's weight updates, checkpoints, gradient clipping and the gathering of weights
   for generation must not see it. It has an AdamW, a learning rate, a schedule and gradient clipping of its own.
2. One convention for all launches: an update is that of the SUM of all losses given to `backward` since the last one,
   on all processes. So a loss is this process's part of a mean, divided by the number of items of all processes, and
   one process, DDP and ZeRO make the same update.
3. Without DeepSpeed it is a replica on every process in float32, and gradients are added up once for an update: no
   wrapper, and forwards need not be alike on all processes. With DeepSpeed it gets an engine like the policy's (ZeRO-1,
   2 or 3, offloading, dtype), unless it is a head that is not worth one; under ZeRO-3 forwards and backwards are
   collective.
4. Its state goes into checkpoints (`save`, `load`), its weights into an ordinary model folder (`save_pretrained`).

Left out: FSDP, and float16 without DeepSpeed (it would need a loss scaler of its own).
"""

import copy
import math
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from lenvm_rl.atomic_file import atomic_file
from lenvm_rl.trainers.critic_placement import is_partitioned

SideSchedule = Literal["constant", "linear"]

STATE_FILE = "state.pt"
_TAG = "engine"
_BUCKET = 25 * 2**20
"""Gradient elements that are added up over processes at a time; a copy of them is in memory meanwhile."""


class SideModel:
    """A model with its own optimizer, trained on losses that its caller computes from its outputs.

        for number, batch in enumerate(batches):
            loss = loss_sum(side(input_ids=batch.ids).logits) / items_of_all_processes
            side.backward(loss, last=number + 1 == len(batches))
        grad_norm = side.step()

    Args:
        model: whole on every process, or loaded under ZeRO-3 initialisation. It is taken over, moved to the device and,
            if whole, to float32 (an engine casts it to its own dtype); all processes get the weights of the first one.
            Parameters that need no gradient stay as they are.
        accelerator: the trainer's.
        learning_rate: of AdamW, after the warm-up.
        weight_decay, betas, eps: of AdamW.
        max_grad_norm: the norm of an update's gradient is clipped to it; 0 clips nothing.
        schedule: "constant", or "linear": from the learning rate to 0 over ``total_steps`` updates.
        warmup_steps: updates over which the learning rate first rises from 0.
        total_steps: updates of the run, for "linear". May be set later, before the first update.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        replicate: a replica on every process also with DeepSpeed: for a head, which is not worth an engine.
        name: for messages, such as "task critic".

    Raises:
        ValueError: a setting outside its range, FSDP, or float16 without DeepSpeed; on `step`, a gradient that is not
            finite.
    """

    def __init__(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        *,
        learning_rate: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_grad_norm: float = 1.0,
        schedule: str = "constant",
        warmup_steps: int = 0,
        total_steps: int | None = None,
        gradient_checkpointing: bool = False,
        replicate: bool = False,
        name: str = "side model",
    ) -> None:
        check_settings(
            name, learning_rate=learning_rate, schedule=schedule, warmup_steps=warmup_steps, max_grad_norm=max_grad_norm
        )
        self._check_launch(accelerator, name)
        self.model, self.accelerator, self.name = model, accelerator, name
        self.base_learning_rate, self.schedule, self.warmup_steps = learning_rate, schedule, warmup_steps
        self.total_steps = total_steps
        self.max_grad_norm = max_grad_norm
        self.steps = 0
        """Updates so far."""
        if gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        if not is_partitioned(model):
            model.float()
            self._take_first_weights()
        self.engine: Any = None
        if accelerator.distributed_type == DistributedType.DEEPSPEED and not replicate:
            self.optimizer = self._start_engine(learning_rate, weight_decay, betas, eps)
        else:
            model.to(accelerator.device)
            self.optimizer = self._adamw(learning_rate, weight_decay, betas, eps)
        self.eval()

    @staticmethod
    def _check_launch(accelerator: Accelerator, name: str) -> None:
        if accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError(
                f"The {name} cannot be trained under FSDP. Launch with DeepSpeed (recipes/accelerate/zero3.yaml shards "
                "as much), or with recipes/accelerate/ddp.yaml."
            )
        if accelerator.mixed_precision == "fp16" and accelerator.distributed_type != DistributedType.DEEPSPEED:
            raise ValueError(
                f"The {name} cannot be trained in float16 without DeepSpeed, which scales losses: set bf16=True, or "
                "launch with recipes/accelerate/zero2.yaml."
            )

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _adamw(self, learning_rate: float, weight_decay: float, betas: tuple[float, float], eps: float) -> Any:
        return torch.optim.AdamW(self._trained(), lr=learning_rate, weight_decay=weight_decay, betas=betas, eps=eps)

    @torch.no_grad()
    def _take_first_weights(self) -> None:
        """A fresh head may have been drawn from random states that differ between processes."""
        if self.accelerator.num_processes == 1:
            return
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            sent = tensor.to(self.accelerator.device).contiguous()
            torch.distributed.broadcast(sent, src=0)
            tensor.copy_(sent)

    def _start_engine(self, learning_rate: float, weight_decay: float, betas: tuple[float, float], eps: float) -> Any:
        import deepspeed

        plugin: Any = self.accelerator.state.deepspeed_plugin
        config = engine_config(
            plugin.deepspeed_config,
            precision=self.accelerator.mixed_precision,
            hidden_size=getattr(getattr(self.model, "config", None), "hidden_size", None),
            max_grad_norm=self.max_grad_norm,
        )
        offload = config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
        optimizer: Any
        if offload != "none" and config.get("zero_force_ds_cpu_optimizer", True):
            # DeepSpeed refuses any other where optimizer states are offloaded
            optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(
                self._trained(), lr=learning_rate, weight_decay=weight_decay, betas=betas, eps=eps, adamw_mode=True
            )
        else:
            optimizer = self._adamw(learning_rate, weight_decay, betas, eps)
        self.engine, engine_optimizer, *_ = deepspeed.initialize(model=self.model, optimizer=optimizer, config=config)
        return engine_optimizer

    def __call__(self, **inputs: Any) -> Any:
        """The model's outputs, in the precision that the policy is trained in. Collective under ZeRO-3."""
        if self.engine is not None:
            return self.engine(**inputs)
        with self.accelerator.autocast():
            return self.model(**inputs)

    def train(self) -> None:
        (self.engine or self.model).train()

    def eval(self) -> None:
        (self.engine or self.model).eval()

    @property
    def learning_rate(self) -> float:
        """Of the next update.

        Raises:
            ValueError: a linear schedule whose end is not known.
        """
        return self.base_learning_rate * schedule_factor(self.schedule, self.steps, self.warmup_steps, self.total_steps)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add the gradient of a loss, which is this process's part of the update's whole loss.

        Args:
            loss: 0-dim.
            last: no other follows before `step`. Collective with DeepSpeed: the same on all processes.
        """
        if self.engine is None:
            loss.backward()
            return
        self.engine.set_gradient_accumulation_boundary(last)
        # engines average gradients over processes
        self.engine.backward(loss * self.accelerator.num_processes, scale_wrt_gas=False)

    def step(self) -> float:
        """Update the weights; the norm of the gradient before it was clipped. Collective."""
        rate = self.learning_rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = self._step_plain() if self.engine is None else self._step_engine()
        self.steps += 1
        return norm

    def _step_plain(self) -> float:
        parameters = self._trained()
        if self.accelerator.num_processes > 1:
            _add_up_gradients(parameters)
        norm = nn.utils.clip_grad_norm_(parameters, self.max_grad_norm or math.inf).item()
        self._check_norm(norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _step_engine(self) -> float:
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        if not self.engine.fp16_enabled():  # which skips such an update and lowers the scale of the losses
            self._check_norm(norm)
        return norm

    def _check_norm(self, norm: float) -> None:
        if not math.isfinite(norm):
            raise ValueError(
                f"The gradient of the {self.name} is not finite (norm {norm}) at its update {self.steps + 1}: it "
                "diverged, or its targets were not finite. Lower its learning rate "
                f"({self.base_learning_rate:g}), or go on from a checkpoint."
            )

    def save(self, folder: Path, *, writes: bool = True) -> None:
        """Write weights, optimizer and position in the schedule, for `load`. Collective with DeepSpeed.

        Args:
            folder: of its own inside a checkpoint; made here.
            writes: this process writes what all of them hold alike. Parts of an engine are written by each.
        """
        if self.engine is not None:
            self.engine.save_checkpoint(str(folder), tag=_TAG, client_state={"updates": self.steps}, save_latest=False)
            return
        if not writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "updates": self.steps}
        with atomic_file(folder / STATE_FILE) as file:
            torch.save(state, file)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote. Collective with DeepSpeed.

        Raises:
            ValueError: there is nothing, or it was saved without DeepSpeed and this is an engine, or the reverse.
        """
        saved_by_engine, saved_whole = (folder / _TAG).is_dir(), (folder / STATE_FILE).is_file()
        if not (saved_whole if self.engine is None else saved_by_engine):
            reason = "it is not there"
            if saved_by_engine or saved_whole:
                reason = f"it was saved {'with' if saved_by_engine else 'without'} DeepSpeed"
            raise ValueError(
                f"The state of the {self.name} cannot be read from {str(folder)!r}: {reason}. Resume with the launch "
                "that saved the checkpoint, or begin a new run from its weights."
            )
        if self.engine is not None:
            _, client_state = self.engine.load_checkpoint(str(folder), tag=_TAG)
            self.steps = client_state["updates"]
            return
        state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["updates"]

    def whole_weights(self) -> dict[str, Tensor]:
        """All weights on the CPU, on the main process; empty on the others. Collective under ZeRO-3."""
        weights: dict[str, Tensor] = {}
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            if hasattr(tensor, "ds_id"):
                import deepspeed

                with deepspeed.zero.GatheredParameters([tensor]):
                    kept = tensor.detach().cpu().clone() if self.accelerator.is_main_process else None
            else:
                kept = tensor.detach().cpu().clone() if self.accelerator.is_main_process else None
            if kept is not None:
                weights[name] = kept
        known = self.model.state_dict().keys()  # without buffers that are computed anew
        return {name: tensor for name, tensor in weights.items() if name in known}

    def save_pretrained(self, path: str | Path) -> None:
        """Write a model folder that transformers loads. Collective; the main process writes."""
        weights = self.whole_weights()
        if self.accelerator.is_main_process:
            self.model.save_pretrained(str(path), state_dict=weights)  # type: ignore[operator]
        self.accelerator.wait_for_everyone()


def check_settings(
    name: str, *, learning_rate: float, schedule: str, warmup_steps: int = 0, max_grad_norm: float = 1.0
) -> None:
    """Refuse settings under which a model would not be trained.

    Raises:
        ValueError: with the name of the model and the setting.
    """
    if not (learning_rate > 0 and math.isfinite(learning_rate)):
        raise ValueError(
            f"The learning rate of the {name} is {learning_rate}, under which it never learns: it must be positive. "
            "1e-5 suits models of a billion parameters, 1e-3 those of a million."
        )
    if schedule not in get_args(SideSchedule):
        raise ValueError(
            f"The schedule of the {name} must be one of {', '.join(get_args(SideSchedule))}, got {schedule!r}."
        )
    if warmup_steps < 0:
        raise ValueError(f"The warm-up of the {name} has {warmup_steps} steps: it needs 0 or more.")
    if not max_grad_norm >= 0:
        raise ValueError(f"max_grad_norm of the {name} is {max_grad_norm}: 0 clips nothing, other values are positive.")


def schedule_factor(schedule: str, step: int, warmup_steps: int = 0, total_steps: int | None = None) -> float:
    """Share of the learning rate at an update.

    Args:
        schedule: of `SideSchedule`.
        step: updates before it.
        warmup_steps: the share rises in as many equal parts, and is 1 at the last of them.
        total_steps: updates of the run; "linear" reaches 0 after the last one.

    Raises:
        ValueError: "linear" without an end.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    if total_steps is None:
        raise ValueError("A linear schedule needs the number of updates: set total_steps.")
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))


def engine_config(
    config: dict[str, Any], *, precision: str, hidden_size: int | None, max_grad_norm: float
) -> dict[str, Any]:
    """The DeepSpeed configuration of a second engine, from the policy's.

    Args:
        config: of the policy, in which "auto" may stand where training has not begun; it is left as it is.
        precision: "no", "bf16" or "fp16", for what is "auto".
        hidden_size: of the second model, for sizes that depend on it; None leaves those to DeepSpeed.
        max_grad_norm: 0 clips nothing.
    """
    config = copy.deepcopy(config)
    for name in ("optimizer", "scheduler", "train_batch_size"):
        config.pop(name, None)
    config |= {
        "train_micro_batch_size_per_gpu": 1,  # of no consequence: losses come summed and scaled
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,
    }
    for name in ("bf16", "fp16"):
        if config.get(name, {}).get("enabled") == "auto":
            config[name]["enabled"] = precision == name
    zero = config.get("zero_optimization", {})
    if hidden_size is not None:
        sizes = {
            "reduce_bucket_size": hidden_size**2,
            "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
            "stage3_param_persistence_threshold": 10 * hidden_size,
        }
        zero |= {name: size for name, size in sizes.items() if zero.get(name) == "auto"}
    return _without_auto(config)


def _without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's own defaults instead of what transformers would have filled in."""
    return {
        name: _without_auto(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if value != "auto"
    }


@torch.no_grad()
def _add_up_gradients(parameters: list[nn.Parameter]) -> None:
    """Sum gradients over processes, in buckets."""
    buckets: list[list[Tensor]] = [[]]
    size = 0
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if size + parameter.numel() > _BUCKET and buckets[-1]:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter.grad)
        size += parameter.numel()
    for gradients in buckets:
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        torch.distributed.all_reduce(flat)
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))
