"""Pretrain a Length Value Model on the rollouts of a policy, without labels, and report how good it is.

The critic of the embedded policy, as it ships:

    accelerate launch recipes/pretrain_lenvm.py

The critic of your own policy (--lenvm may name a smaller model with the same tokenizer, or a LenVM to go on with):

    accelerate launch recipes/pretrain_lenvm.py --generator Qwen/Qwen2.5-1.5B-Instruct \\
        --lenvm Qwen/Qwen2.5-0.5B-Instruct --task train.jsonl --conversational \\
        --max_new_tokens 2048 --learning_rate 2e-5 --output_dir outputs/my_lenvm

Samples completions, chooses gamma from their lengths, trains, and leaves a page about the critic in output_dir/report.
Every flag of transformers' TrainingArguments works, and those of `LengthValueTrainingArguments`: --lora_rank 16,
--frozen_backbone, --loss bce, ... With --rollouts_dir the completions are kept, and the same command continues a run
that was stopped; several processes (accelerate launch --num_processes 8) share them through it.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from accelerate import PartialState
from transformers import AutoTokenizer
from trl import TrlParser

from lenvm_rl.assets import model_path
from lenvm_rl.evaluation.ceiling import explained_variance_ceiling
from lenvm_rl.evaluation.length_report import summary, write_length_report
from lenvm_rl.evaluation.length_values import evaluate_lenvm
from lenvm_rl.launch import check_model, parse, run
from lenvm_rl.length import check_gamma
from lenvm_rl.model import LengthValueModel
from lenvm_rl.pretraining.arguments import LengthValueTrainingArguments
from lenvm_rl.pretraining.data import check_backbone_tokenizer
from lenvm_rl.pretraining.generators import TransformersGenerator, create_generator
from lenvm_rl.pretraining.initialisation import initial_critic
from lenvm_rl.pretraining.rollouts import describe_gamma, sample_rollouts
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
    parser = TrlParser([PretrainArguments, LengthValueTrainingArguments])  # type: ignore[list-item]
    script, args = parse(parser, Path(__file__).parent / "configs" / "embedded_lenvm.yaml")
    if script.sample_only and script.rollouts_dir is None:
        raise ValueError("sample_only keeps nothing without a folder: add --rollouts_dir.")
    if args.n_gpu > 1:
        raise ValueError(f"{args.n_gpu} GPUs are visible to one process: use accelerate launch --num_processes.")
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
    if lenvm_path != generator_path:
        check_backbone_tokenizer(tokenizer, AutoTokenizer.from_pretrained(lenvm_path))
    name = script.generator_name or script.generator
    generator = create_generator(
        script.backend,
        generator_path,
        tokenizer,
        name=name,
        batch_size=script.sampling_batch_size,
        device=args.device,
        server_url=script.server_url,
    )
    policy = generator.model if isinstance(generator, TransformersGenerator) else None
    state = PartialState()
    sample = partial(sample_rollouts, generator, tokenizer, settings=settings, seed=args.seed, accelerator=state)
    folders = [f"{script.rollouts_dir}/{part}" if script.rollouts_dir else None for part in ("train", "held_out")]
    train = sample(task.train["prompt"], completions_per_prompt=script.completions_per_prompt, folder=folders[0])
    held_out = sample(task.held_out["prompt"], completions_per_prompt=4, folder=folders[1])
    critic = initial_critic(
        lenvm_path, train, tokenizer=tokenizer, generator=name, settings=settings, gamma=script.length_gamma
    )
    gamma = check_gamma(critic.config.gamma)
    state.print(describe_gamma(gamma))
    if script.sample_only:
        return

    trainer = LengthValueTrainer(
        critic, args, train_dataset=train, eval_dataset=held_out, pad_token_id=tokenizer.pad_token_id or 0
    )
    if policy is not None:
        policy.to("cpu")  # its memory is for the critic's optimizer now
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    if args.process_index != 0:
        return
    tokenizer.save_pretrained(args.output_dir)

    saved = LengthValueModel.from_pretrained(args.output_dir).to(args.device)  # what others will load
    policy = policy and policy.to(args.device)
    ceiling = None
    if script.ceiling_states and policy is not None:
        nested = {"states": script.ceiling_states, "batch_size": script.sampling_batch_size, "seed": args.seed}
        ceiling = explained_variance_ceiling(policy, tokenizer, held_out, settings, gamma, **nested)
    evaluation = evaluate_lenvm(saved, held_out, fit_on=train, policy=policy, seed=args.seed)
    sampling = f"temperature {settings.temperature:g}, top-p {settings.top_p:g}, {settings.max_new_tokens} tokens"
    facts = {"generator": name, "task": script.task, "sampling": sampling}
    facts["trained on"] = f"{len(train):,} completions of {script.prompts:,} prompts, {args.num_train_epochs:g} epochs"
    folder, title = Path(args.output_dir) / "report", f"Length critic of {name}"
    page = write_length_report(evaluation, folder, title=title, tokenizer=tokenizer, facts=facts, ceiling=ceiling)
    print(summary(evaluation, ceiling), f"The whole page: {page}", sep="\n")


if __name__ == "__main__":
    run(main)
