"""Rollouts in rows without padding: several in one row, each with positions of its own and blind to the others.

1. Transformers sees from restarted position ids that a row holds several documents: flash attention then takes its
   variable-length kernel (one row only, 5.23), the others a mask by document, which costs the whole square of a row. On
   a CPU, where small kernels are cheap, each document has an attention of its own instead.
2. A batch is still a set of rollouts: packing changes how fast its gradient is had, not which one it is.
3. `packing_layout` asks the backbone itself, by a forward of a few tokens, since a wrong answer would be silent.
4. The fallback sorts by length inside an optimizer step. Sorting further would make steps of one length, each of which
   pulls all values to that length.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from heapq import heapreplace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lenvm_rl.eval_mode import eval_mode
from lenvm_rl.pretraining.data import NO_TARGET, LengthValueCollator, state_labels

Layout = Literal["rows", "one row", "documents"]
"""Several rows with masks; one row, whose attention takes variable lengths; one row, under `attention_by_document`."""

BY_DOCUMENT = "lenvm_rl_by_document"
WIDE = 256
"""Hidden size from which attention by document is faster than masks (CPU: 96 is slower by 12 %, 576 faster by 7 %)."""


class PackingCollator(LengthValueCollator):
    """Packs a batch of rollouts, to ``input_ids``, ``position_ids`` and ``labels``, each (R, W).

    Args:
        pad_token_id: fills the rows.
        layout: several "rows", as `pack` finds best; otherwise all of the batch in one.
        attention_width: as in `pack`.
        official: as in `LengthValueCollator`.
    """

    def __init__(
        self, pad_token_id: int, layout: Layout, *, attention_width: float = math.inf, official: bool = False
    ) -> None:
        super().__init__(pad_token_id, official=official)
        self.layout, self.attention_width = layout, attention_width

    def __call__(self, rollouts: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        lengths = [len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rollouts]
        whole = [list(range(len(lengths)))]
        rows = pack(lengths, attention_width=self.attention_width) if self.layout == "rows" else whole
        width = max(sum(lengths[member] for member in row) for row in rows)
        shape = (len(rows), width)
        input_ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        labels = np.full(shape, NO_TARGET, dtype=np.int64)
        position_ids = np.zeros(shape, dtype=np.int64)
        for i, members in enumerate(rows):
            start = 0
            for member in members:
                rollout, end = rollouts[member], start + lengths[member]
                input_ids[i, start:end] = np.concatenate([rollout["prompt_ids"], rollout["completion_ids"]])
                labels[i, start:end] = state_labels(rollout, official=self.official)
                position_ids[i, start:end] = np.arange(end - start)
                start = end
            position_ids[i, start:] = np.arange(width - start)  # the padding is a document, too
        arrays = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def pack(lengths: Sequence[int], *, attention_width: float = math.inf) -> list[list[int]]:
    """Which rollouts share a row, so that the batch is computed soonest.

    Args:
        lengths: tokens of each rollout.
        attention_width: width of a row at which masked attention, which computes the whole square of a row, takes as
            long as everything else. Few wide rows have no padding, many narrow ones little attention.

    Returns:
        Members of each row. For each of some numbers of rows, the longest rollout left goes to the emptiest row; the
        number that costs least is taken.
    """
    order = sorted(range(len(lengths)), key=lambda member: -lengths[member])
    found: list[tuple[float, list[list[int]]]] = []
    for count in np.unique(np.linspace(1, len(lengths), 64).astype(int)).tolist():
        rows: list[list[int]] = [[] for _ in range(count)]
        filled = [(0, row) for row in range(count)]
        for member in order:
            tokens, row = filled[0]
            rows[row].append(member)
            heapreplace(filled, (tokens + lengths[member], row))
        width = max(filled)[0]
        found.append((count * width * (1 + width / attention_width), rows))
    return min(found, key=lambda option: option[0])[1]


def attention_width(backbone: PreTrainedModel) -> float:
    """Width of a row at which masked attention takes as long as the weights of this decoder; see `pack`."""
    config = backbone.config
    embeddings = sum(parameter.numel() for parameter in backbone.get_input_embeddings().parameters())
    weights = backbone.num_parameters() - embeddings
    # 2 operations for each weight and token; 4 for each hidden unit, layer and column of the row, which take twice as
    # long (measured on a CPU: softmax, mask, smaller matrices)
    return max(1.0, weights / (4 * config.num_hidden_layers * config.hidden_size))


@torch.no_grad()
def packing_layout(backbone: PreTrainedModel) -> Layout | None:
    """How this decoder takes several documents at once; None where they would see each other.

    A decoder that is partitioned by ZeRO-3 cannot be asked, and is judged by what transformers says of its family.
    """
    attention = str(backbone.config._attn_implementation)
    parameter = next(backbone.parameters())
    if "flash" in attention:
        return "one row" if _masks_by_transformers(backbone) else None
    if "flex" in attention or hasattr(parameter, "ds_id"):
        return "rows" if _masks_by_transformers(backbone) else None
    on_cpu = attention == "sdpa" and parameter.device.type == "cpu"
    if on_cpu and backbone.config.hidden_size >= WIDE and _attends_to_all(backbone.config):
        with attention_by_document(backbone):
            if _keeps_documents_apart(backbone):
                return "documents"
    return "rows" if _keeps_documents_apart(backbone) else None


@contextmanager
def attention_by_document(backbone: PreTrainedModel) -> Iterator[None]:
    """Inside, a batch of one row is attended to document by document, without a mask; forward and backward pass."""
    before = backbone.config._attn_implementation
    backbone.config._attn_implementation = BY_DOCUMENT
    try:
        yield
    finally:
        backbone.config._attn_implementation = before


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if position_ids is None or query.size(0) != 1 or attention_mask is not None:
        raise ValueError("Attention by document takes one row, with position ids and without a mask.")
    starts = [*(position_ids[0] == 0).nonzero().flatten().tolist(), query.size(2)]
    outputs = [
        sdpa_attention_forward(
            module, query[:, :, start:end], key[:, :, start:end], value[:, :, start:end], None, **kwargs
        )[0]
        for start, end in pairwise(starts)
    ]
    return torch.cat(outputs, 1), None


AttentionInterface.register(BY_DOCUMENT, _attention)


def _keeps_documents_apart(backbone: PreTrainedModel) -> bool:
    """Whether two documents in one row come out as each does alone."""
    first, second = [2, 3, 4, 5, 6], [5, 3, 2]
    device = next(backbone.parameters()).device
    positions = torch.tensor([[*range(5), *range(3)]], device=device)

    def hidden(ids: list[int], position_ids: Tensor) -> Tensor:
        row = torch.tensor([ids], device=device) % backbone.config.vocab_size
        return backbone(input_ids=row, position_ids=position_ids, use_cache=False).last_hidden_state[0].float()

    with eval_mode(backbone):
        packed = hidden(first + second, positions)
        alone = torch.cat([hidden(first, positions[:, :5]), hidden(second, positions[:, 5:])])
    tolerance = 1e-3 if backbone.dtype == torch.float32 else 5e-2
    return bool((packed - alone).norm() <= tolerance * alone.norm())


def _attends_to_all(config: Any) -> bool:
    """No window and no chunks, which a mask would have to draw, and too wide for a few tokens to show."""
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    limits = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return layers == {"full_attention"} and not any(limits)


def _masks_by_transformers(backbone: PreTrainedModel) -> bool:
    # 5.23: such models make their masks and kernels' arguments from position ids; a recurrent state would cross over
    return bool(backbone._supports_attention_backend) and not getattr(backbone, "_is_stateful", False)


class SimilarLengthsSampler(Sampler[int]):
    """All rollouts in a new random order each epoch, except that each optimizer step is sorted by length.

    Its micro-batches then hold rollouts of similar length, and no step sees others than in random order.

    Args:
        lengths: (rollouts,) tokens of each.
        step: rollouts of an optimizer step, on all processes.
        seed: of the order.
    """

    def __init__(self, lengths: np.ndarray, step: int, seed: int) -> None:
        self.lengths, self.step, self.seed, self.epoch = lengths, step, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch comes next; a resumed run continues in the order of the one that was stopped."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.lengths))
        for start in range(0, len(order), self.step):
            rows = order[start : start + self.step]
            yield from rows[np.argsort(-self.lengths[rows], kind="stable")].tolist()
