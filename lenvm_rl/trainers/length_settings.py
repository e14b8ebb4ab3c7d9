"""The settings of the length signal, which the trainers share. What of them cannot work: `length_checks.py`."""

from dataclasses import dataclass
from typing import Literal

from lenvm_rl.credit import LengthCredit
from lenvm_rl.length_controller import ControllerSettings

SHARED = "shared"
"""Name of a critic that is a value head on the policy's own hidden states."""

CriticUpdateKind = Literal["frozen", "online", "refresh"]


@dataclass
class LengthSettings:
    """Fields of a trainer's configuration that concern the length signal."""

    length_critic: str | None = None
    """Folder or hub name of the pretrained Length Value Model. "shared" is a value head on the policy's own hidden
    states, which learns from nothing during the run. None trains without length credit."""

    length_gamma: float | None = None
    """Discount of the critic. None takes the one stored with it; official checkpoints store none and require it. For a
    "shared" one, None is the discount whose horizon is `max_completion_length`."""

    length_critic_placement: str = "replica"
    """Where the frozen critic lives: "replica", whole on every process and in its own dtype, or "sharded" over all of
    them (ZeRO-3 only), for one that a GPU cannot hold beside the policy; every process still loads it whole into host
    memory. A critic that was loaded under ZeRO-3 and given as an object is sharded in any case."""

    length_critic_update: str = "frozen"
    """"frozen", or "online": regress the critic on the lengths of every batch of rollouts, after it has judged them;
    or "refresh": only while it explains less than `length_critic_refresh_below` of their variance. A "shared" critic
    is always online."""

    length_critic_learning_rate: float | None = None
    """Of a critic that learns during the run. None is 3e-3 for a "shared" head and 3e-4 for a whole critic, which suits
    a small one: take 1e-5 for one of a billion parameters."""

    length_critic_steps: int = 4
    """Optimizer steps on each batch of rollouts, whose completions they share out."""

    length_backbone_coef: float = 0.0
    """Weight of a "shared" critic's squared error in the policy's loss. 0: no gradient of it reaches the policy."""

    length_critic_refresh_below: float = 0.5
    """Explained variance on the latest rollouts below which "refresh" trains."""

    length_critic_refresh_window: int = 4
    """Batches of rollouts, the latest ones, that "refresh" trains on."""

    length_critic_trust: float = 0.2
    """Explained variance on the latest rollouts below which the coefficient shrinks, in proportion, to 0 where the
    critic explains nothing. 0 trusts every critic."""

    length_coef: float = 1.0
    """Weight s of the length advantage (LenVM eq. 27). Positive shortens, negative lengthens, 0 is plain GRPO."""

    length_controller: str = "none"
    """Lets the coefficient change, starting from `length_coef`: "accuracy" shortens as far as the share of correct
    completions stays at a target, "tokens" leads to a mean length and holds it, "linear" and "cosine" are schedules."""

    length_controller_target: float | None = None
    """Share of correct completions ("accuracy"; None takes that of the first batches, minus its standard error and the
    margin; more is due at the end of training), or mean tokens of a completion ("tokens")."""

    length_controller_margin: float = 0.01
    """Accuracy that may be given away, where the target is the policy's own start."""

    length_controller_rate: float = 3.0
    """Change of the coefficient's logarithm by one batch, for a slack of 1 ("accuracy"), or the coefficient for a
    length e times what is due ("tokens")."""

    length_controller_smoothing: float = 0.7
    """Weight of the past in the mean of accuracy or length over batches."""

    length_controller_warmup: int = 5
    """Batches before the controller first changes the coefficient."""

    length_controller_low: float = 0.05
    """Least size of the coefficient under "accuracy"."""

    length_controller_high: float = 10.0
    """Largest size of the controlled coefficient."""

    length_controller_end: float = 0.0
    """Coefficient at the end of a schedule."""

    length_mode: str = "additive"
    """"additive" (LenVM eq. 27), or "shaping": potential-based, with the length values as the potential (eq. 28-32). It
    changes the variance of the gradient and not what is optimal, under conditions of which a run says where it breaks
    one: it does not shorten by itself."""

    length_shaping_discounted: bool = False
    """With `length_mode="shaping"` in GRPO: gamma * Phi(s') - Phi(s), as the paper writes it, for an objective that
    GRPO does not have, instead of Phi(s') - Phi(s). PPO takes its own discount."""

    length_target: float | None = None
    """Tokens that a completion should have: the signal presses towards them from both sides, by how much nearer to the
    target a token brought the completion than the critic expected. None always shortens (or lengthens)."""

    length_target_column: str | None = None
    """Column of the dataset with each prompt's own `length_target`."""

    length_lambda: float = 1.0
    """lambda of the length advantage, in [0, 1]: 1 is return minus value, 0 the one-step residual (LenVM eq. 24)."""

    length_gate: str = "correct"
    """Completions that feel the length signal: "correct", "all", or "solve_rate" (correct, times the share of the group
    that is correct). The two that depend on the outcome make the critic a biased baseline of what they gate."""

    length_unsolved_groups: bool = False
    """With `length_gate="all"`: also groups without a correct completion feel the signal, as in the paper."""

    length_gate_reward: str | None = None
    """Name of the reward function that says what is correct. None is the first one."""

    length_gate_threshold: float = 1.0
    """Reward from which a completion counts as correct."""

    length_scale: str = "none"
    """"none", or "std": divide the length advantage by its standard deviation over the gated tokens of the batch."""

    length_clip: float | None = None
    """Largest size of a token's length advantage, after `length_scale` and before `length_coef`."""

    length_resolution: str = "token"
    """What shares one length advantage: a "token" has its own, a "completion" the mean of its tokens, the "batch" the
    mean of all gated tokens, which says nothing of length. The last two are controls: what do the tokens add?"""

    length_collapse_patience: int = 20
    """Batches in a row, with accuracy more than `length_collapse_drop` under its best and shorter completions than
    then, after which training stops with a checkpoint. Both are smoothed. 0 never stops."""

    length_collapse_drop: float = 0.15
    """Share of correct completions, see above."""

    length_token_budget: int = 16_384
    """Tokens of one critic forward, padding included. Lower it when the critic runs out of memory."""

    @property
    def critic_learns(self) -> bool:
        return self.length_critic_update != "frozen" or self.length_critic == SHARED

    @property
    def critic_learning_rate(self) -> float:
        """`length_critic_learning_rate`, or what it stands for."""
        if self.length_critic_learning_rate is not None:
            return self.length_critic_learning_rate
        return 3e-3 if self.length_critic == SHARED else 3e-4

    def controller_settings(self) -> ControllerSettings:
        return ControllerSettings(
            kind=self.length_controller,  # type: ignore[arg-type]
            target=self.length_controller_target,
            margin=self.length_controller_margin,
            rate=self.length_controller_rate,
            smoothing=self.length_controller_smoothing,
            warmup=self.length_controller_warmup,
            low=self.length_controller_low,
            high=self.length_controller_high,
            end=self.length_controller_end,
        )

    def length_credit(self) -> LengthCredit:
        return LengthCredit(
            coef=self.length_coef,
            lam=self.length_lambda,
            gate=self.length_gate,  # type: ignore[arg-type]
            threshold=self.length_gate_threshold,
            unsolved=self.length_unsolved_groups,
            scale=self.length_scale,  # type: ignore[arg-type]
            mode=self.length_mode,  # type: ignore[arg-type]
            discounted=self.length_shaping_discounted,
            clip=self.length_clip,
            resolution=self.length_resolution,  # type: ignore[arg-type]
            targeted=self.length_target is not None or self.length_target_column is not None,
        )
