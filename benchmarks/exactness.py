"""One process, two under DDP, ZeRO-2 and ZeRO-3: the same run? A table of the largest differences.

    python benchmarks/exactness.py                      # prints the table; exit code 1 where a difference is too large
    python benchmarks/exactness.py --write              # also into docs/data/exactness.json and docs/exactness.md

Other numbers of processes sample other completions, so completions are recorded once, from the embedded policy, and
played back through TRL's `rollout_func`. World batches are equal: 4 prompts of 4 completions, in two accumulated
micro-batches. The first process gets short completions and the second long ones. The cases, with AdamW at 1e-3:

    grpo        plain GRPO
    lenvm       length credit on all completions, scaled by its spread; every batch is used twice
    gate        only completions of the first process are right, so that the gate empties the second one's share
    dler        half of each process's groups has no signal and is replaced; statistics over tokens
    hapo        a reward that remembers prompts over epochs
    controlled  a coefficient that follows the lengths which all processes sampled
    target      a length to aim at, clipped, one number for each completion
    online      a critic that learns from every batch, in minibatches over all processes
    shared      a value head on the policy's hidden states, read from the forward of the old log-probabilities; the
                policy's loss has a part in its error
    ppo         a task critic with its own optimizer beside a length critic; each batch is used twice, after a step in
                which the policy is frozen
    sharded     lenvm, its critic sharded as well (ZeRO-3 only)
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import deepspeed  # noqa: F401 (once, for all forks)
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from datasets import Dataset
from forks import fork
from marked import DOCS, write_between
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PrinterCallback

from lenvm_rl.assets import model_path
from lenvm_rl.atomic_file import atomic_file
from lenvm_rl.launch import distributed_summary, run
from lenvm_rl.sampling import SamplingSettings, prompt_token_ids, sample_completions
from lenvm_rl.tasks.arithmetic import arithmetic_dataset
from lenvm_rl.trainers.grpo import LenVMGRPOConfig, LenVMGRPOTrainer
from lenvm_rl.trainers.ppo import LenVMPPOConfig, LenVMPPOTrainer
from lenvm_rl.trainers.whole_policy import whole_policy
from reward_fns import HistoryAwareLengthReward

ROOT = Path(__file__).parents[1]
LAUNCHES = ("cpu_ddp", "cpu_zero2", "cpu_zero3")
GROUP, PROMPTS, LIMIT = 4, 24, 32
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-6, 1e-4
"""Beyond these a difference is no rounding: one Adam step moves a weight by up to 1e-3."""


@dataclass
class ExactnessArguments:
    write: bool = False
    """Update docs/data/exactness.json and the table of docs/exactness.md."""
    json: str | None = None
    """Another file for the numbers."""


def alternating(number: list[int], **_: Any) -> list[float]:
    """Every second completion of a group is right."""
    return [float(place % 2) for place, _ in enumerate(number)]


def right_in_first_process(number: list[int], **_: Any) -> list[float]:
    """As `alternating`, for the prompts of the first of two processes."""
    return [float(place % 2 and n % 4 < 2) for place, n in enumerate(number)]


def half_are_hopeless(number: list[int], **_: Any) -> list[float]:
    """As `alternating`, but for one of the two prompts that a process gets in each of the first steps."""
    return [float(place % 2 and not (n < 12 and n % 2)) for place, n in enumerate(number)]


@dataclass(frozen=True)
class Case:
    judge: Callable[..., list[float]] = alternating
    options: dict[str, Any] = field(default_factory=dict)
    prompts: int = PROMPTS
    steps: int = 4
    hapo: bool = False
    ppo: bool = False


CRITIC = {"length_critic": "embedded/length_critic", "length_scale": "std"}
LENVM = Case(options={**CRITIC, "length_gate": "all", "num_iterations": 2})
DLER = {"dynamic_sampling": True, "advantage_normalization": "group_centred_token_std", "epsilon_high": 0.28}
TOKENS = {"length_controller": "tokens", "length_controller_target": 8.0, "length_controller_warmup": 1}
LEARNS = {"length_critic_steps": 2, "length_critic_learning_rate": 1e-3, "length_critic_trust": 0.0}
VALUES = {"value_learning_rate": 1e-3, "value_warmup_steps": 1, "length_adaptive_lambda": 0.5}
CASES = {
    "grpo": Case(),
    "lenvm": LENVM,
    "gate": Case(right_in_first_process, CRITIC),
    # of this seed's further prompts none is hopeless: otherwise the number of processes decides which ones follow
    "dler": Case(half_are_hopeless, {**DLER, "seed": 11}, steps=3),
    "hapo": Case(hapo=True, prompts=8),
    "controlled": Case(options={**CRITIC, **TOKENS}),
    "target": Case(options={**CRITIC, "length_target": 12, "length_clip": 2.0, "length_resolution": "completion"}),
    "online": Case(options={**CRITIC, **LEARNS, "length_critic_update": "online"}),
    "shared": Case(
        options={**CRITIC, **LEARNS, "length_critic": "shared", "length_backbone_coef": 0.5, "num_iterations": 2}
    ),
    "ppo": Case(options={**LENVM.options, **VALUES}, ppo=True),
    "sharded": Case(options={**LENVM.options, "length_critic_placement": "sharded"}),
}


def record(path: Path) -> None:
    """Completions of the embedded policy to every prompt, those of the first process's prompts cut short."""
    folder = model_path("embedded/policy")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    problems = arithmetic_dataset(PROMPTS, seed=0, held_out=False)["prompt"]
    prompts = [prompt for prompt in problems for _ in range(GROUP)]
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_pretrained(folder)
    sampled = sample_completions(policy, tokenizer, prompt_token_ids(tokenizer, prompts), SamplingSettings(LIMIT))
    groups: dict[str, list[list[int]]] = {}
    for row, (prompt, completion) in enumerate(zip(prompts, sampled, strict=True)):
        short = row // GROUP % 4 < 2
        groups.setdefault(prompt, []).append(completion.ids[: 4 + row % 5] if short else completion.ids)
    path.write_text(json.dumps(groups))


def play_back(groups: dict[str, list[list[int]]]) -> Callable[..., dict[str, Any]]:
    """A `rollout_func` that answers each prompt by its recorded completions, in their order."""

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        completions = [groups[prompt][row % GROUP] for row, prompt in enumerate(prompts)]
        ids = prompt_token_ids(trainer.processing_class, prompts)
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}

    return rollout


def train(case: Case, groups: dict[str, list[list[int]]], processes: int, output: str) -> dict[str, Any]:
    """Losses, weights and remembered states of a run; the same on all processes, but for the weights of a task critic,
    which only the first one has whole."""
    options: dict[str, Any] = {
        "per_device_train_batch_size": 2 * GROUP // processes,
        "gradient_accumulation_steps": 2,
        "num_generations": GROUP,
        "max_completion_length": LIMIT,
        "max_steps": case.steps,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "shuffle_dataset": False,
        "length_coef": 1.0 if "length_critic" in case.options else 0.0,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    config_class, trainer_class = (LenVMPPOConfig, LenVMPPOTrainer) if case.ppo else (LenVMGRPOConfig, LenVMGRPOTrainer)
    args: Any = config_class(output, **options | case.options)
    prompts = list(groups)[: case.prompts]
    hapo = HistoryAwareLengthReward(correctness=case.judge)
    folder = model_path("embedded/policy")
    trainer = trainer_class(
        AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
        [case.judge, hapo] if case.hapo else [case.judge],
        args,
        Dataset.from_dict({"prompt": prompts, "number": list(range(len(prompts)))}),
        processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
        rollout_func=play_back(groups),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    with whole_policy(trainer) as policy:
        weights = {name: weight.detach().clone() for name, weight in policy.named_parameters()}
    names = ["loss"]
    if isinstance(trainer, LenVMPPOTrainer):
        names += ["value/loss", "value/grad_norm", "value/explained_variance"]
        critic = trainer.task_critic.side.whole_weights()
        weights |= {f"task critic {name}": weight for name, weight in critic.items()}
    return {
        "losses": [entry[name] for entry in trainer.state.log_history for name in names if name in entry],
        "weights": weights,
        "states": {name: part.state_dict() for name, part in trainer.stateful_parts().items()},
        "distributed": distributed_summary(trainer.accelerator),
    }


def train_all(folder: Path, launch: str) -> None:
    """Train every case as one of the processes of a launch; the first one leaves the results."""
    processes, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if processes == 1:
        record(folder / "rollouts.json")
    groups = json.loads((folder / "rollouts.json").read_text())
    names = [name for name in CASES if name != "sharded" or launch == "cpu_zero3"]
    runs = {name: train(CASES[name], groups, processes, str(folder / "run")) for name in names}
    if rank == 0:
        torch.save(runs, folder / f"{launch}.pt")


def environments(launch: str) -> list[dict[str, str]]:
    """What `accelerate launch` gives each process that this file of recipes/accelerate asks for."""
    flags = ["--config_file", str(ROOT / "recipes" / "accelerate" / f"{launch}.yaml"), __file__]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(flags))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        shared = prepare_deepspeed_cmd_env(args)[1]
    else:
        shared = prepare_multi_gpu_env(args)
    shared |= {"WORLD_SIZE": args.nproc_per_node, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": args.master_port}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(int(args.nproc_per_node))]


def launched(launch: str, folder: Path, environment: list[dict[str, str]]) -> dict[str, dict[str, Any]]:
    """The runs of a launch, in forks of this process, which has imported all that takes time.

    Raises:
        ValueError: a process failed; it has said why.
    """

    def act(own: dict[str, str]) -> None:
        os.environ.update(own)
        train_all(folder, launch)

    children = {fork(partial(act, own)) for own in environment}
    while children:
        child, status = os.wait()
        children.remove(child)
        if status:
            for other in children:  # it would wait for the one that failed
                os.kill(other, signal.SIGKILL)
            raise ValueError(f"A process of {launch} failed.")
    return torch.load(folder / f"{launch}.pt", weights_only=True)


def differences(ours: dict[str, Any], single: dict[str, Any]) -> dict[str, Any]:
    """Largest differences of a run from that of one process."""
    losses = [abs(a - b) for a, b in zip(ours["losses"], single["losses"], strict=True)]
    weights = [(ours["weights"][name] - weight).abs().max().item() for name, weight in single["weights"].items()]
    return {
        "loss": max(losses),
        "weight": max(weights),
        "states_equal": ours["states"] == single["states"],
        "distributed": ours["distributed"],
    }


def is_rounding(found: dict[str, Any]) -> bool:
    return found["loss"] <= LOSS_TOLERANCE and found["weight"] <= WEIGHT_TOLERANCE and found["states_equal"]


def table(result: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Markdown: a row for each case, the largest difference of loss and weight for each launch."""
    lines = ["| case | " + " | ".join(f"{name}: loss, weight" for name in result) + " |"]
    lines += ["|---" * (len(result) + 1) + "|"]
    for case in CASES:
        cells = [result[name].get(case) for name in result]
        shown = [f"{cell['loss']:.1e}, {cell['weight']:.1e}" if cell else "" for cell in cells]
        lines.append(f"| {case} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    (args,) = HfArgumentParser([ExactnessArguments]).parse_args_into_dataclasses()  # type: ignore[list-item]
    os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}  # rollout_func; forks
    torch.set_num_threads(1)
    with TemporaryDirectory() as temporary:
        single = launched("cpu", Path(temporary), [{}])
        single["sharded"] = single["lenvm"]
        result = {}
        for launch in LAUNCHES:
            runs = launched(launch, Path(temporary), environments(launch))
            result[launch] = {case: differences(ours, single[case]) for case, ours in runs.items()}
    print(table(result))
    text = json.dumps(result, indent=2) + "\n"
    for path in [args.json, *([DOCS / "data" / "exactness.json"] if args.write else [])]:
        if path is not None:
            with atomic_file(Path(path)) as file:
                file.write(text.encode())
    if args.write:
        write_between(DOCS / "exactness.md", "exactness", table(result))
    if not all(is_rounding(cell) for cases in result.values() for cell in cases.values()):
        sys.exit(1)


if __name__ == "__main__":
    run(main)
