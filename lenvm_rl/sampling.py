"""Sampling completions with transformers' ``generate``: one function for rollouts, evaluation and nested sampling."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lenvm_rl.eval_mode import eval_mode

Prompt = str | list[dict[str, Any]]
"""Text, or a conversation in the chat format."""


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's random state starts at the seed inside, and is what it was afterwards."""
    # only the device in use: by default every visible one is touched
    devices = {"devices": []} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
    with torch.random.fork_rng(**devices):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True)
class SamplingSettings:
    """How completions are drawn. What a critic is pretrained on and what RL rolls out must agree.

    Raises:
        ValueError: a setting outside its range.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}: rollouts are sampled.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}.")


@dataclass(frozen=True)
class Completion:
    """The tokens that a model generated after a prompt."""

    ids: list[int]
    """The end token included, where the model emitted one."""
    finished: bool
    """The last token is an end token; otherwise the completion was cut at the token limit."""

    @property
    def finish_reason(self) -> Literal["stop", "length"]:
        """Why it ended, in the words of OpenAI-compatible servers."""
        return "stop" if self.finished else "length"


def prompt_token_ids(tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of plain or conversational prompts, as TRL's trainers tokenise them."""
    return [
        tokenizer(prompt).input_ids
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)[
            "input_ids"
        ]
        for prompt in prompts
    ]


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a completion: the model's own (end of turn among them) and the tokenizer's.

    Raises:
        ValueError: there is none.
    """
    ends = declared_end_ids(model)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends = [tokenizer.eos_token_id, *ends]
    if not ends:
        raise ValueError(
            "Neither the model's generation_config nor the tokenizer names an end token, so no completion could ever "
            "finish: set tokenizer.eos_token."
        )
    return ends


def declared_end_ids(model: Any) -> list[int]:
    """Ids that end a completion, as the model's generation settings have them."""
    declared = model.generation_config.eos_token_id
    return [] if declared is None else [declared] if isinstance(declared, int) else list(declared)


@torch.no_grad()
def sample_completions(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[list[int]],
    settings: SamplingSettings,
    *,
    batch_size: int = 256,
    on_batch: Callable[[int, int], None] = lambda completions, tokens: None,
) -> list[Completion]:
    """One completion for each prompt, in the order of the prompts.

    Args:
        model: any causal language model; its training mode is restored.
        tokenizer: gives the padding token; the end token stands in for a missing one.
        prompt_ids: token ids of each prompt, unpadded. Repeat a prompt to sample it several times.
        settings: how to sample. The random state is torch's own: seed it for a repeatable result.
        batch_size: prompts of one ``generate`` call.
        on_batch: called after each batch with the completions and tokens it made, for progress.

    Raises:
        ValueError: an empty prompt, or no end token.
    """
    ends = end_token_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    generation = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=True,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=0,
        # explicit, as in TRL: a model's own default would bend the distribution unseen
        repetition_penalty=1.0,
        pad_token_id=pad,
        eos_token_id=ends,
    )

    def generate(input_ids: Tensor, mask: Tensor, rows: slice) -> Tensor:
        generated: Tensor = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=generation)
        return generated

    return complete_in_batches(model, prompt_ids, generate, ends, pad, batch_size=batch_size, on_batch=on_batch)


def complete_in_batches(
    model: Any,
    prompt_ids: Sequence[list[int]],
    generate: Callable[[Tensor, Tensor, slice], Tensor],
    ends: list[int],
    pad_token_id: int,
    *,
    batch_size: int,
    on_batch: Callable[[int, int], None],
) -> list[Completion]:
    """One completion for each prompt, in the order of the prompts.

    Args:
        model: its training mode is restored.
        prompt_ids: token ids of each prompt, unpadded.
        generate: given ids and mask of some prompts, padded on the left, and which ones they are, returns prompt and
            completion of each.
        ends: ids that end a completion.
        pad_token_id: fills the rows.
        batch_size: prompts of one call.
        on_batch: called after each batch with the completions and tokens it made.

    Raises:
        ValueError: an empty prompt.
    """
    for row, ids in enumerate(prompt_ids):
        if not ids:
            raise ValueError(f"prompt {row} has no tokens: there is nothing to complete.")
    completions: list[Completion] = []
    with eval_mode(model):
        for start in range(0, len(prompt_ids), batch_size):
            rows = slice(start, start + batch_size)
            input_ids, mask = left_padded(prompt_ids[rows], pad_token_id, model.device)
            generated = generate(input_ids, mask, rows)
            batch = [until_end(row, ends) for row in generated[:, input_ids.size(1) :].tolist()]
            completions += batch
            on_batch(len(batch), sum(len(completion.ids) for completion in batch))
    return completions


def left_padded(rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (B, P) that end together on the right, and their mask."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_token_id] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def sample_texts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: SamplingSettings,
    *,
    seed: int = 0,
) -> list[str]:
    """One completion of each prompt as text, for people to read; torch's random state is left as it was."""
    with seeded(seed, model.device):
        completions = sample_completions(model, tokenizer, prompt_token_ids(tokenizer, prompts), settings)
    return tokenizer.batch_decode([completion.ids for completion in completions], skip_special_tokens=True)


def until_end(ids: list[int], ends: list[int]) -> Completion:
    """The completion in what `generate` returned after a prompt, padding behind its end token left out."""
    for position, token in enumerate(ids):
        if token in ends:
            return Completion(ids[: position + 1], finished=True)
    return Completion(ids, finished=False)
