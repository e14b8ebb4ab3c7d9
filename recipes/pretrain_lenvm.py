"""Pretrain a Length Value Model on the rollouts of a policy, without labels.

The critic of the embedded policy, as it ships:

    accelerate launch recipes/pretrain_lenvm.py

The critic of your own policy (--lenvm may name a smaller model with the same tokenizer):

    accelerate launch recipes/pretrain_lenvm.py --generator Qwen/Qwen2.5-1.5B-Instruct \\
        --lenvm Qwen/Qwen2.5-0.5B-Instruct --task train.jsonl --conversational \\
        --max_new_tokens 2048 --learning_rate 2e-5 --output_dir outputs/my_lenvm

Samples completions with transformers, chooses gamma from their lengths, trains, and prints how good the critic is on
prompts it has not seen. Every flag of transformers' TrainingArguments works.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl import TrlParser

from lenvm_rl.assets import model_path
from lenvm_rl.evaluation.ceiling import explained_variance_ceiling
from lenvm_rl.launch import check_model, one_process, parse, run
from lenvm_rl.length import check_gamma
from lenvm_rl.model import LengthValueModel
from lenvm_rl.pretraining.rollouts import choose_gamma, sample_rollouts
from lenvm_rl.pretraining.trainer import LengthValueTrainer
from lenvm_rl.sampling import Prompt, SamplingSettings
from lenvm_rl.tasks import load_task


@dataclass
class PretrainArguments:
    """Whose completions to learn from, and how to sample them."""

    generator: str = "embedded/policy"
    """The policy: a folder or hub name."""

    lenvm: str | None = None
    """Model that the critic starts from; the generator itself by default. It must share the generator's tokenizer."""

    task: str = "arithmetic"
    """Where the prompts come from, as in grpo_lenvm.py."""

    conversational: bool = False
    """Put each question into a user message."""

    instruction: str | None = None
    """Text after each question; the task has a default."""

    prompts: int = 2_000
    completions_per_prompt: int = 6
    held_out_prompts: int = 500
    """Prompts that the reported numbers come from; four completions each."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    sampling_batch_size: int = 500
    """Completions sampled at once."""

    length_gamma: float | None = None
    """Discount; by default the one at which the 99th percentile of the lengths uses 99 % of the range of values."""

    ceiling_states: int = 300
    """States for the ceiling of explained variance, 16 continuations each; 0 skips it."""

    generator_name: str | None = None
    """Name of the generator that the critic remembers; the path by default."""


def main() -> None:
    parser = TrlParser([PretrainArguments, TrainingArguments])  # type: ignore[list-item]
    script, args = parse(parser, Path(__file__).parent / "configs" / "embedded_lenvm.yaml")
    one_process("pretrain_lenvm.py samples its rollouts")
    generator_path = check_model(model_path(script.generator), "generator")
    lenvm_path = check_model(model_path(script.lenvm or script.generator), "lenvm")
    settings = SamplingSettings(script.max_new_tokens, script.temperature, script.top_p)
    task = load_task(
        script.task,
        train_size=script.prompts,
        held_out_size=script.held_out_prompts,
        conversational=script.conversational,
        instruction=script.instruction,
        seed=args.seed + 1,  # where problems are generated, not those that RL trains on
    )
    tokenizer = AutoTokenizer.from_pretrained(generator_path)
    generator = AutoModelForCausalLM.from_pretrained(generator_path, dtype="float32").to(args.device)

    def rollouts(prompts: Sequence[Prompt], completions: int) -> Dataset:
        return sample_rollouts(
            generator,
            tokenizer,
            prompts,
            settings,
            completions_per_prompt=completions,
            batch_size=script.sampling_batch_size,
            seed=args.seed,
        )

    train = rollouts(task.train["prompt"], script.completions_per_prompt)
    held_out = rollouts(task.held_out["prompt"], 4)
    gamma = script.length_gamma
    if gamma is None:
        gamma = choose_gamma(train, settings.max_new_tokens)
    check_gamma(gamma, "length_gamma")
    critic = LengthValueModel.from_backbone(
        lenvm_path,
        gamma,
        tokenizer=tokenizer,
        generator=script.generator_name or script.generator,
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_tokens=settings.max_new_tokens,
        dtype="float32",
    )
    trainer = LengthValueTrainer(
        critic, args, train_dataset=train, eval_dataset=held_out, pad_token_id=tokenizer.pad_token_id or 0
    )
    generator.to("cpu")  # its memory is for the critic's optimizer now
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    scores = trainer.evaluate()
    generator.to(args.device)
    metrics = {
        "gamma": gamma,
        "rollouts": len(train),
        "cut": 1 - sum(train["finished"]) / len(train),
        "mean_squared_error": scores["eval_loss"],
        "explained_variance": scores["eval_explained_variance"],
    }
    if script.ceiling_states:
        metrics["explained_variance_ceiling"] = explained_variance_ceiling(
            generator,
            tokenizer,
            held_out,
            settings,
            gamma,
            states=script.ceiling_states,
            batch_size=script.sampling_batch_size,
            seed=args.seed,
        )
    trainer.save_model()
    tokenizer.save_pretrained(args.output_dir)
    (Path(args.output_dir) / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    run(main)
