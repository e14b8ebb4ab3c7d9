"""One training run, from names to results: what the GRPO and PPO recipes do once they have read their arguments.

1. Load policy and task, build the trainer with the method's length reward beside the task's own.
2. Evaluate, train, save, evaluate again; in between, Ctrl-C or SIGTERM ends training after the current step, or after
   the next one that a run can be continued from, if it saves checkpoints.
3. Leave a policy with its card, curves, `outcomes.npz` (what each evaluation said of every held-out problem) and, last
   of all, `summary.json`: a folder that holds it is a run that came to its end.
"""

import json
import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import WandbCallback
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from lenvm_rl.assets import model_path
from lenvm_rl.atomic_file import atomic_file
from lenvm_rl.evaluation.accuracy import Score, evaluate_policy
from lenvm_rl.evaluation.contest import build_length_reward, find_contender, read_value, trainer_flags
from lenvm_rl.evaluation.report import comparison_table, console, sample_table, write_results
from lenvm_rl.launch import TERMINATED, check_model, distributed_summary, leave_group, parse
from lenvm_rl.sampling import SamplingSettings, end_token_ids, sample_texts
from lenvm_rl.tasks import Task, load_task
from lenvm_rl.trainers.callbacks import StopOnInterrupt, TrainingProgress
from lenvm_rl.trainers.grpo import LenVMGRPOConfig, LenVMGRPOTrainer
from lenvm_rl.trainers.length_settings import SHARED
from lenvm_rl.trainers.ppo import LenVMPPOConfig, LenVMPPOTrainer
from lenvm_rl.trainers.wandb_offline import WandbOrOffline
from lenvm_rl.trainers.whole_policy import whole_policy

OUTCOMES_FILE = "outcomes.npz"


@dataclass
class ExperimentArguments:
    """What to train on and how to evaluate."""

    task: str = "arithmetic"
    """"arithmetic" (embedded), "gym:NAME" (reasoning-gym), a JSONL file or a hub name with questions and answers."""

    train_problems: int | None = None
    """Number of training problems; the task's own number by default."""

    held_out: str | None = None
    """File or split with the evaluation problems; by default they are held out of the training problems."""

    solution_column: str | None = None
    """Column of the golds in a file or hub dataset, where it is neither "solution" nor "answer"."""

    conversational: bool = False
    """Put each question into a user message, for models with a chat template."""

    instruction: str | None = None
    """Text after each question; the task has a default."""

    eval_problems: int = 2_000
    """Held-out problems for the evaluation before and after training; 0 skips both."""

    eval_batch_size: int = 512
    """Problems sampled at once in the evaluation, on each process."""

    evaluate_before: bool = True
    """Evaluate before training as well."""

    evaluate_only: bool = False
    """Evaluate the policy as it is, and train nothing."""

    progress_file: str | None = None
    """File that always holds how far training is, as "step/steps", for whoever watches the run."""


@dataclass(frozen=True)
class LengthMethod:
    """A length reward, and what it is called."""

    name: str
    """For people: the model card and the title of the curves."""
    reward: str
    """Of `reward_fns.METHODS`."""
    settings: Mapping[str, Any]
    """Of the reward's constructor; what is left out takes the published value."""


def run_experiment(
    script: ExperimentArguments,
    args: LenVMGRPOConfig,
    model_args: ModelConfig,
    length_method: LengthMethod | None = None,
) -> None:
    """Train a policy and leave the results in ``args.output_dir``.

    Args:
        script, args, model_args: as parsed by a recipe.
        length_method: a length reward beside the task's own; None is LenVM-GRPO, or plain GRPO without its critic.

    With a `LenVMPPOConfig` it is PPO instead of GRPO.

    Raises:
        ValueError: settings that contradict each other, a model folder that is none, problems that cannot be used.
        SystemExit: SIGTERM ended the run, which left its results all the same.
    """
    started = time.perf_counter()
    algorithm = "PPO" if isinstance(args, LenVMPPOConfig) else "GRPO"
    method = f"LenVM-{algorithm}" if args.length_critic and args.length_coef else algorithm
    if length_method is not None:
        method = f"{method} with the length reward of {length_method.name}"
    if script.evaluate_only and script.eval_problems == 0:
        raise ValueError("evaluate_only with eval_problems=0 leaves nothing to do: raise eval_problems.")
    policy_path = check_model(model_path(str(model_args.model_name_or_path)), "model_name_or_path")
    if args.length_critic not in (None, SHARED):
        check_model(model_path(str(args.length_critic)), "length_critic")
    task = load_task(
        script.task,
        train_size=script.train_problems,
        held_out_size=script.eval_problems,
        conversational=script.conversational,
        instruction=script.instruction,
        held_out=script.held_out,
        solution_column=script.solution_column,
    )
    trainer, tokenizer = _build(policy_path, args, model_args, task, length_method)
    distributed = distributed_summary(trainer.accelerator)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if "wandb" in (args.report_to or ()):
        trainer.remove_callback(WandbCallback)
        trainer.add_callback(WandbOrOffline())
    saves = args.save_strategy != "no"
    interrupt = StopOnInterrupt(trainer.accelerator, lambda: trainer.at_window_end or not saves)
    for added in (TrainingProgress(), interrupt, SaveOnInterrupt(interrupt)):
        trainer.add_callback(added)
    if script.progress_file:
        trainer.add_callback(ProgressFile(Path(script.progress_file)))
    evaluation = Evaluation(trainer, tokenizer, task, script, args)

    if script.evaluate_before or script.evaluate_only:
        evaluation.run("before")
    training_seconds = 0.0
    if not script.evaluate_only:
        began = time.perf_counter()
        checkpoint = trainer.checked_checkpoint(args.resume_from_checkpoint)
        if not _load_trained(trainer, args, checkpoint):
            trainer.train(resume_from_checkpoint=checkpoint)
        training_seconds = time.perf_counter() - began
        trainer.save_model()
        trainer.save_length_critic(Path(str(args.output_dir)) / "length_critic")
        if not interrupt.interrupted:
            evaluation.run("after")

    if trainer.accelerator.is_main_process:
        output = Path(str(args.output_dir))
        output.mkdir(parents=True, exist_ok=True)
        evaluation.save_outcomes(output / OUTCOMES_FILE)
        write_results(
            output,
            policy=str(model_args.model_name_or_path),
            critic=args.length_critic if args.length_coef else None,
            method=method,
            task=task.name,
            scores=evaluation.scores,
            log_history=trainer.state.log_history,
            summary={
                "steps": trainer.state.global_step,
                "interrupted": interrupt.interrupted,
                "collapsed": trainer.collapse.verdict,
                "seconds": time.perf_counter() - started,
                "training_seconds": training_seconds,
                **_spent(trainer.state.log_history, args.logging_steps),
                "distributed": distributed,
                "method": method,
                "reward": asdict(length_method) if length_method else None,
                "config": {**asdict(model_args), **asdict(script), **args.to_dict()},
            },
        )
        out = console()
        if script.eval_problems:
            out.print(sample_table(evaluation.shown["prompt"], evaluation.texts))
            out.print(comparison_table(evaluation.scores, title=task.name))
        ended = "Interrupted" if interrupt.interrupted else "Collapsed" if trainer.collapse.verdict else "Done"
        out.print(f"{ended} after {trainer.state.global_step} steps: {args.output_dir}/")
    if interrupt.terminated:
        trainer.accelerator.wait_for_everyone()  # a launcher ends the others with the first one that is gone
        leave_group()
        raise SystemExit(TERMINATED)


Arguments = tuple[ExperimentArguments, LenVMGRPOConfig, ModelConfig, LengthMethod | None]


def read_contender_flags(flags: Sequence[str], default_config: Path) -> Arguments:
    """What a run of one of `contest.CONTENDERS` is made of, from the flags of recipes/grpo_baseline.py.

    Args:
        flags: ``--method NAME``, ``--knob VALUE``, ``--reward_settings MAPPING``, and those of the configurations,
            which win over the trainer's fields that belong to the method.
        default_config: YAML below them, where there is no ``--config``.

    Raises:
        OSError: no such config file.
        ValueError: an unknown method or flag, or a setting that the method does not have.
    """
    own = ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--method", required=True, help="one of lenvm_rl.evaluation.contest.CONTENDERS")
    own.add_argument("--knob", type=read_value, help="value of the method's main setting")
    own.add_argument("--reward_settings", type=read_value, default={}, help="of the length reward: '{limit: 48}'")
    parser = TrlParser([ExperimentArguments, LenVMGRPOConfig, ModelConfig])  # type: ignore[list-item]
    if {"-h", "--help"} & set(flags):
        own.print_help()
        parser.parse_args(["--help"])
    chosen, rest = own.parse_known_args(flags)
    if not isinstance(chosen.reward_settings, dict):
        raise ValueError(f"--reward_settings {chosen.reward_settings!r} is no mapping: write '{{limit: 48}}'.")
    _, contender = find_contender(chosen.method)
    settings, trainer = contender.turned(contender.recommended if chosen.knob is None else chosen.knob)
    if contender.algorithm == "ppo":
        parser = TrlParser([ExperimentArguments, LenVMPPOConfig, ModelConfig])  # type: ignore[list-item]
    script, args, model_args = parse(parser, default_config, [*trainer_flags(trainer), *rest])
    if args.length_coef == 0:
        args.length_critic = None  # it would only measure
    if script.task != "arithmetic":  # what the table says suits the embedded task
        settings = {contender.knob: chosen.knob} if chosen.knob is not None and contender.knob in settings else {}
    settings |= chosen.reward_settings
    if contender.reward is not None:
        return script, args, model_args, LengthMethod(contender.label, contender.reward, settings)
    if settings:
        raise ValueError(f"{contender.label} has no length reward to which --reward_settings could apply.")
    return script, args, model_args, None


def _build(
    policy_path: str, args: LenVMGRPOConfig, model_args: ModelConfig, task: Task, method: LengthMethod | None
) -> tuple[LenVMGRPOTrainer, Any]:
    hub = {"revision": model_args.model_revision, "trust_remote_code": args.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(policy_path, padding_side="left", **hub)
    policy = AutoModelForCausalLM.from_pretrained(
        policy_path,
        dtype=model_args.dtype or "float32",
        attn_implementation=model_args.attn_implementation,
        quantization_config=get_quantization_config(model_args),
        **hub,
    )
    rewards = list(task.reward_funcs)
    if method is not None:
        ends = end_token_ids(policy, tokenizer)
        rewards.append(build_length_reward(method.reward, method.settings, correctness=rewards[0], eos_token_ids=ends))
    trainer_class: Any = LenVMPPOTrainer if isinstance(args, LenVMPPOConfig) else LenVMGRPOTrainer
    trainer = trainer_class(
        model=policy,
        reward_funcs=rewards,
        args=args,
        train_dataset=task.train,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    return trainer, tokenizer


def _load_trained(trainer: LenVMGRPOTrainer, args: LenVMGRPOConfig, checkpoint: str | None) -> bool:
    """Load a checkpoint at the last step, from which transformers (5.x) would train one step more; False for others."""
    if checkpoint is None or args.max_steps < 1:
        return False
    state = Path(checkpoint) / "trainer_state.json"
    if json.loads(state.read_text())["global_step"] < args.max_steps:
        return False
    trainer.state = TrainerState.load_from_json(str(state))
    trainer._load_from_checkpoint(str(state.parent))
    return True


class Evaluation:
    """Scores of a trainer's policy on held-out problems, what was said of each one, and a few completions to show."""

    def __init__(
        self, trainer: Any, tokenizer: Any, task: Task, script: ExperimentArguments, args: LenVMGRPOConfig
    ) -> None:
        self.trainer, self.tokenizer, self.task, self.script = trainer, tokenizer, task, script
        self.settings = SamplingSettings(trainer.max_completion_length, args.temperature, args.top_p)
        self.scores: dict[str, Score | None] = {"before": None, "after": None}
        self.texts: dict[str, list[str]] = {}
        self.outcomes: dict[str, np.ndarray] = {}
        self.shown: Dataset = task.held_out.select(range(min(3, len(task.held_out))))

    def run(self, name: str) -> None:
        """Sample one completion per problem, from the same random state each time."""
        if self.script.eval_problems == 0:
            return
        accelerator = self.trainer.accelerator
        recorded = RecordedReward(self.task.reward_funcs[0])
        with whole_policy(self.trainer) as model, accelerator.autocast():
            self.scores[name] = evaluate_policy(
                model,
                self.tokenizer,
                self.task.held_out,
                recorded,
                self.settings,
                accelerator=accelerator,
                batch_size=self.script.eval_batch_size,
                name=name,
            )
            self.texts[name] = sample_texts(model, self.tokenizer, self.shown["prompt"], self.settings)
        correct, tokens = _in_order(recorded, accelerator.num_processes, len(self.task.held_out))
        self.outcomes |= {f"{name}_correct": correct, f"{name}_tokens": tokens}

    def save_outcomes(self, path: Path) -> None:
        """Arrays `before_correct`, `before_tokens`, `after_correct`, `after_tokens`, one entry per held-out problem."""
        if not self.outcomes:
            return
        with atomic_file(path) as file:
            np.savez_compressed(file, **self.outcomes)  # type: ignore[arg-type]


class RecordedReward:
    """A reward function that keeps, for each completion, whether it was correct and how many tokens it had."""

    def __init__(self, reward_func: Callable[..., Any], threshold: float = 1.0) -> None:
        self.reward_func, self.threshold = reward_func, threshold
        self.correct: list[bool] = []
        self.tokens: list[int] = []

    def __call__(self, *, completion_ids: Sequence[Sequence[int]], **inputs: Any) -> Any:
        rewards = self.reward_func(completion_ids=completion_ids, **inputs)
        self.correct += [reward is not None and reward >= self.threshold for reward in rewards]
        self.tokens += [len(ids) for ids in completion_ids]
        return rewards


def _in_order(recorded: RecordedReward, processes: int, problems: int) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes of all processes in the order of the problems, of which process p evaluates p, p + processes, ..."""
    own = [(recorded.correct, recorded.tokens)]
    parts = gather_object(own) if processes > 1 else own
    correct, tokens = np.zeros(problems, dtype=bool), np.zeros(problems, dtype=np.int32)
    for process, (own_correct, own_tokens) in enumerate(parts):
        correct[process::processes], tokens[process::processes] = own_correct, own_tokens
    return correct, tokens


def _spent(log_history: list[dict[str, Any]], logging_steps: float) -> dict[str, float]:
    """What training took over all sessions of a resumed run, as its log has it: it is saved with the checkpoints."""
    every = max(1, int(logging_steps))
    steps = [entry["step_time"] for entry in log_history if entry.get("step_time") is not None]
    tokens = [entry["num_tokens"] for entry in log_history if entry.get("num_tokens") is not None]
    return {"step_seconds": every * sum(steps), "sampled_tokens": max(tokens, default=0)}


class SaveOnInterrupt(TrainerCallback):
    """A run that saves checkpoints also saves one when it is interrupted, so that nothing is lost."""

    def __init__(self, interrupt: StopOnInterrupt) -> None:
        self.interrupt = interrupt

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.interrupt.interrupted and args.save_strategy != "no":
            control.should_save = True


class ProgressFile(TrainerCallback):
    """How far training is, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self.path.write_text(f"{state.global_step}/{state.max_steps}\n")
