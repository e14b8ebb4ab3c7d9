"""What a logits processor can know of the batch that `generate` is working on.

1. `generate` hands a processor the padded ids, and nothing about padding, finished rows or several samples per prompt.
   Where the prompts start is therefore given beforehand; the rest is read off the ids.
2. Rows belong to prompts in blocks, as `num_return_sequences` lays them out.
3. A row whose history changes is a beam, and beams cannot be followed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["GenerationRows"]


class GenerationRows:
    """The sequences of one `generate` call.

    Args:
        input_ids: (B, P) ids of its first step, padded on the left.
        prompt_mask: (prompts, P), 1 at tokens; None where there is no padding.
        end_token_ids: ids that end a completion.

    Raises:
        ValueError: a mask of another batch, padding on the right, or an empty prompt.
    """

    def __init__(self, input_ids: Tensor, prompt_mask: Tensor | None, end_token_ids: Sequence[int]) -> None:
        count, width = input_ids.shape
        if prompt_mask is None:
            if (input_ids != input_ids[:1]).any():
                raise ValueError(
                    f"{count} different prompts without prompt_mask: a logits processor cannot see where padding ends. "
                    "Pass the tokenizer's attention_mask to start(), or call LengthGuide.generate."
                )
            prompt_mask = torch.ones_like(input_ids[:1])
        mask = prompt_mask.to(input_ids.device).bool()
        if mask.dim() != 2 or mask.size(1) != width or mask.size(0) < 1 or count % mask.size(0):
            raise ValueError(
                f"prompt_mask has the shape {tuple(mask.shape)}, but generate started with {count} rows of {width} "
                "tokens: pass the attention_mask of the very prompts that are given to generate, one row each."
            )
        if not mask[:, -1].all():
            raise ValueError(
                "a prompt is padded on the right, or empty: generate continues after the last column, so pad on the "
                "left (tokenizer.padding_side = 'left')."
            )
        self.prompts = mask.size(0)
        self.samples = count // mask.size(0)
        """Rows of each prompt."""
        repeated = mask.repeat_interleave(self.samples, 0)
        self.prompt_tokens = [
            [token for token, is_token in zip(row, given, strict=True) if is_token]
            for row, given in zip(input_ids.tolist(), repeated.tolist(), strict=True)
        ]
        self.finished = [False] * count
        self.generated = 0
        """Tokens that `generate` has added to every row, padding after the end included."""
        self._ends = set(end_token_ids)
        self._seen = input_ids

    def __len__(self) -> int:
        return len(self.finished)

    def follow(self, input_ids: Tensor) -> tuple[list[int], list[int]]:
        """The rows that went on since the last call, and their new tokens.

        Raises:
            ValueError: rows that are not continuations of those before.
        """
        if input_ids.shape != (self._seen.size(0), self._seen.size(1) + 1) or (input_ids[:, :-1] != self._seen).any():
            raise ValueError(
                "the sequences are not those of the step before, one token longer: length guidance follows sampling "
                "and greedy decoding, not beam search or assisted decoding. Set num_beams=1, leave assistant_model "
                "out, and call start() before each generate."
            )
        self._seen = input_ids
        self.generated += 1
        tokens = input_ids[:, -1].tolist()
        rows = [row for row in range(len(self)) if not self.finished[row]]
        for row in rows:
            self.finished[row] = tokens[row] in self._ends
        return rows, [tokens[row] for row in rows]
