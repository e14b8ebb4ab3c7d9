"""Methods that shorten reasoning, as they enter a comparison: one table, and the flags that make a run of each.

To add a method, add an entry to `CONTENDERS`: its length reward (a name of `reward_fns.METHODS`), the settings that
suit the embedded task, the trainer's fields that belong to it, and the one setting that trades accuracy for tokens with
the values to try. `recipes/grpo_baseline.py --method NAME` and `recipes/compare.py NAME` know it from then on.

Left out: `cosine` (TRL's implementation takes conversations only and replaces the correctness reward), `l1-exact` and
`format-length` (they aim at a length, not at fewer tokens).
"""

import difflib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from reward_fns import METHODS, length_reward

Knob = float | int | str | Mapping[int, int] | None


@dataclass(frozen=True)
class Contender:
    """A method with its settings for the embedded task, whose completions have 20 to 60 tokens, at most 128."""

    label: str
    """For tables and figures."""
    reward: str | None = None
    """Its length reward; None where it has none."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the length reward; what is left out takes the published value."""
    trainer: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the trainer's configuration that belong to the method."""
    algorithm: Literal["grpo", "ppo"] = "grpo"
    """The trainer: `LenVMGRPOTrainer` or `LenVMPPOTrainer`."""
    knob: str | None = None
    """The setting, of `settings` or of `trainer`, that says how strongly it shortens."""
    sweep: tuple[Knob, ...] = (None,)
    """Values of the knob for a curve; the recommended one is the one in `settings` or `trainer`."""

    @property
    def recommended(self) -> Knob:
        """Value of the knob that the method enters with."""
        return {**self.settings, **self.trainer}[self.knob] if self.knob else None

    def turned(self, value: Knob) -> tuple[dict[str, Any], dict[str, Any]]:
        """Settings of the reward and of the trainer with the knob at a value.

        Raises:
            ValueError: a value for a method without a knob.
        """
        settings, trainer = dict(self.settings), dict(self.trainer)
        if self.knob is None:
            if value is not None:
                raise ValueError(f"{self.label} has no knob that could be set to {value!r}: leave the value out.")
        elif self.knob in trainer:
            trainer[self.knob] = value
        else:
            settings[self.knob] = value
        return settings, trainer


_PLAIN = {"length_coef": 0.0}
_PPO = {"value_learning_rate": 1e-3, "value_warmup_steps": 5}
_DLER = {
    **_PLAIN,
    "advantage_normalization": "group_centred_batch_std",
    "dynamic_sampling": True,
    # clip-higher acts only where a batch of rollouts makes several updates; the embedded preset makes one
    "epsilon": 0.2,
    "epsilon_high": 0.28,
}

CONTENDERS: dict[str, Contender] = {
    "grpo": Contender("GRPO", trainer=_PLAIN),
    "lenvm": Contender("LenVM", trainer={"length_coef": 1.0}, knob="length_coef", sweep=(0.3, 1.0, 3.0)),
    # at DLER's budget: groups that are all correct are replaced, too, and the others, where the task signal is strong,
    # need a larger coefficient
    "lenvm-resampled": Contender(
        "LenVM, resampling",
        trainer={
            "length_coef": 5.0,
            "dynamic_sampling": True,
            "resample_correct_groups": True,
            "max_resample_rounds": 2,
        },
        knob="length_coef",
        sweep=(3.0, 5.0, 10.0),
    ),
    # a task critic instead of groups; the completions of a prompt are as many as those of the others
    "ppo": Contender("PPO", trainer={**_PLAIN, **_PPO}, algorithm="ppo"),
    "ppo-lenvm": Contender(
        "PPO, LenVM",
        trainer={"length_coef": 1.0, **_PPO},
        knob="length_coef",
        sweep=(0.5, 1.0, 2.0),
        algorithm="ppo",
    ),
    "dler": Contender("DLER", "dler", {"limit": 48}, _DLER, knob="limit", sweep=(64, 48, 40, 32)),
    # dynamic sampling generates about twice as much; this is what DLER does with the budget of the others
    "dler-static": Contender(
        "DLER, no resampling",
        "dler",
        {"limit": 48},
        {**_DLER, "dynamic_sampling": False},
        knob="limit",
        sweep=(64, 48, 40, 32),
    ),
    "da-dler": Contender(
        "DA-DLER", "da-dler", {"limit": 64, "easy_limit": 32}, _DLER, knob="easy_limit", sweep=(48, 40, 32, 24)
    ),
    "hapo": Contender("HAPO", "hapo", {"weight": 1.0}, _PLAIN, knob="weight", sweep=(0.25, 0.5, 1.0)),
    "kimi": Contender(
        "Kimi k1.5", "kimi", {"weight": 0.4, "warmup_steps": 10}, _PLAIN, knob="weight", sweep=(0.2, 0.4, 0.8)
    ),
    "arora-zanette": Contender(
        "Arora & Zanette", "arora-zanette", {"alpha": 0.2}, _PLAIN, knob="alpha", sweep=(0.1, 0.2, 0.4)
    ),
    "grpo-lambda": Contender(
        "GRPO-lambda", "grpo-lambda", {"top_share": 0.2, "alpha": 0.6}, _PLAIN, knob="alpha", sweep=(0.3, 0.6, 0.9)
    ),
    "shorterbetter": Contender(
        "ShorterBetter",
        "shorterbetter",
        {"beta": 0.02},
        {**_PLAIN, "reward_weights": [2.0, 1.0]},  # published: right counts 2
        knob="beta",
        sweep=(0.005, 0.02, 0.05),
    ),
    "alp": Contender("ALP", "alp", {"beta": 0.001}, _PLAIN, knob="beta", sweep=(0.0003, 0.001, 0.003)),
    "laser": Contender(
        "LASER",
        "laser",
        {"target": 32},
        {**_PLAIN, "reward_weights": [1.5, 1.0]},  # published: right 1, wrong -0.5
        knob="target",
        sweep=(48, 32, 24),
    ),
    "laser-d": Contender(
        "LASER-D",
        "laser-d",
        {"shortest": 16, "longest": 96, "spacing": 8, "update_every": 10, "group_size": 8},
        {**_PLAIN, "reward_weights": [1.5, 1.0]},
        knob="shortest",
        sweep=(32, 24, 16),
    ),
    # the prompt cannot ask this policy for a length, so one target stands for all prompts
    "l1-max": Contender("L1-Max", "l1-max", {"alpha": 0.02, "target": 32}, _PLAIN, knob="target", sweep=(48, 32, 24)),
    "thinkprune": Contender(
        "ThinkPrune",
        "thinkprune",
        {"limit": {0: 64, 40: 48, 80: 32}},
        _PLAIN,
        knob="limit",
        sweep=({0: 64, 40: 56, 80: 48}, {0: 64, 40: 48, 80: 32}, {0: 48, 40: 32, 80: 24}),
    ),
    "dapo-overlong": Contender(
        "DAPO overlong",
        "dapo-overlong",
        {"max_completion_len": 64, "soft_punish_cache": 32},
        _PLAIN,
        knob="soft_punish_cache",
        sweep=(16, 32, 48),
    ),
}
"""Every method that a comparison knows, by its name on the command line."""


@dataclass(frozen=True)
class Entry:
    """A method with its knob at one value: what a comparison trains once for each seed."""

    method: str
    value: Knob

    @property
    def contender(self) -> Contender:
        return CONTENDERS[self.method]

    @property
    def value_text(self) -> str:
        """The knob's value in file names and tables: "1.0", "64-48-32", "" without a knob."""
        return knob_text(self.value)

    @property
    def name(self) -> str:
        """As it is written on the command line, but for schedules."""
        return self.method if self.value is None else f"{self.method}={self.value_text}"


def knob_text(value: Knob) -> str:
    if value is None:
        return ""
    return "-".join(map(str, value.values())) if isinstance(value, Mapping) else str(value)


def find_contender(name: str) -> tuple[str, Contender]:
    """The contender of a name, in which case and underscores do not matter.

    Raises:
        ValueError: there is none.
    """
    key = name.lower().replace("_", "-")
    if key not in CONTENDERS:
        close = difflib.get_close_matches(key, CONTENDERS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"There is no method {name!r}{hint}: choose among {', '.join(CONTENDERS)}.")
    return key, CONTENDERS[key]


def read_entries(words: list[str], sweep: bool = False) -> list[Entry]:
    """Entries from a command line: ``lenvm dler=40,48 hapo``.

    Args:
        words: a method at its recommended setting, or with values of its knob after "=".
        sweep: every method without values of its own takes all of its sweep.

    Raises:
        ValueError: an unknown method, or a value that its reward refuses.
    """
    entries: dict[str, Entry] = {}
    for word in words:
        name, _, values = word.partition("=")
        key, contender = find_contender(name)
        if values:
            chosen: list[Knob] = [read_value(text) for text in values.split(",")]
        else:
            chosen = list(contender.sweep) if sweep else [contender.recommended]
        for value in chosen:
            entry = Entry(key, _as_recommended(value, contender.recommended))
            settings, _ = contender.turned(entry.value)
            if contender.reward is not None:
                build_length_reward(contender.reward, settings, correctness=None, eos_token_ids=None)
            entries[entry.name] = entry
    return list(entries.values())


def _as_recommended(value: Knob, recommended: Knob) -> Knob:
    """1 and 1.0 are one setting and must have one name."""
    return float(value) if isinstance(recommended, float) and isinstance(value, int) else value


def read_value(text: str) -> Any:
    """A setting from a command line: JSON or YAML, ``48``, ``1e-3``, ``{limit: 48}`` or ``{0: 64, 40: 48}``."""
    try:
        return json.loads(text)
    except ValueError:
        return yaml.safe_load(text)


def build_length_reward(name: str, settings: Mapping[str, Any], *, correctness: Any, eos_token_ids: Any) -> Any:
    """A published length reward that judges as the task does and knows the policy's end tokens.

    Args:
        name: of `reward_fns.METHODS`.
        settings: of its constructor; what is left out takes the published value.
        correctness: reward function that says what is correct; None leaves the reward's default.
        eos_token_ids: the policy's end tokens.

    Raises:
        ValueError: an unknown name or setting, or a value outside its range.
    """
    known = inspect.signature(METHODS[name].build).parameters if name in METHODS else {}
    given: dict[str, Any] = {}
    if correctness is not None and "correctness" in known:
        given["correctness"] = correctness
    if "eos_token_ids" in known and "eos_token_ids" not in METHODS[name].published:
        given["eos_token_ids"] = eos_token_ids
    return length_reward(name, **given, **settings)


def trainer_flags(trainer: Mapping[str, Any]) -> list[str]:
    """Fields of the trainer's configuration as flags of a recipe."""
    flags: list[str] = []
    for key, value in trainer.items():
        flags += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return flags
