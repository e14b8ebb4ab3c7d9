"""Guided tokens per second against unguided ones: what length guidance costs, with and without the entropy threshold.

    python benchmarks/decoding_overhead.py --write true

The critic has the size of the policy. Models: a random Qwen3-shaped pair (`--hidden_size`, `--layers`), large enough
that arithmetic and not Python is timed, and the embedded pair. Every round runs all variants, in turning order, with
the same number of tokens: none may end before. Unguided is transformers' own `generate` with top-k = k, so that all
sample from as many tokens. A ratio is the median over the rounds of one run; on a CPU the time is the process's own, so
that other work on the machine counts for little. Writes docs/data/decoding_overhead.json and the table of
docs/decoding.md.
"""

import json
import statistics
import time
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from marked import DOCS, write_between
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Qwen3Config, Qwen3ForCausalLM

from lenvm_rl.assets import model_path
from lenvm_rl.decoding import AtLeast, CachedCritic, LengthGuide, LengthTilt
from lenvm_rl.launch import run
from lenvm_rl.model import LengthValueModel
from lenvm_rl.tasks.arithmetic import arithmetic_dataset


@dataclass
class BenchmarkArguments:
    hidden_size: int = 512
    layers: int = 12
    vocab_size: int = 32_000
    open_share: float = 0.2
    """Share of the random policy's steps in which several tokens are likely; in all others one is nearly certain. The
    embedded policy is as it is."""
    batch_sizes: str = "1,4"
    rounds: int = 4
    prompt_tokens: int = 32
    new_tokens: int = 24
    num_candidates: int = 5
    entropy_threshold: float = 0.3
    beta: float = -2.0
    threads: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    write: bool = False


def main() -> None:
    (args,) = HfArgumentParser([BenchmarkArguments]).parse_args_into_dataclasses()  # type: ignore[list-item]
    torch.set_num_threads(args.threads)
    rows = []
    for name, policy, critic, tokenizer, prompts in (random_pair(args), embedded_pair(args)):
        for size in map(int, args.batch_sizes.split(",")):
            rows.append({"models": name, "batch": size, **measure(args, policy, critic, tokenizer, prompts, size)})
            print(table([rows[-1]]).splitlines()[-1], flush=True)
    if args.write:
        (DOCS / "data").mkdir(exist_ok=True)
        Path(DOCS / "data" / "decoding_overhead.json").write_text(json.dumps(rows, indent=2) + "\n")
        write_between(DOCS / "decoding.md", "overhead", table(rows))
    print(table(rows))


def random_pair(args: BenchmarkArguments) -> tuple[str, Any, Any, Any, torch.Tensor]:
    """A policy whose next token is about as uncertain as a real one's: certain at most, open at some."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=3 * args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 64,
        num_key_value_heads=args.hidden_size // 128,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    policy: Any = Qwen3ForCausalLM(config)
    policy = policy.to(args.device, getattr(torch, args.dtype)).eval()
    critic: Any = LengthValueModel.from_backbone(policy, gamma=0.997)
    torch.nn.init.normal_(critic.v_head.summary.weight, std=0.3)
    size = sum(parameter.numel() for parameter in critic.parameters()) / 1e6
    prompts = torch.randint(2, args.vocab_size, (64, args.prompt_tokens), device=args.device)
    return f"random, {size:.0f} M each", sharpened(policy, args.open_share), critic, None, prompts


def sharpened(policy: Any, open_share: float) -> Any:
    """Random weights make every token equally likely; scale their logits so that some steps are open, most are not."""
    forward = policy.forward

    @wraps(forward)
    def scaled(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        last = output.logits[:, -1]
        # the digits of a sum are as good as random, and the same in every variant
        is_open = (last.double().abs().sum(1) * 1e3) % 1 < open_share
        scale = torch.where(is_open, 4.0, 60.0).to(last.dtype) / last.std(1)
        output.logits = output.logits * scale[:, None, None]
        return output

    policy.forward = scaled
    return policy


def embedded_pair(args: BenchmarkArguments) -> tuple[str, Any, Any, Any, torch.Tensor]:
    folder = model_path("embedded/policy")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    policy: Any = AutoModelForCausalLM.from_pretrained(folder)
    critic: Any = LengthValueModel.from_pretrained(model_path("embedded/length_critic"))
    texts = arithmetic_dataset(512, seed=0, held_out=True)["prompt"]
    ids = [tokenizer(text).input_ids for text in texts]
    width = statistics.mode(map(len, ids))
    prompts = torch.tensor([row for row in ids if len(row) == width][:64], device=args.device)
    return "embedded, 0.3 M each", policy.to(args.device).eval(), critic.to(args.device), tokenizer, prompts


def measure(
    args: BenchmarkArguments, policy: Any, critic: Any, tokenizer: Any, prompts: torch.Tensor, size: int
) -> dict[str, Any]:
    """Tokens per second of each variant, and how often the critic was asked."""
    inputs: dict[str, Any] = {"input_ids": prompts[:size], "attention_mask": torch.ones_like(prompts[:size])}
    # both of the same critic, so that it lies in memory once
    guides = {
        name: LengthGuide(
            CachedCritic(critic),
            tokenizer,
            end_token_ids=[1],
            num_candidates=args.num_candidates,
            entropy_threshold=threshold,
        )
        for name, threshold in (("guided", None), ("with threshold", args.entropy_threshold))
    }
    control = AtLeast(args.new_tokens) & LengthTilt(args.beta)

    # on a shared machine the process's own time says more than the clock; an accelerator is not in it
    clock = time.process_time if args.device == "cpu" else time.perf_counter

    def seconds(name: str, tokens: int) -> float:
        torch.manual_seed(0)
        synchronize(args.device)
        start = clock()
        if name == "unguided":
            policy.generate(
                **inputs,
                do_sample=True,
                temperature=1.0,
                top_p=1.0,
                top_k=args.num_candidates,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                eos_token_id=1,
                pad_token_id=0,
            )
        else:
            guides[name].generate(policy, **inputs, controls=control, max_new_tokens=tokens)
        synchronize(args.device)
        return clock() - start

    names = ["unguided", *guides]
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        seconds(name, args.new_tokens)  # memory is allocated, kernels are chosen
    for guide in guides.values():
        guide.steering.steps = guide.steering.asked = 0
    for turn in range(args.rounds):
        for name in names[turn % 3 :] + names[: turn % 3]:
            times[name].append(seconds(name, args.new_tokens))
    steering = guides["with threshold"].steering
    return {
        "tokens_per_second": {
            name: size * args.new_tokens / statistics.median(values) for name, values in times.items()
        },
        "slower": {
            name: statistics.median(ours / base for ours, base in zip(times[name], times["unguided"], strict=True))
            for name in guides
        },
        "asked": steering.asked / steering.steps,
        "seconds": times,
        "settings": vars(args),
    }


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| models | batch | unguided, tokens/s | guided | times slower | threshold | times slower | critic asked |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        speed, slower = row["tokens_per_second"], row["slower"]
        lines.append(
            f"| {row['models']} | {row['batch']} | {speed['unguided']:.0f} | {speed['guided']:.0f} | "
            f"{slower['guided']:.2f} | {speed['with threshold']:.0f} | {slower['with threshold']:.2f} | "
            f"{row['asked']:.0%} of the steps |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
