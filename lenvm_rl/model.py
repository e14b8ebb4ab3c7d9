"""The Length Value Model: a decoder that says, at every token, how much is left to generate (LenVM section 3).

1. A transformers decoder WITHOUT its vocabulary head, and two layers on the last hidden state after the final norm:
   z = Linear(H, 1)(silu(Linear(H, H)(h))), V = -sigmoid(z). Vocabulary logits are never computed.
2. The head runs in float32 under any weight dtype and any autocast: towards the end of a completion z is near -5, where
   bfloat16 moves in steps of 0.03, each of which is 3 % of the remaining length.
3. gamma and the origin of the training data (generator, sampling, tokenizer) travel with the weights: a value means
   nothing without them.
4. Parameter names are those of the official checkpoints (`model.*`, `v_head.fc.*`, `v_head.summary.*`), which are read
   with an explicit gamma; a plain causal LM loads into `model` by transformers' own rules, ZeRO-3 included.
5. Left out: vision-language critics, encoder-decoders, heads that predict a distribution.
"""

import copy
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput

from lenvm_rl.length import check_gamma
from lenvm_rl.official_checkpoint import HEAD_KEYS, find_file, read_official_checkpoint
from lenvm_rl.tokenizer_fingerprint import tokenizer_fingerprint, vocabulary_fingerprint

__all__ = ["LengthValueConfig", "LengthValueHead", "LengthValueModel", "LengthValueOutput"]

_PROVENANCE = ("generator", "temperature", "top_p", "max_tokens", "tokenizer_fingerprint", "tokenizer_size")
_HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")


class LengthValueConfig(PretrainedConfig):
    """What a LenVM is and what its values mean."""

    model_type = "length_value_model"
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012 (transformers' own declaration)

    # Declared, because transformers refuses to save undeclared `temperature` and `top_p` (they look like settings of
    # generate()); set in __init__, because only so does a nested config survive a reload.
    backbone_config: PretrainedConfig | None = None
    """Configuration of the decoder under the head, as a dict or an object."""

    gamma: float | None = None
    """Length discount the values were trained with, in (0, 1). Required to build a model."""

    generator: str | None = None
    """Name of the model whose completions the critic was trained on."""

    temperature: float | None = None
    """Sampling temperature of those completions."""

    top_p: float | None = None
    """Nucleus mass of those completions."""

    max_tokens: int | None = None
    """Token limit of those completions: predictions beyond it are extrapolated."""

    tokenizer_fingerprint: str | None = None
    """What lenvm_rl.tokenizer_fingerprint says of the generator's tokenizer."""

    tokenizer_size: int | None = None
    """Number of tokens of the generator's tokenizer, added ones included."""

    def __init__(
        self,
        backbone_config: PretrainedConfig | dict[str, Any] | None = None,
        gamma: float | None = None,
        generator: str | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        max_tokens: int | None = None,
        tokenizer_fingerprint: str | None = None,
        tokenizer_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(backbone_config, dict):
            backbone_config = AutoConfig.for_model(**backbone_config)
        if backbone_config is not None:
            _check_backbone(backbone_config)
            if kwargs.get("dtype") is None:
                kwargs["dtype"] = backbone_config.dtype
            # the base class hands its choice of attention down, and would reset the backbone's
            kwargs.setdefault("attn_implementation", backbone_config._attn_implementation)
        self.backbone_config = backbone_config
        self.gamma = gamma if gamma is None else check_gamma(gamma)
        self.generator = generator
        self.temperature = temperature
        self.top_p = top_p
        self.max_tokens = max_tokens
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.tokenizer_size = tokenizer_size
        super().__init__(**kwargs)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PretrainedConfig:
        """The backbone's configuration, where transformers looks for layer counts and sizes."""
        return self if self.backbone_config is None else self.backbone_config

    @property
    def hidden_size(self) -> int:
        """Width of the backbone (0 without one); TRL's prepare_deepspeed sizes its buckets by it (1.16)."""
        return 0 if self.backbone_config is None else self.backbone_config.hidden_size

    @property
    def vocab_size(self) -> int:
        """Number of token embeddings of the backbone (0 without one)."""
        return 0 if self.backbone_config is None else self.backbone_config.vocab_size


@dataclass
class LengthValueOutput(ModelOutput):
    """What the critic says of each state."""

    logits: Tensor | None = None
    """(B, T) float32: z of the state after each input token; V = -sigmoid(z)."""

    past_key_values: Cache | None = None
    """The cache, where `use_cache` was asked for."""


class LengthValueHead(nn.Module):
    """Linear(H, H) -> SiLU -> Linear(H, 1), in float32 whatever the weights are stored in."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.fc = Float32Linear(hidden_size, hidden_size)
        self.summary = Float32Linear(hidden_size, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.summary(F.silu(self.fc(hidden))).squeeze(-1)


class LengthValueModel(PreTrainedModel):
    """A decoder with a length-value head.

    A fresh head has a random first layer and a zero second one: it says z = 0 everywhere, V = -1/2, which is the
    remaining length ln(2) / -ln(gamma), 15 % of the horizon that gamma stands for, and whose gradient is largest.
    """

    config_class = LengthValueConfig
    config: LengthValueConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # what the backbone cannot do, it refuses itself when it is built
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.", r"\.rotary_emb\.inv_freq$"]  # noqa: RUF012

    def __init__(self, config: LengthValueConfig) -> None:
        super().__init__(config)
        check_gamma(config.gamma, name="LengthValueConfig.gamma")
        if config.backbone_config is None:
            raise ValueError(
                "LengthValueConfig.backbone_config is not set: give it the configuration of a decoder, or start from "
                "one with LengthValueModel.from_backbone(name_or_path, gamma=...)."
            )
        self.model = AutoModel.from_config(config.backbone_config)
        self._no_split_modules = list(self.model._no_split_modules or [])
        self.v_head = LengthValueHead(config.backbone_config.hidden_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
    ) -> LengthValueOutput:
        """Head outputs for every token.

        Args:
            input_ids: (B, T) token ids of prompt and completion, padded on either side.
            attention_mask: (B, T), 1 at tokens and 0 at padding; (B, past + T) with a cache.
            position_ids: (B, T); by default counted from the first token of the mask, so that padding changes nothing.
            past_key_values: cache of the tokens before.
            use_cache: return the cache, for incremental decoding.

        Returns:
            `logits` (B, T) float32; column t is the state AFTER input token t. Padding columns hold no meaning.
        """
        if position_ids is None and attention_mask is not None and input_ids is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_dict=True,
        )
        return LengthValueOutput(
            logits=self.v_head(output.last_hidden_state),
            past_key_values=output.past_key_values if use_cache else None,
        )

    def values(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """V = -sigmoid(z) of the state after each input token, (B, T) float32 in (-1, 0)."""
        return -torch.sigmoid(self(input_ids, attention_mask, position_ids).logits)

    @classmethod
    def from_backbone(
        cls,
        backbone: str | os.PathLike[str] | PreTrainedModel,
        gamma: float,
        *,
        tokenizer: Any = None,
        generator: str | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        max_tokens: int | None = None,
        **kwargs: Any,
    ) -> "LengthValueModel":
        """A LenVM with a decoder's weights and a fresh head, drawn from torch's generator.

        Args:
            backbone: path or hub name of any text decoder, or a model in memory, with or without a vocabulary head;
                a model in memory is copied.
            gamma: length discount, in (0, 1); see `lenvm_rl.length.gamma_from_horizon`.
            tokenizer: the generator's tokenizer, remembered by size and fingerprint.
            generator: name of the model that sampled the training completions.
            temperature, top_p, max_tokens: how it sampled them.
            kwargs: options of `from_pretrained`, such as dtype, attn_implementation or revision.

        Raises:
            ValueError: bad gamma, a backbone that is no text decoder, or a tokenizer with ids beyond its embeddings.
            OSError: no such model.
        """
        if isinstance(backbone, PreTrainedModel):
            name = backbone.name_or_path or type(backbone).__name__
            backbone_config = copy.deepcopy(_decoder_of(backbone).config)
        elif isinstance(backbone, (str, os.PathLike)):
            name = str(backbone)
            backbone_config = _read_backbone_config(name, kwargs)
        else:
            raise ValueError(
                f"from_backbone takes a path or a transformers model, got {type(backbone).__name__}: unwrap it first "
                "(accelerator.unwrap_model), and merge adapters into the weights (merge_and_unload)."
            )
        if isinstance(backbone_config, LengthValueConfig):
            raise ValueError(f"{name!r} is a LenVM already: load it with LengthValueModel.from_pretrained.")
        config = LengthValueConfig(
            backbone_config=backbone_config,
            gamma=check_gamma(gamma),
            generator=generator,
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_tokens,
        )
        if tokenizer is not None:
            _remember_tokenizer(config, tokenizer, name)

        if isinstance(backbone, PreTrainedModel):
            return cls._from_memory(backbone, config, **kwargs)
        decoder_class: Any = AutoModel._model_mapping[type(backbone_config)]
        if decoder_class.base_model_prefix != cls.base_model_prefix:
            # GPT-2, Pythia and others name their decoder otherwise: let transformers read them into it first
            return cls._from_memory(AutoModel.from_pretrained(name, **kwargs), config)
        return cls._load(name, name, fresh_head=True, config=config, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        gamma: float | None = None,
        **kwargs: Any,
    ) -> "LengthValueModel":
        """A trained LenVM, in this project's format or in that of the authors.

        Args:
            pretrained_model_name_or_path: folder or hub name.
            gamma: required for official checkpoints, which do not store it. For our own it may be left out; given, it
                must agree with the stored one, up to a thousandth of the horizon, and the stored one is used.
            kwargs: options of transformers' from_pretrained (dtype, attn_implementation, device_map, revision, ...);
                for an official checkpoint also generator, temperature, top_p and max_tokens, if they are known.

        Raises:
            ValueError: gamma missing or contradicted, or a checkpoint that is not a complete LenVM.
            OSError: no such folder or hub model.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *model_args, **kwargs)
        name = str(pretrained_model_name_or_path)
        if gamma is not None:
            gamma = check_gamma(gamma)
        stored = _read_config_dict(name, kwargs)
        if stored.get("model_type") != LengthValueConfig.model_type:
            return cls._from_official(name, gamma, **kwargs)

        if gamma is not None:
            stored_gamma = stored.get("gamma")
            if stored_gamma is None:
                kwargs["gamma"] = gamma
            elif not math.isclose(math.log(gamma), math.log(stored_gamma), rel_tol=1e-3):
                raise ValueError(
                    f"gamma={gamma} was asked for, but {name!r} was trained with gamma={stored_gamma}, and its values "
                    "mean nothing under another discount. Leave gamma out to use the stored one, or pretrain a LenVM "
                    f"with recipes/pretrain_lenvm.py --length_gamma {gamma}."
                )
        return cls._load(name, name, *model_args, **kwargs)

    @classmethod
    def _from_official(cls, name: str, gamma: float | None, **kwargs: Any) -> Any:
        hub_options = {key: kwargs.pop(key) for key in _HUB_OPTIONS if key in kwargs}
        provenance = {key: kwargs.pop(key) for key in _PROVENANCE if key in kwargs}
        config = LengthValueConfig(backbone_config=_read_backbone_config(name, hub_options), **provenance)
        tensors = read_official_checkpoint(name, config.get_text_config(), **hub_options)
        if gamma is None:
            raise ValueError(
                f"{name!r} is an official LenVM checkpoint, which does not store its discount. Say which one it was "
                "trained with: gamma=0.997 for the published Qwen2.5 models (length_gamma in a trainer's config)."
            )
        config.gamma = gamma
        if config.tokenizer_fingerprint is None and find_file(name, "tokenizer_config.json", hub_options) is not None:
            tokenizer = AutoTokenizer.from_pretrained(name, **hub_options)
            config.tokenizer_fingerprint = vocabulary_fingerprint(tokenizer)
            config.tokenizer_size = len(tokenizer)
        return cls._load(name, None, config=config, state_dict=tensors, **kwargs)

    @classmethod
    def _from_memory(cls, backbone: PreTrainedModel, config: LengthValueConfig, **kwargs: Any) -> "LengthValueModel":
        decoder = _decoder_of(backbone)
        if any(hasattr(parameter, "ds_id") for parameter in decoder.parameters()):
            raise ValueError(
                "the backbone is partitioned by DeepSpeed ZeRO-3, so its weights are not all here: pass its path to "
                "LengthValueModel.from_backbone instead."
            )
        tensors = {f"{cls.base_model_prefix}.{key}": t.detach().clone() for key, t in decoder.state_dict().items()}
        kwargs.setdefault("dtype", decoder.dtype)
        model = cls._load(
            backbone.name_or_path or "", None, fresh_head=True, config=config, state_dict=tensors, **kwargs
        )
        return model if "device_map" in kwargs else model.to(decoder.device)

    @classmethod
    def _load(cls, name: str, source: str | None, *model_args: Any, fresh_head: bool = False, **kwargs: Any) -> Any:
        """transformers' own loading, refusing a checkpoint that would leave tensors random."""
        wants_report = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(source, *model_args, **kwargs, output_loading_info=True)
        model, report = loaded
        missing = set(report["missing_keys"]) - (set(HEAD_KEYS) if fresh_head else set())
        if missing:
            shown = ", ".join(sorted(missing)[:4]) + (", ..." if len(missing) > 4 else "")
            raise ValueError(
                f"{name!r} lacks {len(missing)} of the model's tensors ({shown}), which would be random: the "
                "checkpoint is incomplete, or of another architecture than its config.json says."
            )
        model.name_or_path = model.config.name_or_path = name
        return (model, report) if wants_report else model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.v_head.summary:
            nn.init.zeros_(module.weight)  # leaves a loaded tensor alone: transformers guards the initialisers


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 whatever the dtype of its weights and its input, under any autocast."""

    # a module of its own, not F.linear on another's parameters: ZeRO-3 and FSDP gather weights around forward()
    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(device_type=input.device.type, enabled=False):
            return F.linear(input.float(), self.weight.float(), self.bias.float())


def _check_backbone(config: PretrainedConfig) -> None:
    if getattr(config, "vision_config", None) is not None:
        raise ValueError(
            f"a {config.model_type!r} backbone has a vision tower, and vision-language critics are not supported: use "
            "the text-only model of the family."
        )
    if config.is_encoder_decoder:
        raise ValueError(
            f"a {config.model_type!r} backbone is an encoder-decoder: a LenVM reads prompt and completion as one "
            "sequence. Use a decoder-only model."
        )


def _decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    decoder = model.base_model
    return decoder if isinstance(decoder, PreTrainedModel) else model


def _remember_tokenizer(config: LengthValueConfig, tokenizer: Any, backbone_name: str) -> None:
    largest_id = max(tokenizer.get_vocab().values())
    if largest_id >= config.vocab_size:
        raise ValueError(
            f"the generator's tokenizer uses token ids up to {largest_id:,}, but the backbone {backbone_name!r} has "
            f"embeddings for {config.vocab_size:,} tokens only: start the LenVM from a model of the generator's family."
        )
    config.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)
    config.tokenizer_size = len(tokenizer)


def _read_config_dict(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    hub_options = {key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs}
    try:
        config = PretrainedConfig.get_config_dict(name, **hub_options)[0]
    except OSError as error:
        if os.path.isdir(name):
            raise
        raise OSError(
            f"{name!r} is no folder on this machine, and no model of this name could be found on the Hugging Face Hub."
        ) from error
    if not config:
        raise OSError(f"the folder {name!r} has no config.json, so it holds no model.")
    return config


def _read_backbone_config(name: str, kwargs: dict[str, Any]) -> PretrainedConfig:
    _read_config_dict(name, kwargs)  # for its message
    hub_options = {key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs}
    return AutoConfig.from_pretrained(name, **hub_options)


AutoConfig.register(LengthValueConfig.model_type, LengthValueConfig, exist_ok=True)
AutoModel.register(LengthValueConfig, LengthValueModel, exist_ok=True)
