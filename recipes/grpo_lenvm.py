"""LenVM-GRPO: a frozen length critic makes a policy reason in fewer tokens, inside TRL's GRPO.

The embedded policy, critic and task, on whatever this machine has:

    accelerate launch recipes/grpo_lenvm.py

The same under DeepSpeed ZeRO-2, and a real model from its own configuration:

    accelerate launch --config_file recipes/accelerate/cpu_zero2.yaml recipes/grpo_lenvm.py
    accelerate launch recipes/grpo_lenvm.py --config recipes/configs/smollm2.yaml

Every flag of TRL's GRPOConfig and ModelConfig works, every flag of LenVMGRPOConfig and those below; flags win over the
YAML of --config. Plain GRPO is --length_coef 0.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, ProgressCallback
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from lenvm_rl.assets import model_path
from lenvm_rl.evaluation.accuracy import Score, evaluate_policy
from lenvm_rl.evaluation.report import comparison_table, console, sample_table, write_results
from lenvm_rl.launch import check_model, distributed_summary, parse, run
from lenvm_rl.sampling import SamplingSettings, sample_texts
from lenvm_rl.tasks import load_task
from lenvm_rl.trainers.callbacks import StopOnInterrupt, TrainingProgress
from lenvm_rl.trainers.grpo import LenVMGRPOConfig, LenVMGRPOTrainer


@dataclass
class ScriptArguments:
    """What to train on and how to evaluate."""

    task: str = "arithmetic"
    """"arithmetic" (embedded), "gym:NAME" (reasoning-gym), a JSONL file or a hub name with questions and answers."""

    train_problems: int | None = None
    """Number of training problems; the task's own number by default."""

    held_out: str | None = None
    """File or split with the evaluation problems; by default they are held out of the training problems."""

    conversational: bool = False
    """Put each question into a user message, for models with a chat template."""

    instruction: str | None = None
    """Text after each question; the task has a default."""

    eval_problems: int = 2_000
    """Held-out problems for the evaluation before and after training; 0 skips both."""

    eval_batch_size: int = 512
    """Problems sampled at once in the evaluation, on each process."""


def main() -> None:
    parser = TrlParser([ScriptArguments, LenVMGRPOConfig, ModelConfig])  # type: ignore[list-item]
    script, args, model_args = parse(parser, Path(__file__).parent / "configs" / "embedded.yaml")
    started = time.perf_counter()
    policy_path = check_model(model_path(model_args.model_name_or_path), "model_name_or_path")
    if args.length_critic is not None:
        check_model(model_path(args.length_critic), "length_critic")
    task = load_task(
        script.task,
        train_size=script.train_problems,
        held_out_size=script.eval_problems,
        conversational=script.conversational,
        instruction=script.instruction,
        held_out=script.held_out,
    )
    hub = {"revision": model_args.model_revision, "trust_remote_code": args.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(policy_path, padding_side="left", **hub)
    policy = AutoModelForCausalLM.from_pretrained(
        policy_path,
        dtype=model_args.dtype or "float32",
        attn_implementation=model_args.attn_implementation,
        quantization_config=get_quantization_config(model_args),
        **hub,
    )
    trainer = LenVMGRPOTrainer(
        model=policy,
        reward_funcs=task.reward_funcs,
        args=args,
        train_dataset=task.train,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    distributed = distributed_summary(trainer.accelerator)
    if distributed["zero_stage"] == 3 and script.eval_problems:
        raise ValueError(
            "ZeRO-3 shards the policy, and the evaluation samples from a whole one: set --eval_problems 0."
        )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    interrupt = StopOnInterrupt(trainer.accelerator)
    trainer.add_callback(TrainingProgress())
    trainer.add_callback(interrupt)

    scores: dict[str, Score | None] = {"before": None, "after": None}
    texts: dict[str, list[str]] = {}
    settings = SamplingSettings(args.max_completion_length, args.temperature, args.top_p)
    shown = task.held_out.select(range(min(3, len(task.held_out))))

    def evaluate(name: str) -> None:
        """Score the policy on the held-out problems, and keep a few completions to show."""
        if script.eval_problems == 0:
            return
        model = trainer.accelerator.unwrap_model(trainer.model)
        if distributed["type"] == "DEEPSPEED":  # leaves the model where it is until training starts
            model.to(trainer.accelerator.device)
        with trainer.accelerator.autocast():
            scores[name] = evaluate_policy(
                model,
                tokenizer,
                task.held_out,
                task.reward_funcs[0],
                settings,
                accelerator=trainer.accelerator,
                batch_size=script.eval_batch_size,
                name=name,
            )
            texts[name] = sample_texts(model, tokenizer, shown["prompt"], settings)

    evaluate("before")
    trained = time.perf_counter()
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trained = time.perf_counter() - trained
    trainer.save_model()
    if not interrupt.interrupted:
        evaluate("after")

    if not trainer.accelerator.is_main_process:
        return
    write_results(
        Path(args.output_dir),
        policy=model_args.model_name_or_path,
        critic=args.length_critic if args.length_coef else None,
        task=task.name,
        scores=scores,
        log_history=trainer.state.log_history,
        summary={
            "steps": trainer.state.global_step,
            "interrupted": interrupt.interrupted,
            "seconds": time.perf_counter() - started,
            "training_seconds": trained,
            "distributed": distributed,
            "config": {**asdict(model_args), **asdict(script), **args.to_dict()},
        },
    )
    out = console()
    if script.eval_problems:
        out.print(sample_table(shown["prompt"], texts))
        out.print(comparison_table(scores, title=task.name))
    ended = "Interrupted" if interrupt.interrupted else "Done"
    out.print(f"{ended} after {trainer.state.global_step} steps: {args.output_dir}/")


if __name__ == "__main__":
    run(main)
