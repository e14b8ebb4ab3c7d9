"""A generator by the name of its backend, as recipes and configs give it."""

import os
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from .interface import Generator
from .server import ServerGenerator
from .transformers_generate import TransformersGenerator
from .vllm_engine import VLLMGenerator


def create_generator(
    backend: str,
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str | None = None,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    server_url: str | None = None,
) -> Generator:
    """One of the three backends.

    Args:
        backend: ``transformers``, ``vllm`` or ``server``.
        model: folder or hub name of the policy.
        tokenizer: the policy's.
        name: how the policy is called, in the settings of a folder and by the server; ``model`` by default.
        batch_size: completions of one ``generate`` call of transformers; requests in flight with a server.
        device: where transformers samples, in float32.
        server_url: address of the server, whose key, if any, is in LENVM_SERVER_API_KEY.

    Raises:
        ValueError: no such backend, or a server without address.
    """
    if backend == "transformers":
        policy: Any = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
        return TransformersGenerator(policy.to(device), tokenizer, batch_size=batch_size, name=name or model)
    if backend == "vllm":
        return VLLMGenerator(model, name=name)
    if backend != "server":
        raise ValueError(f"There is no backend {backend!r}: take 'transformers', 'vllm' or 'server'.")
    if server_url is None:
        raise ValueError("The server backend needs the server's address: --server_url http://host:8000.")
    key = os.environ.get("LENVM_SERVER_API_KEY")
    return ServerGenerator(server_url, name or model, tokenizer, concurrency=batch_size, api_key=key)
