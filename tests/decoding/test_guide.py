import math
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoTokenizer, GenerationConfig

from lenvm_rl.decoding import (
    AtLeast,
    AtMost,
    LengthGuide,
    LengthTarget,
    LengthTilt,
    SoftTarget,
    guided_completions,
)
from lenvm_rl.model import LengthValueModel
from lenvm_rl.sampling import SamplingSettings, sample_completions

TRUNCATIONS = [
    {},
    {"temperature": 0.7},
    {"top_k": 20},
    {"top_k": -1},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"temperature": 1.3, "top_k": 30, "top_p": 0.8, "min_p": 0.01},
]


def base_scores(policy, prompts):
    with torch.no_grad():
        return policy(**prompts).logits[:, -1].float()


def lengths_of(output, prompt_width, end=1):
    return [row.index(end) + 1 if end in row else len(row) for row in output[:, prompt_width:].tolist()]


def stock(policy, prompts, seed, **options):
    torch.manual_seed(seed)
    config = GenerationConfig(
        max_new_tokens=24,
        do_sample=True,
        eos_token_id=1,
        pad_token_id=0,
        **{"temperature": 1.0, "top_k": 0, "top_p": 1.0, **options},
    )
    return policy.generate(**prompts, generation_config=config)


@pytest.mark.parametrize("settings", TRUNCATIONS)
@pytest.mark.parametrize("control", [None, LengthTilt(0.0), LengthTilt(0)])
def test_no_control_and_a_tilt_of_zero_are_exactly_the_base_distribution(
    policy, critic, tokenizer, prompts, settings, control
):
    guide = LengthGuide(critic, tokenizer, **settings)
    torch.manual_seed(3)
    ours = guide.generate(policy, **without_types(prompts), controls=control, max_new_tokens=24)
    options = {key: 0 if value == -1 else value for key, value in settings.items()}
    assert torch.equal(ours, stock(policy, without_types(prompts), 3, **options))
    assert guide.scorer.forwards == 0


def without_types(prompts):
    return {"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask}


def test_scores_come_back_untouched_where_nothing_is_to_be_done(policy, critic, tokenizer, prompts):
    guide = LengthGuide(critic, tokenizer).start(None, prompts.attention_mask)
    scores = base_scores(policy, without_types(prompts))
    assert guide(prompts.input_ids, scores) is scores


def test_one_batch_holds_requests_of_every_kind(policy, critic, tokenizer, prompts):
    controls = [LengthTilt(-3.0), None, AtMost(5) & AtLeast(3), LengthTarget(9)]
    guide = LengthGuide(critic, tokenizer, top_p=0.9).start(controls, prompts.attention_mask)
    scores = base_scores(policy, without_types(prompts))
    together = guide(prompts.input_ids, scores)
    for row, control in enumerate(controls):
        alone = LengthGuide(critic, tokenizer, top_p=0.9).start(control)
        ids = prompts.input_ids[row : row + 1, prompts.attention_mask[row].bool()]
        assert_close(together[row : row + 1], alone(ids, scores[row : row + 1]), atol=1e-4, rtol=1e-5)
    unguided = LengthGuide(critic, tokenizer, top_p=0.9).start(None, prompts.attention_mask)
    assert torch.equal(together[1], unguided(prompts.input_ids, scores)[1])


def test_a_tilt_is_the_formula_on_the_truncated_distribution(policy, critic, tokenizer, prompts):
    scores = base_scores(policy, without_types(prompts))
    guide = LengthGuide(critic, tokenizer, num_candidates=4, temperature=0.8).start(
        LengthTilt(2.5), prompts.attention_mask
    )
    q = guide(prompts.input_ids, scores).softmax(1)
    for row in range(4):
        tokens = prompts.input_ids[row][prompts.attention_mask[row].bool()].tolist()
        p = (scores[row] / 0.8).softmax(0)
        expected = torch.zeros_like(p)
        for token in p.topk(4).indices.tolist():
            with torch.no_grad():
                z = critic(input_ids=torch.tensor([[*tokens, token]])).logits[0, -1]
            value = 0.0 if token == tokenizer.eos_token_id else torch.sigmoid(z).item()
            expected[token] = p[token] * math.exp(2.5 * value)
        assert_close(q[row], expected / expected.sum(), atol=1e-5, rtol=1e-4)


def test_shuffling_requests_changes_nothing_bit_for_bit(policy, critic, tokenizer, prompts):
    controls = [LengthTilt(-3.0), LengthTilt(2.0), AtMost(12), SoftTarget(9)]

    def follow(order):
        ids, mask = prompts.input_ids[order], prompts.attention_mask[order]
        guide = LengthGuide(critic, tokenizer, num_candidates=7).start([controls[row] for row in order], mask)
        history = []
        for step in range(6):
            # the policy is not what is tested: its scores are drawn per request
            scores = torch.stack(
                [torch.randn(len(tokenizer), generator=torch.Generator().manual_seed(10 * step + row)) for row in order]
            )
            guided = guide(ids, scores)
            history.append(guided)
            ids = torch.cat([ids, guided.argmax(1, keepdim=True)], 1)
        return torch.stack(history)

    reference = follow([0, 1, 2, 3])
    for order in ([3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1]):
        assert torch.equal(follow(order), reference[:, order])


def test_left_padding_changes_no_completion(policy, critic, tokenizer, prompts):
    guide = LengthGuide(critic, tokenizer)
    controls = [LengthTilt(-4.0), LengthTilt(4.0), LengthTarget(10), AtMost(6)]
    options = {"max_new_tokens": 16, "do_sample": False}
    together = guide.generate(policy, **without_types(prompts), controls=controls, **options)
    width = prompts.input_ids.size(1)
    for row in range(4):
        ids = prompts.input_ids[row : row + 1, prompts.attention_mask[row].bool()]
        alone = guide.generate(policy, ids, torch.ones_like(ids), controls[row], **options)
        length = lengths_of(alone, ids.size(1))[0]
        assert together[row, width : width + length].tolist() == alone[0, ids.size(1) :][:length].tolist()


def test_hard_lengths_hold_through_generate(policy, critic, tokenizer, prompts):
    guide = LengthGuide(critic, tokenizer)
    for seed in range(3):
        torch.manual_seed(seed)
        controls = [LengthTarget(7) & AtLeast(7), AtMost(4), AtLeast(12), AtLeast(6) & AtMost(8)]
        output = guide.generate(policy, **without_types(prompts), controls=controls, max_new_tokens=30)
        exact, most, least, band = lengths_of(output, prompts.input_ids.size(1))
        assert exact == 7 and most <= 4 and least >= 12 and 6 <= band <= 8


def test_samples_of_a_prompt_share_its_control(policy, critic, tokenizer, prompts):
    guide = LengthGuide(critic, tokenizer)
    controls = [AtMost(2), AtLeast(10), AtMost(3), AtLeast(12)]
    output = guide.generate(
        policy, **without_types(prompts), controls=controls, max_new_tokens=20, num_return_sequences=3
    )
    lengths = lengths_of(output, prompts.input_ids.size(1))
    assert max(lengths[0:3]) <= 2 and min(lengths[3:6]) >= 10
    assert max(lengths[6:9]) <= 3 and min(lengths[9:12]) >= 12


def test_it_works_as_a_processor_of_a_plain_generate_call(policy, critic, tokenizer, prompts):
    guide = LengthGuide(critic, tokenizer)
    controls = [AtMost(3), None, LengthTilt(-5.0), LengthTarget(6) & AtLeast(6)]
    inputs = without_types(prompts)
    torch.manual_seed(1)
    plain = policy.generate(
        **inputs,
        max_new_tokens=20,
        do_sample=True,
        logits_processor=[guide.start(controls, prompts.attention_mask)],
        **guide.neutral,
    )
    torch.manual_seed(1)
    assert torch.equal(plain, guide.generate(policy, **inputs, controls=controls, max_new_tokens=20))


def test_a_stronger_tilt_is_a_shorter_expectation(policy, critic, tokenizer, prompts):
    scores = base_scores(policy, without_types(prompts))
    means = []
    for beta in (-8.0, -2.0, 2.0, 8.0):
        guide = LengthGuide(critic, tokenizer).start(LengthTilt(beta), prompts.attention_mask)
        q = guide(prompts.input_ids, scores).softmax(1)
        slots, ids = guide._slots, q.topk(5).indices
        z = guide.scorer.score(slots, ids, torch.ones_like(ids, dtype=torch.bool))
        u = torch.sigmoid(z).masked_fill(ids == tokenizer.eos_token_id, 0.0)
        means.append((q.gather(1, ids) * u).sum(1))
    assert all((after > before).all() for before, after in pairwise(means))


def test_below_the_entropy_threshold_the_critic_is_not_called(policy, critic, tokenizer, prompts):
    scores = torch.zeros(4, len(tokenizer))
    scores[0, 7], scores[1, 7] = 20.0, 20.0  # certain
    scores[2, tokenizer.eos_token_id] = 20.0  # certain to end
    controls = [LengthTilt(-2.0), LengthTarget(9), LengthTilt(-2.0), LengthTilt(-2.0)]
    guide = LengthGuide(critic, tokenizer, entropy_threshold=0.5).start(controls, prompts.attention_mask)
    guided = guide(prompts.input_ids, scores)
    assert (guide.steering.steps, guide.steering.asked) == (4, 2)
    assert torch.equal(guided[0], scores[0])
    assert guided[1, tokenizer.eos_token_id] == -math.inf and guided[1].isfinite().sum() == len(tokenizer) - 1
    assert guided[2].isfinite().sum() == 5 and guided[3].isfinite().sum() == 5

    nobody = LengthGuide(critic, tokenizer, entropy_threshold=0.5).start(LengthTilt(-2.0), prompts.attention_mask)
    nobody(prompts.input_ids, scores[:1].repeat(4, 1))
    assert nobody.scorer.forwards == 0


def test_skipped_steps_are_caught_up_and_change_no_later_score(critic, tokenizer, prompts):
    certain = torch.zeros(4, len(tokenizer))
    certain[:, 7] = 20.0
    open_scores = torch.randn(4, len(tokenizer), generator=torch.Generator().manual_seed(0))
    guided = []
    for threshold in (None, 0.5):
        guide = LengthGuide(critic, tokenizer, entropy_threshold=threshold)
        guide.start(LengthTilt(3.0), prompts.attention_mask)
        ids = prompts.input_ids
        for scores in (open_scores, certain, certain, open_scores):
            result = guide(ids, scores)
            ids = torch.cat([ids, torch.full((4, 1), 7)], 1)
        guided.append(result)
    assert_close(guided[1], guided[0], atol=1e-4, rtol=1e-5)


def test_one_candidate_is_taken_without_the_critic(critic, tokenizer, prompts, policy):
    guide = LengthGuide(critic, tokenizer, num_candidates=1).start(LengthTilt(-2.0), prompts.attention_mask)
    scores = base_scores(policy, without_types(prompts))
    guided = guide(prompts.input_ids, scores)
    assert guide.scorer.forwards == 0
    assert torch.equal(guided.argmax(1), scores.argmax(1)) and (guided.isfinite().sum(1) == 1).all()


def test_all_tokens_can_be_candidates(critic, tokenizer, prompts, policy):
    guide = LengthGuide(critic, tokenizer, num_candidates=None, top_k=-1).start(
        LengthTilt(-2.0), prompts.attention_mask
    )
    scores = base_scores(policy, without_types(prompts))
    assert guide(prompts.input_ids, scores).isfinite().all()


def test_finished_rows_are_left_alone(critic, tokenizer, prompts):
    guide = LengthGuide(critic, tokenizer).start(LengthTilt(-2.0), prompts.attention_mask)
    scores = torch.randn(4, len(tokenizer), generator=torch.Generator().manual_seed(0))
    guide(prompts.input_ids, scores)
    ids = torch.cat([prompts.input_ids, torch.tensor([[1], [9], [9], [9]])], 1)
    assert torch.equal(guide(ids, scores)[0], scores[0])
    ids = torch.cat([ids, torch.tensor([[0], [9], [1], [9]])], 1)
    guided = guide(ids, scores)
    assert torch.equal(guided[[0, 2]], scores[[0, 2]])
    assert (guided[[1, 3]].isfinite().sum(1) == 5).all()


def test_a_prompt_that_holds_end_tokens_is_not_finished(critic, tokenizer):
    guide = LengthGuide(critic, tokenizer).start(LengthTilt(-2.0))
    ids = torch.tensor([[1, 20, 1, 30]])
    scores = torch.randn(1, len(tokenizer), generator=torch.Generator().manual_seed(0))
    assert guide(ids, scores).isfinite().sum() == 5
    assert guide.scorer.sequences[0] == [1, 20, 1, 30]


def test_completions_come_in_the_order_of_their_prompts(policy, critic, tokenizer, problems):
    ids = [tokenizer(text).input_ids for text in problems["prompt"]]
    guide = LengthGuide(critic, tokenizer)
    controls = [AtLeast(8) & AtMost(8) if row % 3 else None for row in range(len(ids))]
    completions = guided_completions(policy, guide, ids, controls, max_new_tokens=20, batch_size=5)
    assert all(len(c.ids) == 8 and c.finished for row, c in enumerate(completions) if row % 3)
    torch.manual_seed(0)
    unguided = guided_completions(policy, guide, ids, None, max_new_tokens=20)
    torch.manual_seed(0)
    assert unguided == sample_completions(policy, tokenizer, ids, SamplingSettings(max_new_tokens=20))


def test_the_control_must_fit_the_batch(critic, tokenizer, prompts, policy):
    guide = LengthGuide(critic, tokenizer)
    with pytest.raises(ValueError, match="3 controls for 4 prompts"):
        guide.generate(policy, **without_types(prompts), controls=[None] * 3, max_new_tokens=4)
    with pytest.raises(ValueError, match="control 1 is -2"):
        guide.start([None, -2.0])
    with pytest.raises(ValueError, match="8 controls"):
        guide.generate(policy, **without_types(prompts), controls=[None] * 8, max_new_tokens=4)


def test_a_target_beyond_what_there_is_room_for_is_refused(critic, tokenizer, prompts, policy):
    guide = LengthGuide(critic, tokenizer)
    inputs = without_types(prompts)
    with pytest.raises(ValueError, match="max_new_tokens=20 cuts it before"):
        guide.generate(policy, **inputs, controls=[None, LengthTarget(40), None, None], max_new_tokens=20)
    with pytest.raises(ValueError, match="512 positions"):
        guide.generate(policy, **inputs, controls=LengthTarget(511), max_new_tokens=600)
    with pytest.raises(ValueError, match="512 positions"):
        guide.generate(policy, **inputs, controls=LengthTilt(1.0), max_new_tokens=600)
    guide.start(AtMost(511), prompts.attention_mask)
    with pytest.raises(ValueError, match="512 positions"):
        guide(prompts.input_ids, torch.zeros(4, len(tokenizer)))


def test_a_critic_of_another_tokenizer_is_refused(critic, tokenizer, policy_folder):
    other = AutoTokenizer.from_pretrained(policy_folder)
    other.add_tokens(["<other>"])
    with pytest.raises(ValueError, match="other tokens"):
        LengthGuide(critic, other)
    with pytest.raises(ValueError, match="tokenizer is missing"):
        LengthGuide(critic, end_token_ids=[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_candidates": 0}, "at least 1, got 0"),
        ({"entropy_threshold": -1.0}, "entropy_threshold"),
        ({"temperature": 0.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2.0}, "min_p"),
    ],
)
def test_settings_outside_their_range_are_refused(critic, tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        LengthGuide(critic, tokenizer, **settings)


def test_beams_are_refused(policy, critic, tokenizer, prompts):
    guide = LengthGuide(critic, tokenizer)
    with pytest.raises(ValueError, match="not beams"):
        guide.generate(policy, **without_types(prompts), controls=None, max_new_tokens=4, num_beams=3)
    with pytest.raises(ValueError, match="rows of a beam search"):
        policy.generate(
            **without_types(prompts),
            max_new_tokens=4,
            num_beams=3,
            logits_processor=[guide.start(LengthTilt(-1.0), prompts.attention_mask)],
        )


def test_rows_that_are_no_continuation_are_refused(critic, tokenizer, prompts):
    guide = LengthGuide(critic, tokenizer).start(LengthTilt(-1.0), prompts.attention_mask)
    scores = torch.zeros(4, len(tokenizer))
    guide(prompts.input_ids, scores)
    swapped = torch.cat([prompts.input_ids[[1, 0, 2, 3]], torch.full((4, 1), 9)], 1)
    with pytest.raises(ValueError, match="not those of the step before"):
        guide(swapped, scores)
    with pytest.raises(ValueError, match="not those of the step before"):
        guide(prompts.input_ids, scores)


def test_prompts_must_be_told_from_padding(critic, tokenizer, prompts):
    scores = torch.zeros(4, len(tokenizer))
    with pytest.raises(ValueError, match="without prompt_mask"):
        LengthGuide(critic, tokenizer).start(LengthTilt(-1.0))(prompts.input_ids, scores)
    with pytest.raises(ValueError, match="shape"):
        LengthGuide(critic, tokenizer).start(None, prompts.attention_mask[:3])(prompts.input_ids, scores)
    with pytest.raises(ValueError, match="padded on the right"):
        LengthGuide(critic, tokenizer).start(None, prompts.attention_mask.flip(1))(prompts.input_ids, scores)
    with pytest.raises(ValueError, match="start"):
        LengthGuide(critic, tokenizer)(prompts.input_ids, scores)


def test_sampling_options_belong_to_the_guide(critic, tokenizer, prompts, policy):
    with pytest.raises(ValueError, match="temperature cannot be given here"):
        LengthGuide(critic, tokenizer).generate(
            policy, **without_types(prompts), controls=None, max_new_tokens=4, temperature=0.5
        )


def test_an_end_that_somebody_else_forbids_is_said(critic, tokenizer, prompts):
    guide = LengthGuide(critic, tokenizer).start(AtMost(1), prompts.attention_mask)
    scores = torch.zeros(4, len(tokenizer))
    scores[2, tokenizer.eos_token_id] = -math.inf
    with pytest.raises(ValueError, match="must end request 2 here"):
        guide(prompts.input_ids, scores)
    guide = LengthGuide(critic, tokenizer).start(AtLeast(3), prompts.attention_mask)
    only_end = torch.full((4, len(tokenizer)), -math.inf)
    only_end[:, tokenizer.eos_token_id] = 0.0
    with pytest.raises(ValueError, match="nothing but the end is possible"):
        guide(prompts.input_ids, only_end)


def test_a_broken_critic_is_said(critic_folder, tokenizer, prompts):
    broken = LengthValueModel.from_pretrained(critic_folder)
    broken.v_head.summary.weight.data.fill_(math.nan)
    guide = LengthGuide(broken, tokenizer).start(LengthTilt(1.0), prompts.attention_mask)
    with pytest.raises(ValueError, match="no number"):
        guide(prompts.input_ids, torch.zeros(4, len(tokenizer)))
