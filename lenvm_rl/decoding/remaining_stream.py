"""How much is left, said while the text is being generated.

    stream = RemainingLengthStream(critic, tokenizer, on_step=lambda step, remaining: print(step, remaining))
    policy.generate(**inputs, logits_processor=[stream.start(inputs.attention_mask)], max_new_tokens=256)
    stream.remaining        # (B, steps): tokens that were expected after 0, 1, 2, ... generated tokens

1. A logits processor that changes no score: it sees every token, and may stand beside any other.
2. Column 0 is the prediction at the prompt. A row that has ended is 0 once, after its end token, and nan from then on;
   the state after the very last token of `generate` is not seen by any processor, and so not in the stream.
3. The prediction is ln(1 - u) / ln(gamma) of the predicted mean u: a lower bound on the expected length, since the
   transform is concave (LenVM appendix F).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from lenvm_rl.decoding.generation_rows import GenerationRows
from lenvm_rl.decoding.guide import scorer_and_ends
from lenvm_rl.decoding.scorer import CandidateScorer
from lenvm_rl.length import logit_to_remaining
from lenvm_rl.model import LengthValueModel

__all__ = ["RemainingLengthStream"]


class RemainingLengthStream(LogitsProcessor):
    """Records and reports the predicted remaining length at every token.

    Args:
        critic: the LenVM on its device, or any other scorer. One that a `LengthGuide` holds cannot be shared: pass the
            model.
        tokenizer: the policy's, which must be the critic's too.
        end_token_ids: ids that end a completion; by default the tokenizer's end token.
        on_step: called with the number of generated tokens and the (B,) float32 predictions, before the next token is
            drawn.

    Raises:
        ValueError: a critic with another tokenizer, or no end token.
    """

    supports_continuous_batching = False

    def __init__(
        self,
        critic: LengthValueModel | CandidateScorer,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        end_token_ids: Sequence[int] | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        self.scorer, self.end_token_ids = scorer_and_ends(critic, tokenizer, end_token_ids)
        self.on_step = on_step
        self._prompt_mask: Tensor | None = None
        self._started = False
        self._rows: GenerationRows | None = None
        self._steps: list[Tensor] = []

    def start(self, prompt_mask: Tensor | None = None) -> "RemainingLengthStream":
        """Get ready for one `generate` call.

        Args:
            prompt_mask: (prompts, P) attention mask of the prompts. May be left out for a single prompt.

        Returns:
            This processor, for `logits_processor=[stream.start(...)]`.
        """
        self._prompt_mask, self._started, self._rows, self._steps = prompt_mask, True, None, []
        self.scorer.close_all()
        return self

    @property
    def remaining(self) -> Tensor:
        """(B, steps) float32: predicted remaining tokens after 0, 1, 2, ... generated tokens."""
        if not self._steps:
            raise ValueError("nothing has been generated yet: pass this processor to generate first.")
        return torch.stack(self._steps, 1)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores as they are; called by `generate`."""
        if not self._started:
            raise ValueError("start(prompt_mask) has not been called: the stream does not know where prompts begin.")
        if self._rows is None:
            self._rows = GenerationRows(input_ids, self._prompt_mask, self.end_token_ids)
            for slot, tokens in enumerate(self._rows.prompt_tokens):
                self.scorer.open(slot, tokens)
            going_on = list(range(len(self._rows)))
            ended: list[int] = []
        else:
            rows, tokens = self._rows.follow(input_ids)
            self.scorer.append(rows, tokens)
            going_on = [row for row in rows if not self._rows.finished[row]]
            ended = [row for row in rows if self._rows.finished[row]]
        remaining = torch.full((len(self._rows),), float("nan"), device=scores.device)
        remaining[ended] = 0.0
        if going_on:
            remaining[going_on] = logit_to_remaining(self.scorer.predict(going_on).to(scores.device), self.scorer.gamma)
        self._steps.append(remaining)
        if self.on_step is not None:
            self.on_step(self._rows.generated, remaining)
        return scores
