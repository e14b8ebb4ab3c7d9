"""The layout in which the authors of LenVM publish their models, read into one dictionary of tensors.

1. An ordinary Hugging Face causal LM (`model.safetensors` or shards) and, beside it, `value_head.safetensors` (or the
   older `value_head.bin`) with `v_head.{fc,summary}.{weight,bias}`. The head may also sit in the main weights.
2. Keys may carry the training wrapper's `pretrained_model.` prefix, or the stray `retrained_model.`.
3. Their trainer drops duplicate tensors by name: of tied embeddings only `lm_head.weight` is left.
4. The vocabulary head is thrown away. Vision-language models and one-layer heads are refused.
"""

import json
import os
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PretrainedConfig
from transformers.utils.hub import cached_file

__all__ = ["HEAD_KEYS", "find_file", "read_official_checkpoint"]

HEAD_KEYS = ("v_head.fc.weight", "v_head.fc.bias", "v_head.summary.weight", "v_head.summary.bias")


def read_official_checkpoint(
    name_or_path: str | os.PathLike[str], backbone_config: PretrainedConfig, **hub_options: Any
) -> dict[str, Tensor]:
    """Tensors of an official LenVM checkpoint under the keys of `LengthValueModel`.

    Args:
        name_or_path: folder or hub name.
        backbone_config: what its config.json says; only `tie_word_embeddings` is read.
        hub_options: revision, token, cache_dir, ... as in `from_pretrained`.

    Returns:
        `model.*` and the four `v_head.*` tensors, on the CPU, in their stored dtypes.

    Raises:
        ValueError: no weights, a vision tower, or a head that is missing or incomplete.
    """
    tensors = _strip_wrapper(_read_main_weights(name_or_path, hub_options))
    if any(key.startswith(("visual.", "model.visual.", "vision_tower.")) for key in tensors):
        raise ValueError(
            f"{str(name_or_path)!r} holds a vision tower (visual.*): vision-language critics are not supported. "
            "Use a text-only LenVM."
        )
    tensors |= _strip_wrapper(_read_separate_head(name_or_path, hub_options))
    _check_head(tensors, name_or_path)

    lm_head = tensors.pop("lm_head.weight", None)
    has_embedding = any(key.endswith("embed_tokens.weight") for key in tensors)
    if lm_head is not None and not has_embedding and backbone_config.tie_word_embeddings:
        tensors["model.embed_tokens.weight"] = lm_head
    return tensors


def find_file(name_or_path: str | os.PathLike[str], filename: str, hub_options: dict[str, Any]) -> str | None:
    """Local path of one file of a folder or hub repository (downloaded where needed), None if it has no such file."""
    return cached_file(name_or_path, filename, _raise_exceptions_for_missing_entries=False, **hub_options)


def _read_main_weights(name_or_path: str | os.PathLike[str], hub_options: dict[str, Any]) -> dict[str, Tensor]:
    single = find_file(name_or_path, "model.safetensors", hub_options)
    if single is not None:
        return load_file(single)
    index = find_file(name_or_path, "model.safetensors.index.json", hub_options)
    if index is None:
        raise ValueError(
            f"{str(name_or_path)!r} has neither model.safetensors nor model.safetensors.index.json. Weights of a LenVM "
            "are read from safetensors files only: convert others with transformers' save_pretrained."
        )
    tensors: dict[str, Tensor] = {}
    with open(index, encoding="utf-8") as file:
        shards = sorted(set(json.load(file)["weight_map"].values()))
    for shard in shards:
        path = find_file(name_or_path, shard, hub_options)
        if path is None:
            raise ValueError(f"{str(name_or_path)!r} lacks {shard}, which its index names: copy or download it again.")
        tensors |= load_file(path)
    return tensors


def _read_separate_head(name_or_path: str | os.PathLike[str], hub_options: dict[str, Any]) -> dict[str, Tensor]:
    path = find_file(name_or_path, "value_head.safetensors", hub_options)
    if path is not None:
        return load_file(path)
    path = find_file(name_or_path, "value_head.bin", hub_options)
    if path is not None:
        # weights_only: a pickle from the hub must not run code here
        return torch.load(path, map_location="cpu", weights_only=True)
    return {}


def _strip_wrapper(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("pretrained_model.").removeprefix("retrained_model."): t for key, t in tensors.items()}


def _check_head(tensors: dict[str, Tensor], name_or_path: str | os.PathLike[str]) -> None:
    present = {key for key in tensors if key.startswith("v_head.")}
    missing = [key for key in HEAD_KEYS if key not in present]
    if not missing:
        return
    name = str(name_or_path)
    if not present:
        raise ValueError(
            f"{name!r} has no value head (neither v_head.* in its weights nor value_head.safetensors): it is a plain "
            f"language model. Train a LenVM from it with recipes/pretrain_lenvm.py --lenvm {name}, or start one in "
            "Python with LengthValueModel.from_backbone."
        )
    if not any(key.startswith("v_head.fc.") for key in present):
        raise ValueError(
            f"{name!r} has a one-layer value head (v_head.summary only), the layout of TRL's value-head models. "
            "A LenVM has two layers, v_head.fc and v_head.summary: pretrain one with recipes/pretrain_lenvm.py."
        )
    raise ValueError(
        f"{name!r} lacks {', '.join(missing)}: the value head was not saved completely, and its values would come from "
        "random weights. Copy value_head.safetensors into the folder again."
    )
