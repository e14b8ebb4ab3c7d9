"""Keys and values of many sequences, of which only some tokens of a forward are kept.

1. Each sequence has a slot and lies there from position 0 without gaps: no padding, and sequences may differ in length.
2. A forward reads the slots it is given and leaves its own keys and values aside; `keep` moves those worth keeping to
   the end of their sequence. What is not kept is never part of the cache.
3. Where a forward reads all slots in order, nothing is copied: its tokens are written behind the longest sequence and
   the attention reads one view.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

__all__ = ["SlotCache"]


class _Reading:
    """What the forward under way reads; shared by all layers."""

    slots: Tensor | None = None
    count: int = 0
    past: int = 0
    whole: bool = False


class _SlotLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, reading: _Reading) -> None:
        super().__init__()
        self.reading = reading
        self.new: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (x.new_zeros(0, x.size(1), 0, x.size(3)) for x in (key_states, value_states))
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def grow(self, slots: int, length: int) -> None:
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            if old.size(0) >= slots and old.size(2) >= length:
                continue
            # by doubling, as a list grows; rounded, so that a few more tokens do not copy everything again
            room = max(old.size(2), length) if old.size(2) >= length else max(2 * old.size(2), -(-length // 64) * 64)
            new = old.new_zeros(max(old.size(0), slots), old.size(1), room, old.size(3))
            new[: old.size(0), :, : old.size(2)] = old
            setattr(self, name, new)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        reading, added = self.reading, key_states.size(2)
        assert reading.slots is not None and self.keys is not None and self.values is not None
        self.new = (key_states, value_states)
        self.grow(reading.count, reading.past + added)
        if reading.past == 0:
            return key_states, value_states
        if reading.whole and self.keys.size(0) == len(reading.slots):
            end = reading.past + added
            self.keys[:, :, reading.past : end] = key_states
            self.values[:, :, reading.past : end] = value_states
            return self.keys[:, :, :end], self.values[:, :, :end]
        return (
            torch.cat([self.keys[:, :, : reading.past].index_select(0, reading.slots), key_states], 2),
            torch.cat([self.values[:, :, : reading.past].index_select(0, reading.slots), value_states], 2),
        )

    def keep(self, slots: Tensor, positions: Tensor, rows: Tensor, columns: Tensor) -> None:
        assert self.new is not None and self.keys is not None and self.values is not None
        self.keys[slots, :, positions] = self.new[0][rows, :, columns]
        self.values[slots, :, positions] = self.new[1][rows, :, columns]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.reading.past + query_length, 0

    def get_seq_length(self) -> int:
        return self.reading.past

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """A transformers cache over slots.

    Args:
        layers: number of attention layers.
    """

    def __init__(self, layers: int) -> None:
        self.reading = _Reading()
        super().__init__(layers=[_SlotLayer(self.reading) for _ in range(layers)])
        self._device = torch.device("cpu")

    def read(self, slots: Sequence[int], past: int) -> None:
        """The next forward continues these slots, in this order; `past` is the longest of their sequences."""
        device = getattr(self.layers[0], "device", self._device)
        self.reading.slots = torch.tensor(list(slots), device=device)
        self.reading.count = max(self.reading.count, max(slots) + 1)
        self.reading.past = past
        self.reading.whole = list(slots) == list(range(len(slots)))

    def keep(self, slots: Sequence[int], positions: Sequence[int], rows: Sequence[int], columns: Sequence[int]) -> None:
        """Keep these tokens of the last forward.

        Args:
            slots, positions: where to: one token each.
            rows, columns: where they were in the forward.
        """
        device = getattr(self.layers[0], "device", self._device)
        index = torch.tensor([list(slots), list(positions), list(rows), list(columns)], device=device)
        for layer in self.layers:
            layer.keep(*index)  # type: ignore[union-attr]

    def keep_all(self, slots: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> None:
        """Keep the first `counts` tokens of each row of the last forward, behind the `starts` tokens that are there."""
        where = [
            (slot, start + step, row, step)
            for row, (slot, start, count) in enumerate(zip(slots, starts, counts, strict=True))
            for step in range(count)
        ]
        if where:
            slots, positions, rows, columns = zip(*where, strict=True)
            self.keep(slots, positions, rows, columns)
