"""Length guidance inside transformers' `generate`: one logits processor for a batch in which every request may ask for
something else.

    guide = LengthGuide(critic, tokenizer, num_candidates=5, temperature=0.7, top_p=0.95)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    output = guide.generate(policy, **inputs, controls=[LengthTilt(-2.0), AtMost(40), None], max_new_tokens=128)

1. `None` leaves a request as it is: bit for bit the scores that truncation alone gives. So does a tilt of 0.
2. Or as a processor of your own `generate` call, whose sampling must then be neutral, since the guide truncates itself:
   `policy.generate(**inputs, logits_processor=[guide.start(controls, inputs.attention_mask)], **guide.neutral)`.
3. Sampling and greedy decoding, several samples per prompt, left-padded prompts. Beams are refused.
4. Left out: assisted decoding, continuous batching, encoder-decoders.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedTokenizerBase

from lenvm_rl.decoding.controls import LengthControl
from lenvm_rl.decoding.generation_rows import GenerationRows
from lenvm_rl.decoding.scorer import CachedCritic, CandidateScorer
from lenvm_rl.decoding.steering import Request, Steering, truncation
from lenvm_rl.model import LengthValueModel
from lenvm_rl.sampling import Completion, complete_in_batches, declared_end_ids
from lenvm_rl.tokenizer_fingerprint import check_same_tokenizer

__all__ = ["Controls", "LengthGuide", "guided_completions", "scorer_and_ends"]

Controls = LengthControl | None | Sequence[LengthControl | None]
"""One for every request, or one for each."""


class LengthGuide(LogitsProcessor):
    """Steers the length of completions with a Length Value Model.

    Args:
        critic: the LenVM on its device, or any other scorer.
        tokenizer: the policy's, which must be the critic's too. May be left out for a scorer that is no LenVM.
        end_token_ids: ids that end a completion; by default the tokenizer's end token. `generate` of this class adds
            those of the policy.
        num_candidates: k, most tokens that are scored in a step; None scores all that truncation leaves.
        entropy_threshold: nats of the distribution over the candidates up to which the critic is not asked; None always
            asks.
        temperature, top_k, top_p, min_p: the base distribution, truncated in this order. top_k None, 0 or -1 is no
        limit.

    Raises:
        ValueError: a critic with another tokenizer, or a setting outside its range.
    """

    supports_continuous_batching = False

    def __init__(
        self,
        critic: LengthValueModel | CandidateScorer,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        end_token_ids: Sequence[int] | None = None,
        num_candidates: int | None = 5,
        entropy_threshold: float | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
    ) -> None:
        self.scorer, ends = scorer_and_ends(critic, tokenizer, end_token_ids)
        self.tokenizer = tokenizer
        self.steering = Steering(
            self.scorer,
            ends,
            num_candidates=num_candidates,
            entropy_threshold=entropy_threshold,
            warpers=truncation(temperature, top_k, top_p, min_p),
        )
        self._controls: Controls = None
        self._prompt_mask: Tensor | None = None
        self._started = False
        self._rows: GenerationRows | None = None
        self._row_controls: list[LengthControl | None] = []
        self._slots: list[int] = []

    @property
    def neutral(self) -> dict[str, Any]:
        """Options under which `generate` does not bend the distribution a second time."""
        return {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": None, "typical_p": 1.0, "num_beams": 1}

    def start(self, controls: Controls, prompt_mask: Tensor | None = None) -> "LengthGuide":
        """Get ready for one `generate` call.

        Args:
            controls: one for every prompt, or a list with one for each; None is no control. The samples of a prompt
                (`num_return_sequences`) share its control, unless there is one for each row.
            prompt_mask: (prompts, P) attention mask of the prompts. May be left out for a single prompt.

        Returns:
            This guide, for `logits_processor=[guide.start(...)]`.

        Raises:
            ValueError: something that is no control, or a number of controls that does not fit the prompts.
        """
        given = _listed(controls, 1)
        for row, control in enumerate(given):
            if not isinstance(control, LengthControl) and control is not None:
                raise ValueError(
                    f"control {row} is {control!r}: give LengthTilt(beta), LengthTarget(n), AtMost(n), AtLeast(n), "
                    "SoftTarget(n), a combination with &, or None for no control."
                )
        if not isinstance(controls, LengthControl) and controls is not None:
            prompts = None if prompt_mask is None else prompt_mask.size(0)
            if not given or (prompts is not None and len(given) % prompts):
                raise ValueError(
                    f"{len(given)} controls for {prompts or 'some'} prompts: give one for all, or a list with one for "
                    "each prompt (None leaves a prompt alone)."
                )
        self._controls, self._prompt_mask = controls, prompt_mask
        self._started, self._rows = True, None
        self.scorer.close_all()
        return self

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Guided scores of one step; called by `generate`."""
        if not self._started:
            raise ValueError("start(controls, prompt_mask) has not been called: the guide does not know what to do.")
        if self._rows is None:
            self._begin(input_ids, scores)
        else:
            rows, tokens = self._rows.follow(input_ids)
            followed = [
                (self._slots[row], token)
                for row, token in zip(rows, tokens, strict=True)
                if self._row_controls[row] is not None and not self._rows.finished[row]
            ]
            if followed:
                slots, new = zip(*followed, strict=True)
                self.scorer.append(slots, new)
        assert self._rows is not None
        return self.steering(
            scores,
            [
                Request(slot, control, self._rows.generated, finished)
                for slot, control, finished in zip(self._slots, self._row_controls, self._rows.finished, strict=True)
            ],
        )

    def generate(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        controls: Controls,
        *,
        max_new_tokens: int,
        do_sample: bool = True,
        num_return_sequences: int = 1,
        **options: Any,
    ) -> Any:
        """`model.generate` under guidance, with nothing left to bend the distribution a second time.

        Args:
            model: the policy.
            input_ids, attention_mask: (prompts, P), padded on the left.
            controls: see `start`.
            max_new_tokens: limit of every completion.
            do_sample: False is greedy decoding of the guided distribution.
            num_return_sequences: completions of each prompt.
            options: others of `generate`: streamer, stopping_criteria, return_dict_in_generate, output_scores,
                logits_processor (they come first), ...

        Returns:
            What `model.generate` returns.

        Raises:
            ValueError: a target beyond `max_new_tokens`, a completion beyond the positions of critic or policy, options
                that belong to the guide, or beams.
        """
        taken = {"temperature", "top_k", "top_p", "min_p", "generation_config"} & options.keys()
        if taken:
            raise ValueError(
                f"{', '.join(sorted(taken))} cannot be given here: truncation comes before guidance, so temperature, "
                "top_k, top_p and min_p are set when the LengthGuide is made; other options by their own names."
            )
        if options.pop("num_beams", 1) != 1:
            raise ValueError("num_beams > 1: length guidance follows sampling and greedy decoding, not beams.")
        self.start(controls, attention_mask)
        self._check_room(model, attention_mask, max_new_tokens)
        ends = self._end_ids(model)
        pad = model.generation_config.pad_token_id
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            num_return_sequences=num_return_sequences,
            # explicit: a model's own default would bend the distribution unseen
            repetition_penalty=options.pop("repetition_penalty", 1.0),
            pad_token_id=options.pop("pad_token_id", ends[0] if pad is None else pad),
            eos_token_id=ends,
            **self.neutral,
        )
        before = list(options.pop("logits_processor", None) or [])
        return model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=config,
            logits_processor=[*before, self],
            **options,
        )

    def _begin(self, input_ids: Tensor, scores: Tensor) -> None:
        rows = GenerationRows(input_ids, self._prompt_mask, self.steering.end_token_ids)
        if rows.samples > 1 and (torch.logsumexp(scores.float(), 1).abs() < 1e-4).all():
            # beam search normalises the scores before it calls processors; sampling never does
            raise ValueError(
                "these are the rows of a beam search: length guidance follows sampling and greedy decoding only. Set "
                "num_beams=1."
            )
        self._row_controls = _for_rows(self._controls, len(rows), rows.prompts)
        for row, control in enumerate(self._row_controls):
            if control is not None:
                _check_context(control, row, len(rows.prompt_tokens[row]), self.scorer.context_length)
        # slots in an order that depends on the requests alone, not on how the batch lists them
        order = sorted(
            range(len(rows)),
            key=lambda row: (
                self._row_controls[row] is None,
                rows.prompt_tokens[row],
                repr(self._row_controls[row]),
            ),
        )
        self._slots = [0] * len(rows)
        for slot, row in enumerate(order):
            self._slots[row] = slot
        for slot, row in enumerate(order):
            if self._row_controls[row] is not None:
                self.scorer.open(slot, rows.prompt_tokens[row])
        self._rows = rows

    def _end_ids(self, model: Any) -> list[int]:
        ends = [*self.steering.end_token_ids, *declared_end_ids(model)]
        self.steering.end_token_ids = list(dict.fromkeys(ends))
        return self.steering.end_token_ids

    def _check_room(self, model: Any, attention_mask: Tensor, max_new_tokens: int) -> None:
        lengths = attention_mask.sum(1).tolist()
        given = _listed(self._controls, len(lengths))
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        for row, control in enumerate(given):
            length = lengths[row * len(lengths) // len(given)]
            if control is None:
                continue
            if control.longest is not None and control.longest > max_new_tokens:
                raise ValueError(
                    f"request {row} asks for {control!r}, but max_new_tokens={max_new_tokens} cuts it before: raise "
                    f"max_new_tokens to at least {control.longest}, or ask for less."
                )
            _check_context(control, row, length, self.scorer.context_length)
            _check_context(control, row, length, positions, of="policy")
            if (
                self.scorer.context_length is not None
                and length + max_new_tokens > self.scorer.context_length
                and control.longest is None
            ):
                raise ValueError(
                    f"request {row} has a prompt of {length} tokens and may grow by max_new_tokens={max_new_tokens}, "
                    f"but the length critic has {self.scorer.context_length} positions: lower max_new_tokens, or use a "
                    "critic with a longer context."
                )


def guided_completions(
    model: Any,
    guide: LengthGuide,
    prompt_ids: Sequence[list[int]],
    controls: Controls,
    *,
    max_new_tokens: int,
    do_sample: bool = True,
    batch_size: int = 64,
    on_batch: Callable[[int, int], None] = lambda completions, tokens: None,
) -> list[Completion]:
    """One completion for each prompt, in the order of the prompts; the guided `lenvm_rl.sampling.sample_completions`.

    Args:
        model: the policy; its training mode is restored.
        guide: what steers it. With `controls=None` it only truncates: the unguided run at equal settings.
        prompt_ids: token ids of each prompt, unpadded. Repeat a prompt to sample it several times.
        controls: one for every prompt, or one for each.
        max_new_tokens: limit of every completion.
        do_sample: False is greedy decoding. The random state is torch's own: seed it for a repeatable result.
        batch_size: prompts of one `generate` call.
        on_batch: called after each batch with the completions and tokens it made, for progress.

    Raises:
        ValueError: an empty prompt, or controls that do not fit (see `LengthGuide.generate`).
    """
    given = _for_rows(controls, len(prompt_ids), len(prompt_ids)) if prompt_ids else []
    ends, pad = guide._end_ids(model), model.generation_config.pad_token_id
    pad = ends[0] if pad is None else pad

    def generate(input_ids: Tensor, mask: Tensor, rows: slice) -> Tensor:
        generated: Tensor = guide.generate(
            model,
            input_ids,
            mask,
            given[rows],
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            pad_token_id=pad,
        )
        return generated

    return complete_in_batches(model, prompt_ids, generate, ends, pad, batch_size=batch_size, on_batch=on_batch)


def scorer_and_ends(
    critic: LengthValueModel | CandidateScorer,
    tokenizer: PreTrainedTokenizerBase | None,
    end_token_ids: Sequence[int] | None,
) -> tuple[CandidateScorer, list[int]]:
    """The critic as a scorer, checked against the tokenizer, and the ids that end a completion.

    Raises:
        ValueError: another tokenizer than the critic's, or no end token.
    """
    if isinstance(critic, LengthValueModel):
        if tokenizer is None:
            raise ValueError(
                "tokenizer is missing: a length critic reads the policy's token ids, and under another vocabulary "
                "every value would be wrong without notice. Pass the policy's tokenizer."
            )
        check_same_tokenizer(tokenizer, critic.config)
    ends = list(end_token_ids or [])
    if not ends and tokenizer is not None and tokenizer.eos_token_id is not None:
        ends = [tokenizer.eos_token_id]
    if not ends:
        raise ValueError("there is no end token: pass a tokenizer that has one, or end_token_ids.")
    return (CachedCritic(critic) if isinstance(critic, LengthValueModel) else critic), ends


def _listed(controls: Controls, count: int) -> list[LengthControl | None]:
    if isinstance(controls, LengthControl) or controls is None:
        return [controls] * count
    return list(controls)


def _for_rows(controls: Controls, rows: int, prompts: int) -> list[LengthControl | None]:
    given = _listed(controls, rows)
    if len(given) == rows:
        return given
    if len(given) == prompts:
        return [control for control in given for _ in range(rows // prompts)]
    raise ValueError(
        f"{len(given)} controls for {prompts} prompts"
        + (f" ({rows} rows)" if rows != prompts else "")
        + ": give one for all, or a list with one for each prompt (None leaves a prompt alone)."
    )


def _check_context(
    control: LengthControl, row: int, prompt: int, positions: int | None, of: str = "length critic"
) -> None:
    if control.longest is not None and positions is not None and prompt + control.longest > positions:
        raise ValueError(
            f"request {row} asks for {control!r} after a prompt of {prompt} tokens, but the {of} has {positions} "
            f"positions: ask for at most {max(positions - prompt, 0)} tokens, or use a {of} with a longer context."
        )
