"""Memory, communication and arithmetic of a run of any size, from the formulas of `lenvm_rl/scaling.py`.

    python benchmarks/scaling.py --policy 7e9 --critic 1.5e9 --gpus 8
    python benchmarks/scaling.py --policy path/to/a/model --critic path/to/a/model --gpus 16 --reference true
    python benchmarks/scaling.py --write

A size is a number of parameters, or the folder of a model, whose config.json is enough. --write puts the table of 1.5B,
7B and 32B policies between the markers of docs/scaling.md.
"""

from dataclasses import dataclass
from pathlib import Path

from marked import DOCS, write_between
from transformers import HfArgumentParser

from lenvm_rl import scaling
from lenvm_rl.launch import run

GB = 1e9
WRITTEN = ((1.5e9, 1.5e9, 8), (7e9, 1.5e9, 8), (32e9, 1.5e9, 32))


@dataclass
class ScalingArguments:
    policy: str = "7e9"
    critic: str = "1.5e9"
    """Of the frozen length critic."""
    task_critic: str = "0"
    """Of a trained critic, as PPO has one."""
    gpus: int = 8
    reference: bool = False
    """A reference model, where beta is not 0."""
    weight_bytes: int = 2
    completions: int = 512
    """Of one step, over all GPUs."""
    prompt_tokens: int = 256
    completion_tokens: int = 4096
    iterations: int = 1
    micro_steps: int = 8
    """Of gradient accumulation, on each GPU."""
    gpu_memory: float = 80e9
    reserve: float = 20e9
    """Bytes for activations, buffers and the KV cache."""
    flops: float = 400e12
    """That a GPU reaches per second."""
    bandwidth: float = 50e9
    """Bytes per second that a GPU receives."""
    write: bool = False


def main() -> None:
    (args,) = HfArgumentParser([ScalingArguments]).parse_args_into_dataclasses()  # type: ignore[list-item]
    if args.write:
        parts = [report(args, policy, critic, 0.0, gpus) for policy, critic, gpus in WRITTEN]
        write_between(DOCS / "scaling.md", "sizes", "\n\n".join(parts))
        return
    policy, critic, task_critic = map(parameters_of, (args.policy, args.critic, args.task_critic))
    print(report(args, policy, critic, task_critic, args.gpus))


def parameters_of(size: str) -> float:
    """
    Raises:
        ValueError: neither a number nor the folder of a model.
    """
    try:
        return float(size)
    except ValueError:
        if not (Path(size) / "config.json").is_file():
            raise ValueError(
                f"{size!r} is neither a number of parameters (7e9) nor a folder with a config.json."
            ) from None
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return float(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(size)).num_parameters())


def report(args: ScalingArguments, policy: float, critic: float, task_critic: float, gpus: int) -> str:
    """A table over the stages, and what follows for the critic."""
    step = scaling.Step(args.completions, args.prompt_tokens, args.completion_tokens, args.iterations)
    cost = scaling.arithmetic(step, policy, critic, reference=args.reference, task_critic=task_critic)
    lines = [
        f"Policy {billions(policy)}, length critic {billions(critic)}, {gpus} GPUs; GB on each:",
        "",
        "| ZeRO stage | policy: weights | gradients | optimizer | reference | task critic | length critic, replica | "
        "sharded | all, with a replica | received for an update | largest replica that fits |",
        "|---" * 11 + "|",
    ]
    for stage in scaling.STAGES:
        sizes = {"stage": stage, "gpus": gpus, "weight_bytes": args.weight_bytes}
        held = scaling.trained(policy, **sizes)
        shards = gpus if stage == 3 else 1
        reference = scaling.frozen(policy if args.reference else 0, shards=shards, weight_bytes=args.weight_bytes)
        task = scaling.trained(task_critic, **sizes)
        replica = scaling.frozen(critic, weight_bytes=args.weight_bytes)
        sharded = scaling.frozen(critic, shards=gpus, weight_bytes=args.weight_bytes)
        others = held.total + reference.total + task.total
        traffic = scaling.update_traffic(
            policy + task_critic, **sizes, micro_steps=args.micro_steps, iterations=args.iterations
        )
        largest = scaling.largest_replica(args.gpu_memory, others, reserve=args.reserve, weight_bytes=args.weight_bytes)
        numbers = [held.weights, held.gradients, held.optimizer, reference.total, task.total]
        numbers += (replica.total, sharded.total, others + replica.total, traffic)
        cells = " | ".join(f"{number / GB:.1f}" for number in numbers)
        lines.append(f"| {stage} | {cells} | {billions(largest) if largest else 'none'} |")
    gathered = scaling.gathering_traffic(critic, gpus=gpus, weight_bytes=args.weight_bytes)
    hidden = scaling.hiding_tokens(args.flops, args.bandwidth, weight_bytes=args.weight_bytes)
    lines += [
        "",
        f"One step of {args.completions} completions of {args.completion_tokens:,} tokens: "
        f"{cost.rollout / 1e15:,.0f} PFLOP to generate, {cost.update / 1e15:,.0f} to update, "
        f"{cost.length_critic / 1e15:,.0f} for the length critic, {100 * cost.length_critic_share:.1f} % of all. "
        f"A sharded critic receives {gathered / GB:.1f} GB on each GPU per forward, hidden behind its arithmetic from "
        f"{hidden:,.0f} tokens on; one GPU with the only critic keeps up with "
        f"{scaling.gpus_per_server(cost):.0f} others.",
    ]
    return "\n".join(lines)


def billions(parameters: float) -> str:
    return f"{parameters / 1e9:.3g}B"


if __name__ == "__main__":
    run(main)
