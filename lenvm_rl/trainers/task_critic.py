"""The task critic of PPO: what a state is worth in task reward, learned during the run.

1. A model of its own is a token classifier of transformers with one label: the policy's decoder and a linear layer. It
   starts from the policy's weights with a layer of zeros, from a saved critic, from a reward model, or from another
   language model of the same tokenizer; it is saved as what it is.
2. A head on the policy reads the policy's hidden states and costs no second model. No gradient reaches the policy
   unless a weight for it is given.
3. Values are float32 under any weight dtype and any autocast, and not bounded: rewards may be anything.
4. It learns beside the policy, with an optimizer of its own (`side_model.py`), and has no dropout: the same state has
   the same value when it is judged and when it is learned from.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer, PreTrainedModel

from lenvm_rl.critic import before_tokens, outputs_of, without_padding
from lenvm_rl.model import Float32Linear
from lenvm_rl.official_checkpoint import find_file
from lenvm_rl.tokenizer_fingerprint import tokenizer_fingerprint
from lenvm_rl.trainers.critic_placement import is_partitioned
from lenvm_rl.trainers.hidden_states import HiddenStates, states_before_tokens, with_fixed_head
from lenvm_rl.trainers.side_model import SideModel

Batch = dict[str, Any]
"""`prompt_ids`, `prompt_mask` (B, P) padded on the left; `completion_ids`, `completion_mask` (B, T) on the right."""

HEADS = ("score", "classifier")
"""What transformers calls the last layer of its token classifiers (5.23)."""


class TaskCritic(Protocol):
    """Values of the states before each completion token."""

    side: SideModel

    def score(self, batch: Batch) -> Tensor:
        """(B, T) float32 values of rollouts, without gradient. Collective."""

    def values(self, batch: Batch) -> Tensor:
        """(B, T) float32 values of a micro-batch, with gradient to what is trained. One forward at most."""


class SeparateTaskCritic:
    """A token classifier beside the policy.

    Args:
        side: the model with its optimizer.
        token_budget: tokens of one forward while scoring, padding included.
    """

    def __init__(self, side: SideModel, token_budget: int) -> None:
        self.side, self.token_budget = side, token_budget

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor:
        ids, prompts, completions = _without_padding(batch)
        lengths = prompts + completions
        outputs = outputs_of(self._forward, ids, lengths, self.side.accelerator, self.token_budget)
        return before_tokens(outputs, prompts, batch["completion_ids"].size(1))

    def values(self, batch: Batch) -> Tensor:
        ids, prompts, completions = _without_padding(batch)
        ids = ids[:, : int((prompts + completions).max())]
        outputs = self._forward(input_ids=ids).logits.view(ids.shape).float()
        return before_tokens(outputs, prompts, batch["completion_ids"].size(1))

    def _forward(self, input_ids: Tensor) -> Any:
        return self.side(input_ids=input_ids, use_cache=False)


class SharedTaskCritic:
    """A value head on the policy's hidden states.

    Args:
        side: a `LengthValueHead` with its optimizer; its outputs are the values.
        hidden_states: of the policy.
    """

    def __init__(self, side: SideModel, hidden_states: HiddenStates) -> None:
        self.side, self.hidden_states = side, hidden_states
        self._seen: list[Tensor] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the policy's loss is computed, from whose states come `values` and `values_for_policy`."""
        with self.hidden_states.of_loss() as self._seen:
            yield

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor:
        values: Tensor = self.side(hidden=self.hidden_states.of(batch)[:, :-1])
        return values.float()

    def values(self, batch: Batch) -> Tensor:
        """After `watching`: with gradient to the head alone."""
        values: Tensor = self.side(hidden=states_before_tokens(self._seen[-1], batch["completion_ids"]).detach())
        return values.float()

    def values_for_policy(self, batch: Batch) -> Tensor:
        """After `watching`: with gradient to the policy alone."""
        hidden = states_before_tokens(self._seen[-1], batch["completion_ids"])
        return with_fixed_head(self.side.model, hidden).float()

    def forget(self) -> None:
        """Let go of the hidden states, and of the graph that they hold."""
        self._seen = []


def _without_padding(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return without_padding(batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], batch["completion_mask"])


# Where a critic comes from


def critic_from_policy(policy: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """A token classifier with the policy's decoder and a layer of zeros.

    Args:
        policy: whole, and without adapters or quantised weights: its weights are copied. Others are loaded once more,
            from where they came.
        options: of `from_pretrained`, where the policy is loaded again.

    Raises:
        ValueError: an architecture without a token classifier, or a policy that cannot be copied and came from nowhere.
    """
    source = policy.config._name_or_path
    adapted = hasattr(policy, "peft_config") or getattr(policy, "is_quantized", False)
    if adapted or is_partitioned(policy):
        if not source:
            raise ValueError(
                "The task critic cannot be copied from this policy, whose weights are adapted, quantised or in parts, "
                "and which was not loaded from a path: name one in value_model."
            )
        return load_critic(source, **options)
    config = type(policy.config).from_dict(policy.config.to_dict())
    _prepare(config)
    critic = _classifier_class(config, source or type(policy).__name__).from_config(config, dtype=torch.float32)
    critic.base_model.load_state_dict(policy.base_model.state_dict())
    return _ready(critic, fresh=True)


def load_critic(path: str, *, tokenizer: Any = None, **options: Any) -> PreTrainedModel:
    """A token classifier from a saved critic, a reward model, or a language model, which gets a layer of zeros.

    Args:
        path: folder or hub name.
        tokenizer: the policy's; None checks nothing.
        options: of `from_pretrained`: attn_implementation, revision, trust_remote_code.

    Raises:
        ValueError: another tokenizer, several labels, an architecture without a token classifier, missing weights.
        OSError: no such model.
    """
    hub: dict[str, Any] = {name: options[name] for name in ("revision", "trust_remote_code") if name in options}
    config = AutoConfig.from_pretrained(path, **hub)
    labels = getattr(config, "num_labels", 1)
    if any("Classification" in name for name in config.architectures or ()) and labels != 1:
        raise ValueError(
            f"value_model {path!r} has {labels} labels, and a state has one value: name a critic, a reward model with "
            "one label, or a language model."
        )
    if tokenizer is not None:
        _check_tokenizer(path, config, tokenizer, hub)
    _prepare(config)
    model_class = _classifier_class(config, path)
    critic, report = model_class.from_pretrained(
        path, config=config, dtype=torch.float32, output_loading_info=True, **options
    )
    missing = {key for key in report["missing_keys"] if not key.startswith(HEADS)}
    if missing:
        raise ValueError(
            f"value_model {path!r} lacks {len(missing)} of its tensors ({', '.join(sorted(missing)[:3])}), which would "
            "be random: the folder is incomplete, or holds another architecture than its config.json says."
        )
    fresh = any(key.endswith("weight") for key in report["missing_keys"])
    return _ready(critic, fresh=fresh, bias=bool(report["missing_keys"]))


def taken_over(critic: PreTrainedModel, tokenizer: Any) -> PreTrainedModel:
    """A loaded token classifier as a task critic.

    Raises:
        ValueError: a model without a value for each token, or too few embeddings for the policy's tokenizer.
    """
    head: Any = next((getattr(critic, name) for name in HEADS if hasattr(critic, name)), None)
    if head is None or getattr(head, "out_features", 0) != 1:
        raise ValueError(
            f"value_model is a {type(critic).__name__}, which gives no single value for a token: load one with "
            "AutoModelForTokenClassification.from_pretrained(path, num_labels=1)."
        )
    largest, size = max(tokenizer.get_vocab().values()), critic.config.get_text_config().vocab_size
    if largest >= size:
        raise ValueError(
            f"value_model has {size:,} embeddings, but the policy uses token ids up to {largest:,}: a critic must have "
            "the policy's tokenizer."
        )
    return _ready(critic, fresh=False, bias=False)


def _prepare(config: Any) -> None:
    config.num_labels = 1
    config.classifier_dropout = 0.0
    config.use_cache = False
    config.architectures = None


def _classifier_class(config: Any, name: str) -> Any:
    if type(config) not in AutoModelForTokenClassification._model_mapping:
        raise ValueError(
            f"transformers has no token classifier of {name!r} (model type {config.model_type!r}), which a task critic "
            "is: name a critic of another architecture with the same tokenizer in value_model, or "
            "value_model='shared', a head on the policy."
        )
    return AutoModelForTokenClassification


def _check_tokenizer(path: str, config: Any, tokenizer: Any, hub: dict[str, Any]) -> None:
    own = None
    if find_file(path, "tokenizer_config.json", {k: v for k, v in hub.items() if k == "revision"}) is not None:
        own = AutoTokenizer.from_pretrained(path, **hub)
    largest = max(tokenizer.get_vocab().values())
    size = config.get_text_config().vocab_size
    if (own is not None and tokenizer_fingerprint(own) != tokenizer_fingerprint(tokenizer)) or largest >= size:
        tokens = f"{len(own):,} tokens" if own is not None else f"{size:,} embeddings"
        raise ValueError(
            f"value_model {path!r} has another tokenizer ({tokens}) than the policy ({len(tokenizer):,} tokens): its "
            "values would be those of other texts. Leave value_model out, to start from the policy, or name a critic "
            "of the policy's family."
        )


def _ready(critic: PreTrainedModel, *, fresh: bool, bias: bool = True) -> PreTrainedModel:
    """The critic without dropout and with a float32 head: zero where it is new."""
    for module in critic.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    head: Any = next(getattr(critic, name) for name in HEADS if hasattr(critic, name))
    head.__class__ = Float32Linear  # the same parameters under the same names, whatever holds or shards them
    new = [head.weight] if fresh else []
    if head.bias is not None and bias:
        new.append(head.bias)
    with torch.no_grad(), _gathered(new):
        for weight in new:
            weight.zero_()
    return critic


@contextmanager
def _gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
        yield


def save_critic(critic: TaskCritic, folder: str | Path, tokenizer: Any) -> bool:
    """Write a model of its own, with the policy's tokenizer; False for a head on the policy. Collective."""
    if not isinstance(critic, SeparateTaskCritic):
        return False
    critic.side.save_pretrained(folder)
    if critic.side.accelerator.is_main_process:
        tokenizer.save_pretrained(str(folder))
    return True
