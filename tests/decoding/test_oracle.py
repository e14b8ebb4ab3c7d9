"""Hard modes under an oracle: a scorer that knows how much is left, in a world where every token has a known effect."""

import math
from functools import reduce

import pytest
import torch

from lenvm_rl.decoding import AtLeast, AtMost, CandidateScorer, LengthGuide, LengthTarget

PAD, END, STEP, DETOUR, SKIP, PROMPT = range(6)
VOCABULARY = 6
PLAN = 20


def after(left, token):
    """Tokens that are left, END included, when the text goes straight on after this token."""
    return {STEP: max(left - 1, 1), DETOUR: left + 2, SKIP: max(left - 3, 1), END: 0}.get(token, left)


class Oracle(CandidateScorer):
    def __init__(self, gamma=0.9):
        super().__init__(gamma=gamma, vocab_size=VOCABULARY)
        self.left = {}

    def open(self, slot, tokens):
        super().open(slot, tokens)
        self.left[slot] = reduce(after, tokens, PLAN)

    def append(self, slots, tokens):
        super().append(slots, tokens)
        for slot, token in zip(slots, tokens, strict=True):
            self.left[slot] = after(self.left[slot], token)

    def score(self, slots, candidates, wanted):
        left = [
            [after(self.left[slot], token) for token in row]
            for slot, row in zip(slots, candidates.tolist(), strict=True)
        ]
        # what a perfect critic would put out
        return torch.log(torch.expm1(-torch.tensor(left).double() * math.log(self.gamma))).float()

    def predict(self, slots):
        raise NotImplementedError


def policy_scores(plans):
    """The end is likely where the plan is used up, and no candidate anywhere else."""
    scores = torch.full((len(plans), VOCABULARY), -math.inf)
    scores[:, STEP], scores[:, DETOUR], scores[:, SKIP] = 2.0, 0.5, 0.0
    scores[:, END] = torch.where(torch.tensor(plans) == 1, 3.0, -30.0)
    return scores


def guide_of(scorer):
    return LengthGuide(scorer, end_token_ids=[END], num_candidates=3)


def generate(guide, controls, *, sample, limit=240, seed=0):
    """Completions, each with the plan before its last token: 1 where the end was natural."""
    generator = torch.Generator().manual_seed(seed)
    guide.start(controls)
    ids = torch.full((len(controls), 1), PROMPT)
    plans, ended = [PLAN] * len(controls), {}
    for step in range(limit):
        probs = guide(ids, policy_scores(plans)).softmax(1)
        tokens = torch.multinomial(probs, 1, generator=generator)[:, 0] if sample else probs.argmax(1)
        tokens[list(ended)] = PAD
        for row in (tokens == END).nonzero()[:, 0].tolist():
            ended[row] = (step + 1, plans[row])
        plans = [after(left, token) for left, token in zip(plans, tokens.tolist(), strict=True)]
        ids = torch.cat([ids, tokens[:, None]], 1)
        if len(ended) == len(controls):
            break
    return [ended.get(row, (limit + 1, 0)) for row in range(len(controls))]


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("gamma", [0.9, 0.997])
def test_equal_ends_at_exactly_n_for_every_n(gamma, sample):
    guide = guide_of(Oracle(gamma))
    lengths = [length for length, _ in generate(guide, [LengthTarget(n) for n in range(1, 201)], sample=sample)]
    assert lengths == list(range(1, 201))


@pytest.mark.parametrize("seed", range(3))
def test_at_most_never_exceeds_n_and_ends_by_itself_where_it_can(seed):
    guide = guide_of(Oracle())
    ends = generate(guide, [AtMost(n) for n in range(1, 201)], sample=True, seed=seed)
    assert all(length <= n for n, (length, _) in enumerate(ends, start=1))
    # skipping 3 at a time, 20 tokens are over after 8: from there on no completion need be cut
    assert all(plan == 1 for _, plan in ends[7:])
    assert any(plan > 1 for _, plan in ends[:7])


@pytest.mark.parametrize("foresight", [False, True])
def test_at_least_never_ends_before_n(foresight):
    guide = guide_of(Oracle())
    ends = generate(guide, [AtLeast(n, foresight=foresight) for n in range(1, 201)], sample=True, limit=400)
    assert all(length >= n for n, (length, _) in enumerate(ends, start=1))


def test_foresight_keeps_the_plan_ahead_of_the_minimum():
    """Without it the text has nothing left to say long before 100 tokens; with it never before 90."""
    used_up = {}
    for foresight in (False, True):
        guide = guide_of(Oracle())
        guide.start(AtLeast(100, foresight=foresight))
        ids = torch.full((1, 1), PROMPT)
        plans = [PLAN]
        for _ in range(90):
            token = guide(ids, policy_scores(plans[-1:])).argmax(1)
            ids = torch.cat([ids, token[:, None]], 1)
            plans.append(after(plans[-1], int(token)))
        used_up[foresight] = sum(plan == 1 for plan in plans)
    assert used_up[False] > 50
    assert used_up[True] == 0


def test_a_band_is_kept_on_both_sides():
    guide = guide_of(Oracle())
    controls = [AtLeast(n) & AtMost(n + 3) for n in range(1, 150)]
    for n, (length, _) in enumerate(generate(guide, controls, sample=True), start=1):
        assert n <= length <= n + 3


def test_a_blind_critic_still_keeps_the_hard_promises():
    class Blind(Oracle):
        def score(self, slots, candidates, wanted):
            return torch.zeros(candidates.shape)

    controls = [make(n) for n in range(1, 80) for make in (AtMost, AtLeast, LengthTarget)]
    guide = guide_of(Blind())
    lengths = [length for length, _ in generate(guide, controls, sample=True)]
    for control, length in zip(controls, lengths, strict=True):
        assert length >= control.n if isinstance(control, AtLeast) else length <= control.n
    exact = [LengthTarget(n) & AtLeast(n) for n in range(1, 80)]
    assert [length for length, _ in generate(guide, exact, sample=True)] == list(range(1, 80))
