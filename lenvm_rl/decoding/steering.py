"""One decoding step under length controls: from raw scores to scores whose softmax is the guided distribution.

1. `truncation` is that of transformers' `generate`, in its order: temperature, top-k, top-p, min-p. It runs here and
   not in `generate`, because there it would run AFTER the guidance: the tilt would be divided by the temperature and
   what it raised cut off again. So `generate` itself must be left neutral.
2. A request without control, with nothing to do in this step, or with one candidate only gets the truncated base
   scores: the same values that `generate` would have sampled from.
3. Otherwise its candidates are the `num_candidates` most probable tokens that truncation left, and all others are
   impossible.
4. Where the base distribution over the candidates is nearly certain (entropy at most `entropy_threshold` nats) the
   critic is not asked, unless it is nearly certain to END: that is what length control is about.
5. Bans come before truncation, so that top-p cannot leave nothing but a banned token.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lenvm_rl.decoding.controls import Candidates, LengthControl
from lenvm_rl.decoding.scorer import CandidateScorer

__all__ = ["Request", "Steering", "truncation"]


@dataclass(frozen=True)
class Request:
    """What one row of the scores belongs to."""

    slot: int
    """Its sequence in the scorer."""
    control: LengthControl | None
    """What it asks of its length."""
    generated: int
    """Tokens of its completion so far."""
    finished: bool = False
    """It has ended, and what comes now is padding."""


def truncation(
    temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0, min_p: float = 0.0
) -> LogitsProcessorList:
    """Transformers' own warpers in the order of `generate`; none for settings that change nothing.

    Raises:
        ValueError: a setting outside its range.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive, got {temperature}: for greedy decoding pass do_sample=False.")
    if top_k is not None and (top_k < -1 or isinstance(top_k, bool)):
        raise ValueError(f"top_k must be positive, or None, 0 or -1 for no limit, got {top_k}.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}.")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p must lie in [0, 1], got {min_p}.")
    warpers = LogitsProcessorList()
    if temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k is not None and top_k > 0:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(float(top_p)))
    if min_p > 0.0:
        warpers.append(MinPLogitsWarper(float(min_p)))
    return warpers


class Steering:
    """Applies the controls of a batch of requests to their scores.

    Args:
        scorer: says how much is left after each candidate.
        end_token_ids: ids that end a completion.
        num_candidates: most tokens that are scored in a step; None scores all that truncation leaves.
        entropy_threshold: nats up to which the critic is not asked; None always asks.
        warpers: the truncation of the base distribution.

    Raises:
        ValueError: no candidates, no end token, or a threshold below 0.
    """

    def __init__(
        self,
        scorer: CandidateScorer,
        end_token_ids: Sequence[int],
        *,
        num_candidates: int | None = 5,
        entropy_threshold: float | None = None,
        warpers: LogitsProcessorList | None = None,
    ) -> None:
        if num_candidates is not None and num_candidates < 1:
            raise ValueError(
                f"num_candidates must be at least 1, got {num_candidates}: with no candidate there is nothing to "
                "choose. None scores every token that truncation leaves."
            )
        if entropy_threshold is not None and not 0 <= entropy_threshold < math.inf:
            raise ValueError(
                f"entropy_threshold must be a number of nats from 0 up, got {entropy_threshold}; None always asks."
            )
        if not end_token_ids:
            raise ValueError("end_token_ids is empty: without an end token no completion has a length to control.")
        self.scorer = scorer
        self.end_token_ids = list(dict.fromkeys(end_token_ids))
        self.num_candidates = num_candidates
        self.entropy_threshold = entropy_threshold
        self.warpers = warpers if warpers is not None else truncation()
        self.steps = 0
        """Steps of single requests that had a control to follow."""
        self.asked = 0
        """Those of them in which the critic was asked."""

    def __call__(self, scores: Tensor, requests: Sequence[Request]) -> Tensor:
        """Guided scores.

        Args:
            scores: (B, vocabulary) raw scores of the policy.
            requests: B of them.

        Returns:
            (B, vocabulary) scores; `scores` itself where nothing is to be done.
        """
        ends = torch.tensor(self.end_token_ids, device=scores.device)
        alive = [
            (row, request, request.control)
            for row, request in enumerate(requests)
            if not request.finished and request.control is not None
        ]
        forced = [row for row, request, control in alive if control.forces_end(request.generated)]
        banned = [
            row
            for row, request, control in alive
            if control.bans_end(request.generated) and not control.forces_end(request.generated)
        ]
        raw = self._ban(scores, banned, ends)
        base = self.warpers(None, raw)  # type: ignore[arg-type]  # none of these reads the ids
        guided = self._guide(
            base,
            ends,
            [
                (row, request)
                for row, request, control in alive
                if not control.forces_end(request.generated) and control.needs_critic(request.generated)
            ],
        )
        if forced:
            guided = base.clone() if guided is base else guided
            self._force(guided, scores, forced, ends, requests)
        return guided

    def _ban(self, scores: Tensor, rows: list[int], ends: Tensor) -> Tensor:
        if not rows:
            return scores
        index = torch.tensor(rows, device=scores.device)
        banned = scores.clone()
        banned[index[:, None], ends] = -math.inf
        if (banned[index].amax(1) == -math.inf).any():
            raise ValueError(
                "a control forbids the end at a token where nothing but the end is possible: another logits processor "
                "has forbidden every other token."
            )
        return banned

    def _force(
        self, guided: Tensor, scores: Tensor, rows: list[int], ends: Tensor, requests: Sequence[Request]
    ) -> None:
        index = torch.tensor(rows, device=scores.device)
        among_ends = scores[index][:, ends]
        best, which = among_ends.max(1)
        if (best == -math.inf).any():
            row = rows[int((best == -math.inf).nonzero()[0])]
            raise ValueError(
                f"{requests[row].control!r} must end request {row} here, but another logits processor forbids every "
                "end token (min_new_tokens, suppress_tokens or a grammar): drop one of the two."
            )
        guided[index] = -math.inf
        guided[index, ends[which]] = 0.0

    def _guide(self, base: Tensor, ends: Tensor, rows: list[tuple[int, Request]]) -> Tensor:
        if not rows:
            return base
        self.steps += len(rows)
        # in the order of their slots: floating-point kernels then see the same problem however requests were shuffled
        rows = sorted(rows, key=lambda pair: pair[1].slot)
        index = torch.tensor([row for row, _ in rows], device=base.device)
        ids, log_probs, present, is_end = self._candidates(base[index], ends)
        certain = self._certain(log_probs, is_end)
        choice = present.sum(1) > 1
        asked = (choice & ~certain).tolist()
        kept = [number for number, is_asked in enumerate(asked) if is_asked]
        guided = base.clone()
        if not choice.all():
            alone = index[~choice]
            only = ids.gather(1, present.to(torch.uint8).argmax(1, keepdim=True)).squeeze(1)[~choice]
            guided[alone] = -math.inf
            guided[alone, only] = base[alone, only]
        if self.entropy_threshold is not None:
            guards = [request.control is not None and request.control.guards_end for _, request in rows]
            waits = certain & choice & torch.tensor(guards, device=base.device)
            guided[index[waits][:, None], ends] = -math.inf
        if not kept:
            return guided
        self.asked += len(kept)

        some = torch.tensor(kept, device=base.device)
        requests = [rows[number][1] for number in kept]
        ids, present, is_end = ids[some], present[some], is_end[some]
        logits = self.scorer.score([request.slot for request in requests], ids, present & ~is_end)
        logits = logits.float().masked_fill(~present | is_end, -math.inf)
        if logits.isnan().any() or (logits == math.inf).any():
            raise ValueError(
                "the length critic gave a value that is no number: its weights are broken, or it overflows in its "
                "dtype. Load it in bfloat16 or float32."
            )
        generated = torch.tensor([request.generated for request in requests], device=base.device)
        candidates = Candidates(log_probs[some], logits, present, is_end, generated, self.scorer.gamma)
        controls = [request.control for request in requests if request.control is not None]
        log_weights = reweight(candidates, controls)
        guided[index[some]] = -math.inf
        # by index: an absent place names token 0, which may be a candidate as well
        rows_of, columns = present.nonzero(as_tuple=True)
        guided[index[some][rows_of], ids[rows_of, columns]] = log_weights[rows_of, columns].to(guided.dtype)
        return guided

    def _candidates(self, base: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ids, log-probabilities, presence and end tokens of the candidates, in ascending order of their ids."""
        if self.num_candidates is None:
            limit = max(1, int((base > -math.inf).sum(1).max()))
        else:
            limit = min(self.num_candidates, base.size(1))
        scores, ids = base.topk(limit, 1)
        ids, order = ids.masked_fill(scores == -math.inf, base.size(1)).sort(dim=1, stable=True)
        scores = scores.gather(1, order)
        present = scores > -math.inf
        return ids.masked_fill(~present, 0), scores.float().log_softmax(1), present, torch.isin(ids, ends)

    def _certain(self, log_probs: Tensor, is_end: Tensor) -> Tensor:
        if self.entropy_threshold is None:
            return torch.zeros(len(log_probs), dtype=torch.bool, device=log_probs.device)
        entropy = -(log_probs.exp() * log_probs.clamp(min=-1e30)).sum(1)
        ends = is_end.gather(1, log_probs.argmax(1, keepdim=True)).squeeze(1)
        return (entropy <= self.entropy_threshold) & ~ends


def reweight(candidates: Candidates, controls: Sequence[LengthControl]) -> Tensor:
    """Log-weights of the candidates under the control of each row, (R, K), up to a constant of each row."""
    log_weights = candidates.log_probs
    groups: dict[tuple[int, Hashable], list[tuple[int, LengthControl]]] = {}
    for row, control in enumerate(controls):
        for part in control.parts:
            groups.setdefault((part.order, part.kind), []).append((row, part))
    for _, members in sorted(groups.items(), key=lambda item: item[0][0]):
        rows = torch.tensor([row for row, _ in members], device=log_weights.device)
        parameters = torch.tensor(
            [part.parameters() for _, part in members], dtype=torch.float64, device=log_weights.device
        )
        changed = members[0][1].reweight(log_weights[rows], candidates.select(rows), parameters)
        log_weights = log_weights.index_copy(0, rows, changed)
    return log_weights
