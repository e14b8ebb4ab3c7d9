"""Rebuild the embedded policy and its length critic, from nothing, in about twenty minutes on one core.

    python recipes/build_assets.py --output_dir lenvm_rl/assets

1. Supervised training of a small Llama on verbose solutions of chain arithmetic (TRL's SFTTrainer): first the single
   steps, then solutions with the single steps mixed in.
2. recipes/pretrain_lenvm.py on its rollouts, with the settings of the critic that ships; its defaults are newer.
3. metrics.json with what both achieve on held-out problems; the card in lenvm_rl/assets quotes it.
"""

import json
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    GenerationConfig,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from lenvm_rl.evaluation.accuracy import evaluate_policy
from lenvm_rl.launch import run
from lenvm_rl.sampling import SamplingSettings
from lenvm_rl.tasks.arithmetic import (
    arithmetic_dataset,
    build_tokenizer,
    sample_problem,
    sample_solution,
    single_steps,
)
from reward_fns import accuracy_reward

SETTINGS = SamplingSettings(max_new_tokens=128)
CRITIC_FLAGS = ["--prompts", "2000", "--completions_per_prompt", "6", "--per_device_train_batch_size", "128"]
CRITIC_FLAGS += ["--learning_rate", "1e-3", "--packing", "false"]


@dataclass
class BuildArguments:
    """How the embedded models are made. The defaults made the ones that ship."""

    output_dir: str = "outputs/assets"
    seed: int = 0
    single_step_steps: int = 300
    """Optimizer steps on single steps alone."""
    solution_steps: int = 1_800
    """Optimizer steps on solutions."""
    solutions_per_step: int = 96


def supervised_policy(args: BuildArguments, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A policy that writes solutions as verbose and as fallible as `sample_solution`."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=240,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,  # rollouts on a CPU are bound by copying the cache
        max_position_embeddings=512,
        initializer_range=0.1,  # 1 / sqrt(hidden_size); transformers' 0.02 learns three times slower at this width
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    policy = LlamaForCausalLM(config)
    policy.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    rng = random.Random(args.seed)
    facts = single_steps()
    count = args.solutions_per_step
    rows = [pair for _ in range(args.single_step_steps) for pair in rng.sample(facts, 5 * count)]
    _train(policy, tokenizer, rows, batch=5 * count, accumulate=1, output=args.output_dir)
    rows = []
    for _ in range(args.solution_steps):
        step = [_training_solution(rng) for _ in range(count)] + rng.sample(facts, count // 2)
        # the rows of one optimizer step lie together, sorted: micro-batches without padding, and no step of one length
        rows += sorted(step, key=lambda pair: -sum(len(text.split()) for text in pair))
    _train(policy, tokenizer, rows, batch=3 * count // 8, accumulate=4, output=args.output_dir)
    return policy


def _training_solution(rng: random.Random) -> tuple[str, str]:
    problem = sample_problem(rng)
    while problem.held_out:
        problem = sample_problem(rng)
    return problem.prompt, sample_solution(rng, problem)


def _train(
    policy: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[tuple[str, str]],
    *,
    batch: int,
    accumulate: int,
    output: str,
) -> None:
    config = SFTConfig(
        output_dir=output,
        num_train_epochs=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        train_sampling_strategy="sequential",
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        weight_decay=0.01,
        adam_beta2=0.98,
        max_length=None,
        use_cpu=not torch.accelerator.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_steps=100,
        report_to="none",
    )
    dataset = Dataset.from_dict({"prompt": [p for p, _ in rows], "completion": [f" {c}" for _, c in rows]})
    SFTTrainer(model=policy, args=config, train_dataset=dataset, processing_class=tokenizer).train()


def main() -> None:
    (args,) = HfArgumentParser([BuildArguments]).parse_args_into_dataclasses()  # type: ignore[list-item]
    started = time.perf_counter()
    output = Path(args.output_dir)
    torch.set_num_threads(1)  # matrices this small gain nothing from more, and lose much on a busy machine
    set_seed(args.seed)
    tokenizer = build_tokenizer()
    policy = supervised_policy(args, tokenizer)
    policy.save_pretrained(output / "policy")
    tokenizer.save_pretrained(output / "policy")
    score = evaluate_policy(
        policy,
        tokenizer,
        arithmetic_dataset(2_000, args.seed, held_out=True),
        accuracy_reward,
        SETTINGS,
        batch_size=500,
    )
    pretrain = [sys.executable, str(Path(__file__).with_name("pretrain_lenvm.py"))]
    generator = ["--generator", str(output / "policy"), "--generator_name", "embedded/policy"]
    critic = output / "length_critic"
    where = ["--seed", str(args.seed), "--output_dir", str(critic)]
    subprocess.run([*pretrain, *generator, *CRITIC_FLAGS, *where], check=True)
    metrics = {
        "policy": score.to_dict(),
        "length_critic": json.loads((critic / "report" / "metrics.json").read_text()),
        "seconds": round(time.perf_counter() - started),
    }
    shutil.rmtree(critic / "report")
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    run(main)
