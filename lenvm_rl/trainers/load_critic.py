"""The length critic of a run: loaded, checked against the policy, and put where it was asked for."""

import warnings
from typing import Any

from accelerate import Accelerator

from lenvm_rl.assets import model_path
from lenvm_rl.critic import Calibration, LengthCritic
from lenvm_rl.length import check_gamma, gamma_from_horizon
from lenvm_rl.model import LengthValueConfig, LengthValueModel
from lenvm_rl.tokenizer_fingerprint import check_same_tokenizer
from lenvm_rl.trainers.critic_placement import place_critic, whole_weights
from lenvm_rl.trainers.hidden_states import HiddenStates
from lenvm_rl.trainers.learning_critic import OnlineCritic, SharedCritic
from lenvm_rl.trainers.length_metrics import report_of


def load_critic(
    args: Any, accelerator: Accelerator, *, tokenizer: Any, policy_name: str, model: LengthValueModel | None = None
) -> LengthCritic:
    """A pretrained critic that may judge this policy.

    Args:
        args: configuration of a trainer, with `LengthSettings` and TRL's sampling settings.
        accelerator: the trainer's.
        tokenizer: the policy's.
        policy_name: for messages.
        model: a loaded one, instead of the path in ``args.length_critic``.

    Raises:
        ValueError: another tokenizer, or a gamma that contradicts the critic's.
    """
    if model is None:
        with whole_weights():
            model = LengthValueModel.from_pretrained(model_path(args.length_critic), gamma=args.length_gamma)
    elif args.length_gamma not in (None, model.config.gamma):
        raise ValueError(
            f"length_gamma={args.length_gamma} contradicts the critic's own {model.config.gamma}: its values "
            "mean nothing under another discount. Leave length_gamma unset."
        )
    check_same_tokenizer(tokenizer, model.config, policy_name=policy_name)
    if accelerator.is_main_process:
        _compare_sampling(args, model.config)
    if args.length_critic_update != "frozen":
        return OnlineCritic(
            model,
            accelerator,
            gamma=check_gamma(model.config.gamma),
            token_budget=args.length_token_budget,
            learning_rate=args.critic_learning_rate,
            steps=args.length_critic_steps,
            refresh_below=args.length_critic_refresh_below if args.length_critic_update == "refresh" else None,
            window=args.length_critic_refresh_window,
        )
    return LengthCritic(
        place_critic(model, accelerator, sharded=args.length_critic_placement == "sharded"),
        accelerator,
        gamma=check_gamma(model.config.gamma),
        token_budget=args.length_token_budget,
    )


def head_on_policy(args: Any, accelerator: Accelerator, hidden_states: HiddenStates, hidden_size: int) -> SharedCritic:
    """A fresh value head on the policy's hidden states.

    Args:
        args: configuration of a trainer.
        accelerator: the trainer's.
        hidden_states: of the policy.
        hidden_size: of these.
    """
    horizon = gamma_from_horizon(args.max_completion_length)
    return SharedCritic(
        hidden_states,
        hidden_size,
        accelerator,
        gamma=check_gamma(args.length_gamma if args.length_gamma is not None else horizon),
        token_budget=args.length_token_budget,
        learning_rate=args.critic_learning_rate,
        steps=args.length_critic_steps,
    )


def _compare_sampling(args: Any, critic: LengthValueConfig) -> None:
    """Warn where the rollouts are sampled otherwise than those that the critic was pretrained on."""
    ours = {
        "temperature": (args.temperature, critic.temperature),
        "top_p": (args.top_p, critic.top_p),
        "max_completion_length": (args.max_completion_length, critic.max_tokens),
    }
    for name, (value, pretrained) in ours.items():
        if pretrained is not None and value != pretrained:
            warnings.warn(
                f"{name} is {value}, but the length critic was pretrained on rollouts with {pretrained}: its "
                "values describe those. Watch length/explained_variance, or use the same setting.",
                stacklevel=4,
            )


class FirstImpression:
    """Says once, on the first rollouts, how well a critic knows the policy, and warns if it does not."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._given = False

    def __call__(self, calibration: Calibration) -> None:
        if self._given or calibration.completions == 0:
            return
        self._given = True
        report, doubt = report_of(calibration)
        self.accelerator.print(report)
        if doubt is not None and self.accelerator.is_main_process:
            warnings.warn(doubt, stacklevel=2)
