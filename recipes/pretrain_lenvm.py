"""Pretrain a Length Value Model on the rollouts of a policy, without labels.

The critic of the embedded policy, as it ships:

    accelerate launch recipes/pretrain_lenvm.py

The critic of your own policy (--lenvm may name a smaller model with the same tokenizer):

    accelerate launch recipes/pretrain_lenvm.py --generator Qwen/Qwen2.5-1.5B-Instruct \\
        --lenvm Qwen/Qwen2.5-0.5B-Instruct --task train.jsonl --conversational \\
        --max_new_tokens 2048 --learning_rate 2e-5 --output_dir outputs/my_lenvm

Samples completions, chooses gamma from their lengths, trains, and prints how good the critic is on prompts it has not
seen. Every flag of transformers' TrainingArguments works. With --rollouts_dir the completions are kept, and the same
command continues a run that was stopped. Several processes may sample, with --sample_only; then one trains:

    accelerate launch --num_processes 8 recipes/pretrain_lenvm.py ... --rollouts_dir outputs/rollouts --sample_only
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from accelerate import PartialState
from transformers import AutoTokenizer, TrainingArguments
from trl import TrlParser

from lenvm_rl.assets import model_path
from lenvm_rl.evaluation.ceiling import explained_variance_ceiling
from lenvm_rl.launch import check_model, one_process, parse, run
from lenvm_rl.length import check_gamma
from lenvm_rl.model import LengthValueModel
from lenvm_rl.pretraining.generators import TransformersGenerator, create_generator
from lenvm_rl.pretraining.rollouts import choose_gamma, describe_gamma, sample_rollouts
from lenvm_rl.pretraining.trainer import LengthValueTrainer
from lenvm_rl.sampling import SamplingSettings
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
    """Completions sampled at once; requests in flight with a server."""
    rollouts_dir: str | None = None
    """Where to keep the completions; a folder with some in it is continued. Without one they stay in memory."""
    backend: str = "transformers"
    """transformers, vllm (keeps its GPU memory: use it with sample_only, then train in a second run) or server."""
    server_url: str | None = None
    """OpenAI-compatible server that knows the generator by its name; LENVM_SERVER_API_KEY may hold a key."""
    sample_only: bool = False
    """Stop when the completions are in rollouts_dir."""

    length_gamma: float | None = None
    """Discount; by default the one at which the 99th percentile of the lengths uses 99 % of the range of values."""
    ceiling_states: int = 300
    """States for the ceiling of explained variance, 16 continuations each; 0 skips it, as do vllm and server."""
    generator_name: str | None = None
    """Name of the generator that the critic remembers; the path by default."""


def main() -> None:
    parser = TrlParser([PretrainArguments, TrainingArguments])  # type: ignore[list-item]
    script, args = parse(parser, Path(__file__).parent / "configs" / "embedded_lenvm.yaml")
    if script.sample_only and script.rollouts_dir is None:
        raise ValueError("sample_only keeps nothing without a folder: add --rollouts_dir.")
    if not script.sample_only:
        one_process("pretrain_lenvm.py trains")
    if script.length_gamma is not None:
        check_gamma(script.length_gamma, "length_gamma")
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
    generator = create_generator(
        script.backend,
        generator_path,
        tokenizer,
        name=script.generator_name or script.generator,
        batch_size=script.sampling_batch_size,
        device=args.device,
        server_url=script.server_url,
    )
    model = generator.model if isinstance(generator, TransformersGenerator) else None
    sample = partial(
        sample_rollouts, generator, tokenizer, settings=settings, seed=args.seed, accelerator=PartialState()
    )
    folders = [f"{script.rollouts_dir}/{part}" if script.rollouts_dir else None for part in ("train", "held_out")]
    train = sample(task.train["prompt"], completions_per_prompt=script.completions_per_prompt, folder=folders[0])
    held_out = sample(task.held_out["prompt"], completions_per_prompt=4, folder=folders[1])
    gamma = choose_gamma(train, settings.max_new_tokens, override=script.length_gamma)
    PartialState().print(describe_gamma(gamma))
    if script.sample_only:
        return
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
    if model is not None:
        model.to("cpu")  # its memory is for the critic's optimizer now
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    scores = trainer.evaluate()
    metrics = {
        "gamma": gamma,
        "rollouts": len(train),
        "cut": 1 - sum(train["finished"]) / len(train),
        "mean_squared_error": scores["eval_loss"],
        "explained_variance": scores["eval_explained_variance"],
    }
    if script.ceiling_states and model is not None:
        metrics["explained_variance_ceiling"] = explained_variance_ceiling(
            model.to(args.device),
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
