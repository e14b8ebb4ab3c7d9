"""Length values of the states after each candidate token, on one shared cache of the critic.

1. A critic follows several sequences at once, each in a slot. It is told of every token, and computes when it is asked:
   tokens that came in between without a question are caught up in the same forward.
2. All candidates of all sequences are scored in ONE forward. The candidates of a sequence stand at the same position;
   the mask lets each see the sequence and itself, never another candidate.
3. The candidate that was chosen keeps its keys and values: it is not computed again.
4. Candidates are scored in ascending order of their ids and sequences in the order of their slots, so that
   floating-point kernels see the same problem however the caller had shuffled them.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from lenvm_rl.critic import TOKEN_BUDGET, micro_batches
from lenvm_rl.decoding.slot_cache import SlotCache
from lenvm_rl.model import LengthValueModel

__all__ = ["CachedCritic", "CandidateScorer"]


class CandidateScorer(ABC):
    """What says how much is left after a token: a critic, or anything that plays its part.

    Args:
        gamma: discount of its values.
        vocab_size: number of token ids it knows.
        context_length: positions it can read; None without a limit.
    """

    def __init__(self, *, gamma: float, vocab_size: int, context_length: int | None = None) -> None:
        self.gamma = gamma
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.sequences: dict[int, list[int]] = {}

    def open(self, slot: int, tokens: Sequence[int]) -> None:
        """Follow a new sequence, which has these tokens already (prompt first)."""
        if slot in self.sequences:
            self.close(slot)
        self.sequences[slot] = list(tokens)

    def append(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        """One more token of each of these sequences."""
        for slot, token in zip(slots, tokens, strict=True):
            self.sequences[slot].append(token)

    def close(self, slot: int) -> None:
        """Forget a sequence."""
        del self.sequences[slot]

    def close_all(self) -> None:
        """Forget every sequence."""
        for slot in list(self.sequences):
            self.close(slot)

    @abstractmethod
    def score(self, slots: Sequence[int], candidates: Tensor, wanted: Tensor) -> Tensor:
        """Logits of the states after each candidate.

        Args:
            slots: R sequences.
            candidates: (R, K) token ids that may follow each.
            wanted: (R, K) bool, which of them to score.

        Returns:
            (R, K) float32: z; anything where it is not wanted.
        """

    @abstractmethod
    def predict(self, slots: Sequence[int]) -> Tensor:
        """(R,) float32: z of the states that these sequences are in."""


class CachedCritic(CandidateScorer):
    """A Length Value Model that scores candidates incrementally.

    Args:
        model: the critic on its device; it is put into evaluation mode. Its attention must be `sdpa` or `eager`, the
            two that take a mask of their own.
        token_budget: tokens of one forward over whole prompts, padding included.

    Raises:
        ValueError: another attention implementation, layers that do not attend to the whole sequence, or a backbone
            that does not honour the mask.
    """

    def __init__(self, model: LengthValueModel, *, token_budget: int = TOKEN_BUDGET) -> None:
        backbone = model.config.get_text_config()
        super().__init__(
            gamma=float(model.config.gamma or 0.0),
            vocab_size=model.get_input_embeddings().num_embeddings,  # type: ignore[arg-type]
            context_length=getattr(backbone, "max_position_embeddings", None),
        )
        attention = backbone._attn_implementation
        if attention not in ("sdpa", "eager"):
            raise ValueError(
                f"the length critic was loaded with attn_implementation={attention!r}, which cannot keep candidates "
                "from seeing each other: load it with attn_implementation='sdpa'."
            )
        self.window = _attention_window(backbone)
        self.model = model.eval()
        self.additive_mask = attention == "eager"
        self.token_budget = token_budget
        self.cache = SlotCache(backbone.num_hidden_layers)
        self.forwards = 0
        """Forwards of the critic so far."""
        self.tokens = 0
        """Tokens that they took, padding included."""
        self._known: dict[int, int] = {}
        self._state: dict[int, Tensor] = {}
        self._columns: dict[int, dict[int, int]] = {}
        self._scores: Tensor = torch.empty(0)
        self._first_candidate = 0
        self._rows: dict[int, int] = {}
        self._check_mask()

    def open(self, slot: int, tokens: Sequence[int]) -> None:
        super().open(slot, tokens)
        self._known[slot] = 0

    def close(self, slot: int) -> None:
        super().close(slot)
        self._known.pop(slot)
        self._state.pop(slot, None)
        self._columns.pop(slot, None)

    def append(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        super().append(slots, tokens)
        kept: list[int] = []
        columns: list[int] = []
        for slot, token in zip(slots, tokens, strict=True):
            column = self._columns.pop(slot, {}).get(token)
            if column is not None:
                kept.append(slot)
                columns.append(column)
        if not kept:
            return
        rows = [self._rows[slot] for slot in kept]
        self.cache.keep(kept, [self._known[slot] for slot in kept], rows, columns)
        first = self._first_candidate
        for slot, row, column in zip(kept, rows, columns, strict=True):
            self._known[slot] += 1
            self._state[slot] = self._scores[row, column - first]

    @torch.no_grad()
    def score(self, slots: Sequence[int], candidates: Tensor, wanted: Tensor) -> Tensor:
        order = sorted(range(len(slots)), key=lambda row: slots[row])
        rows = torch.tensor(order, device=candidates.device)
        # what is not wanted goes last, so that it cannot shift the others
        ids, columns = torch.where(wanted, candidates, self.vocab_size)[rows].sort(dim=1, stable=True)
        width = int(wanted.sum(1).max())
        sorted_wanted = wanted[rows].gather(1, columns)[:, :width]
        scored = self._forward([slots[row] for row in order], ids[:, :width], sorted_wanted)
        result = torch.zeros(candidates.shape, dtype=torch.float32, device=candidates.device)
        padded = torch.nn.functional.pad(scored, (0, candidates.size(1) - width))
        result[rows] = torch.zeros_like(result).scatter(1, columns, padded)
        return result

    @torch.no_grad()
    def predict(self, slots: Sequence[int]) -> Tensor:
        behind = sorted(slot for slot in slots if self._known[slot] < len(self.sequences[slot]))
        if behind:
            nothing = torch.empty(len(behind), 0, dtype=torch.long, device=self.model.device)
            self._forward(behind, nothing, nothing.bool())
        return torch.stack([self._state[slot] for slot in slots])

    def _forward(self, slots: list[int], candidates: Tensor, wanted: Tensor) -> Tensor:
        """Catch up on these sequences and score their candidates; slots and candidates in ascending order."""
        self._check(slots, candidates, wanted)
        self._read_whole([slot for slot in slots if self._known[slot] == 0])
        known = [self._known[slot] for slot in slots]
        pending = [self.sequences[slot][start:] for slot, start in zip(slots, known, strict=True)]
        behind, width = max(map(len, pending)), candidates.size(1)
        if behind + width == 0:
            return torch.empty(len(slots), 0, device=self.model.device)
        device = self.model.device
        lengths = torch.tensor(known, device=device)
        late = torch.tensor([len(tokens) for tokens in pending], device=device)
        caught_up = torch.tensor([tokens + [0] * (behind - len(tokens)) for tokens in pending], device=device).long()
        ids = torch.cat([caught_up, candidates.to(device).masked_fill(~wanted.to(device), 0)], 1)
        steps = torch.arange(behind, device=device)
        positions = torch.cat(
            [
                (lengths[:, None] + steps).expand(-1, behind),
                (lengths + late)[:, None].expand(-1, width),
            ],
            1,
        )
        mask = _tree_mask(lengths, late, behind, width, past=max(known))
        self.cache.read(slots, past=max(known))
        logits = self._call(ids, self._for_attention(mask), positions)
        if behind:
            self.cache.keep_all(slots, known, [len(tokens) for tokens in pending])
            for row, slot in enumerate(slots):
                if pending[row]:
                    self._known[slot] += len(pending[row])
                    self._state[slot] = logits[row, len(pending[row]) - 1]
        scores = logits[:, behind:]
        self._scores, self._first_candidate = scores, behind
        self._rows = {slot: row for row, slot in enumerate(slots)}
        self._columns = {
            slot: {token: behind + column for column, token in enumerate(row) if used[column]}
            for slot, row, used in zip(slots, candidates.tolist(), wanted.tolist(), strict=True)
        }
        return scores.to(candidates.device)

    def _read_whole(self, slots: list[int]) -> None:
        """Sequences of which nothing is known yet, without a mask: they are padded on the right."""
        for rows in micro_batches([len(self.sequences[slot]) for slot in slots], self.token_budget):
            some = sorted(slots[row] for row in rows)
            sequences = [self.sequences[slot] for slot in some]
            width = max(map(len, sequences))
            ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in sequences], device=self.model.device)
            self.cache.read(some, past=0)
            logits = self._call(ids, None, torch.arange(width, device=ids.device)[None].expand(len(some), -1))
            lengths = [len(tokens) for tokens in sequences]
            self.cache.keep_all(some, [0] * len(some), lengths)
            for row, slot in enumerate(some):
                self._known[slot] = lengths[row]
                self._state[slot] = logits[row, lengths[row] - 1]
        if slots:
            self._columns = {}

    def _call(self, ids: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        self.forwards += 1
        self.tokens += ids.numel()
        output = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True
        )
        return output.logits

    @torch.no_grad()
    def _check_mask(self) -> None:
        device, count = self.model.device, 4
        ids = torch.arange(count + 3, device=device) % self.vocab_size
        positions = torch.arange(count + 3, device=device).clamp(max=count)
        mask = _tree_mask(torch.tensor([0], device=device), torch.tensor([count], device=device), count, 3, past=0)
        together = self.model.model(
            input_ids=ids[None], attention_mask=self._for_attention(mask), position_ids=positions[None], use_cache=False
        ).last_hidden_state[0, count:]
        apart = torch.stack([torch.cat([ids[:count], candidate[None]]) for candidate in ids[count:]])
        alone = self.model.model(input_ids=apart, use_cache=False).last_hidden_state[:, -1]
        error = float((together - alone).float().norm() / alone.float().norm().clamp(min=1e-6))
        if not error < (1e-3 if together.dtype == torch.float32 else 0.1):
            raise ValueError(
                f"the length critic's {type(self.model.model).__name__} values a candidate otherwise when others stand "
                f"beside it (relative difference {error:.2g}): it does not follow the attention mask or the positions "
                "it is given, so candidates would see each other. Use a critic with another backbone, or another "
                "attn_implementation."
            )

    def _for_attention(self, mask: Tensor) -> Tensor:
        if not self.additive_mask:
            return mask
        return torch.zeros_like(mask, dtype=self.model.dtype).masked_fill(~mask, torch.finfo(self.model.dtype).min)

    def _check(self, slots: list[int], candidates: Tensor, wanted: Tensor) -> None:
        longest = max(len(self.sequences[slot]) for slot in slots) + (1 if candidates.size(1) else 0)
        if self.context_length is not None and longest > self.context_length:
            raise ValueError(
                f"a sequence has reached {longest} tokens, prompt included, but the length critic has only "
                f"{self.context_length} positions: lower max_new_tokens, or use a critic with a longer context."
            )
        if self.window is not None and longest > self.window:
            raise ValueError(
                f"a sequence has reached {longest} tokens, prompt included, but layers of the length critic attend to "
                f"a sliding window of {self.window}, which guided decoding does not support: lower max_new_tokens."
            )
        if wanted.any() and int(candidates[wanted].max()) >= self.vocab_size:
            raise ValueError(
                f"token id {int(candidates[wanted].max()):,} is a candidate, but the length critic has "
                f"{self.vocab_size:,} token embeddings. A token-level critic must share the policy's tokenizer: "
                "pretrain one with recipes/pretrain_lenvm.py."
            )


def _tree_mask(lengths: Tensor, late: Tensor, behind: int, width: int, past: int) -> Tensor:
    """(R, 1, behind + width, past + behind + width) bool: what each new token may see."""
    device = lengths.device
    cached = torch.arange(past, device=device) < lengths[:, None]
    steps = torch.arange(behind, device=device)
    given = steps < late[:, None]
    causal = steps[:, None] >= steps
    sees_given = torch.cat(
        [
            (given[:, None] & causal) | torch.eye(behind, dtype=torch.bool, device=device),
            given[:, None].expand(-1, width, -1),
        ],
        1,
    )
    sees_candidates = torch.cat(
        [
            torch.zeros(behind, width, dtype=torch.bool, device=device),
            torch.eye(width, dtype=torch.bool, device=device),
        ]
    )
    return torch.cat(
        [
            cached[:, None].expand(-1, behind + width, -1),
            sees_given,
            sees_candidates.expand(len(lengths), -1, -1),
        ],
        2,
    )[:, None]


def _attention_window(backbone: object) -> int | None:
    """Tokens that the narrowest layer sees; None where all see everything."""
    layers = set(getattr(backbone, "layer_types", None) or ["full_attention"])
    other = layers - {"full_attention", "sliding_attention"}
    if other:
        raise ValueError(
            f"the length critic has layers of the type {', '.join(sorted(other))}, which carry a state that cannot "
            "fork into candidates: guided decoding needs a critic with attention layers only."
        )
    window = getattr(backbone, "sliding_window", None)
    named = getattr(backbone, "layer_types", None) is not None
    slides = "sliding_attention" in layers if named else window is not None
    return window if slides else None
