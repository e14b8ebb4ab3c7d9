"""Policy, critic, problems and rollouts of an evaluation, each loaded when it is first asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from lenvm_rl.assets import model_path
from lenvm_rl.evaluation.steered_sampling import SteeredSampler
from lenvm_rl.launch import check_model
from lenvm_rl.length import check_gamma
from lenvm_rl.model import LengthValueModel
from lenvm_rl.pretraining.generators import TransformersGenerator
from lenvm_rl.pretraining.rollouts import sample_rollouts
from lenvm_rl.pretraining.storage import load_rollouts
from lenvm_rl.sampling import SamplingSettings
from lenvm_rl.tasks import Task, load_task
from lenvm_rl.tokenizer_fingerprint import check_same_tokenizer

FIT_SEED = 1
"""Problems that something is fitted to: those that critics are pretrained on (`recipes/pretrain_lenvm.py`)."""


@dataclass
class BenchArguments:
    """What is evaluated, on which problems, and how it is sampled."""

    policy: str = "embedded/policy"
    """The policy: a folder or hub name."""
    lenvm: str = "embedded/length_critic"
    """Its critic: a folder or hub name, of this project or of the official code."""
    length_gamma: float | None = None
    """Discount of an official checkpoint, which does not store it."""
    task: str = "arithmetic"
    """Where the prompts come from, as in grpo_lenvm.py."""
    conversational: bool = False
    """Put each question into a user message."""
    instruction: str | None = None
    """Text after each question; the task has a default."""
    problems: int = 500
    """Held-out problems."""
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 5
    """Candidates of each step in guided runs and in those they are compared with; 0 is no limit. Rollouts are drawn
    without it, as critics are trained."""
    min_p: float = 0.0
    """In the same runs, candidates less probable than this share of the most probable one are left out: it keeps a
    hard target from words that fit its length and nothing else."""
    completions_per_prompt: int = 16
    """Of the rollouts: many make the noise floor low."""
    rollouts: str | None = None
    """Folder of held-out rollouts (pretrain_lenvm.py --rollouts_dir leaves one); by default they are sampled."""
    fit_rollouts: str | None = None
    """Folder of rollouts of other prompts, that baselines and distributions are fitted to; by default sampled."""
    sampling_batch_size: int = 256
    output_dir: str = "outputs/evaluation"
    seed: int = 0


@dataclass
class Bench:
    """What the analyses share."""

    args: BenchArguments
    policies: dict[str, Any] = field(default_factory=dict)
    """Other policies by name, loaded once."""

    @cached_property
    def device(self) -> torch.device:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")

    @cached_property
    def policy(self) -> Any:
        return self.load_policy(self.args.policy, "policy")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(check_model(model_path(self.args.policy), "policy"))

    @cached_property
    def critic(self) -> LengthValueModel:
        critic: Any = LengthValueModel.from_pretrained(self.critic_folder, gamma=self.args.length_gamma)
        check_same_tokenizer(self.tokenizer, critic.config)
        return critic.to(self.device).eval()

    @property
    def critic_folder(self) -> str:
        return check_model(model_path(self.args.lenvm), "lenvm")

    @property
    def gamma(self) -> float:
        return check_gamma(self.critic.config.gamma)

    @cached_property
    def task(self) -> Task:
        """With the held-out problems of the evaluation."""
        return self._load_task(train_size=0, held_out_size=self.args.problems, seed=self.args.seed)

    @cached_property
    def settings(self) -> SamplingSettings:
        return SamplingSettings(self.args.max_new_tokens, self.args.temperature, self.args.top_p)

    @cached_property
    def rollouts(self) -> Dataset:
        """Of the held-out problems, several of each, under the whole distribution."""
        if self.args.rollouts is not None:
            return load_rollouts(self.args.rollouts)
        return self.sample_rollouts(self.policy, self.task.held_out["prompt"], self.args.completions_per_prompt)

    @cached_property
    def fit_rollouts(self) -> Dataset:
        """Of other problems than the held-out ones."""
        if self.args.fit_rollouts is not None:
            return load_rollouts(self.args.fit_rollouts)
        # many problems with one completion each: what differs most between two sets is how hard their problems are
        problems = max(500, 4 * self.args.problems)
        task = self._load_task(train_size=problems, held_out_size=0, seed=self.args.seed + FIT_SEED)
        return self.sample_rollouts(self.policy, task.train["prompt"], 1, seed=self.args.seed + FIT_SEED)

    def sample_rollouts(
        self, policy: Any, prompts: Any, completions_per_prompt: int, seed: int | None = None
    ) -> Dataset:
        """Completions of prompts, drawn as critics are trained: without `top_k`."""
        generator = TransformersGenerator(
            policy, self.tokenizer, name=self.args.policy, batch_size=self.args.sampling_batch_size
        )
        return sample_rollouts(
            generator,
            self.tokenizer,
            prompts,
            self.settings,
            completions_per_prompt=completions_per_prompt,
            seed=self.args.seed if seed is None else seed,
        )

    def sampler(self, max_new_tokens: int | None = None) -> SteeredSampler:
        """Guided and unguided completions from the same truncated candidates."""
        return SteeredSampler(
            self.policy,
            self.critic,
            self.tokenizer,
            max_new_tokens or self.args.max_new_tokens,
            temperature=self.args.temperature,
            top_k=self.args.top_k,
            top_p=self.args.top_p,
            min_p=self.args.min_p,
            batch_size=self.args.sampling_batch_size,
        )

    def load_policy(self, name: str, option: str) -> Any:
        """A policy, loaded once.

        Raises:
            ValueError: no such folder, or another tokenizer than the critic's.
        """
        if name not in self.policies:
            path = check_model(model_path(name), option)
            check_same_tokenizer(AutoTokenizer.from_pretrained(path), self.critic.config)
            policy: Any = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
            self.policies[name] = policy.to(self.device).eval()
        return self.policies[name]

    def facts(self) -> Mapping[str, Any]:
        """What was evaluated and how, for ``summary.json``."""
        args = self.args
        names = (
            "policy",
            "lenvm",
            "task",
            "problems",
            "max_new_tokens",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "seed",
        )
        return {**{name: getattr(args, name) for name in names}, "gamma": self.gamma}

    def _load_task(self, *, train_size: int, held_out_size: int, seed: int) -> Task:
        return load_task(
            self.args.task,
            train_size=train_size,
            held_out_size=held_out_size,
            seed=seed,
            conversational=self.args.conversational,
            instruction=self.args.instruction,
        )

    @staticmethod
    def label(path: str) -> str:
        """A short name of a model."""
        return Path(path).name if Path(path).exists() else path
