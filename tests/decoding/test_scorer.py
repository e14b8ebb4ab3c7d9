import pytest
import torch
from torch.testing import assert_close

from lenvm_rl.decoding import CachedCritic
from lenvm_rl.model import LengthValueModel

SEQUENCES = [[5, 9, 17], [30, 31, 32, 33, 34, 35], [7], [40, 41, 42, 43]]


def plain(critic, sequence):
    """z after the last token, computed from scratch."""
    with torch.no_grad():
        return critic(input_ids=torch.tensor([sequence])).logits[0, -1].item()


def opened(critic, sequences=SEQUENCES, **kwargs):
    scorer = CachedCritic(critic, **kwargs)
    for slot, tokens in enumerate(sequences):
        scorer.open(slot, tokens)
    return scorer


def all_wanted(candidates):
    return torch.ones_like(candidates, dtype=torch.bool)


def draw(rows, width, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(120, generator=generator)[:width] + 2 for _ in range(rows)])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_score_is_that_of_the_whole_sequence_read_at_once(critic_folder, attention):
    critic = LengthValueModel.from_pretrained(critic_folder, attn_implementation=attention).eval()
    scorer = opened(critic)
    sequences = [list(tokens) for tokens in SEQUENCES]
    for step in range(8):
        # some rows sit out, so that they have tokens to catch up later
        slots = [slot for slot in range(4) if (step + slot) % 3 != 0 or step == 7]
        candidates = draw(len(slots), 5, step)
        scores = scorer.score(slots, candidates, all_wanted(candidates))
        expected = [
            [plain(critic, [*sequences[slot], token]) for token in row]
            for slot, row in zip(slots, candidates.tolist(), strict=True)
        ]
        assert_close(scores, torch.tensor(expected), atol=2e-5, rtol=1e-5)
        for slot in range(4):
            # a candidate in even steps, something that was never scored in odd ones
            token = candidates[slots.index(slot), step % 5].item() if slot in slots and step % 2 == 0 else 100 + step
            sequences[slot].append(token)
            scorer.append([slot], [token])
    assert [scorer.sequences[slot] for slot in range(4)] == sequences


def test_a_chosen_candidate_is_not_computed_again(critic):
    scorer = opened(critic)
    candidates = draw(4, 5, 0)
    for step in range(3):
        scorer.score(range(4), candidates, all_wanted(candidates))
        scorer.append(range(4), candidates[:, step].tolist())
    prompts = 4 * 6  # padded to the longest
    assert (scorer.forwards, scorer.tokens) == (1 + 3, prompts + 3 * 4 * 5)


def test_tokens_that_nobody_asked_about_are_caught_up_in_one_forward(critic):
    scorer = opened(critic)
    candidates = draw(4, 5, 0)
    scorer.score(range(4), candidates, all_wanted(candidates))
    before = scorer.forwards
    for token in (50, 51, 52):
        scorer.append(range(4), [token] * 4)
    assert scorer.forwards == before
    scores = scorer.score(range(4), candidates, all_wanted(candidates))
    assert scorer.forwards == before + 1
    expected = plain(critic, [*SEQUENCES[1], 50, 51, 52, int(candidates[1, 2])])
    assert_close(scores[1, 2].item(), expected, atol=2e-5, rtol=1e-5)


def test_shuffling_candidates_changes_nothing_bit_for_bit(critic):
    candidates = draw(4, 7, 3)
    scores = opened(critic).score(range(4), candidates, all_wanted(candidates))
    for seed in range(5):
        order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
        shuffled = opened(critic).score(range(4), candidates[:, order], all_wanted(candidates))
        assert torch.equal(shuffled, scores[:, order])


def test_asking_for_sequences_in_another_order_changes_nothing_bit_for_bit(critic):
    candidates = draw(4, 7, 3)
    scores = opened(critic).score(range(4), candidates, all_wanted(candidates))
    for order in ([3, 1, 0, 2], [2, 3, 1, 0]):
        shuffled = opened(critic).score(order, candidates[order], all_wanted(candidates))
        assert torch.equal(shuffled, scores[order])


def test_a_score_does_not_depend_on_the_other_candidates_or_sequences(critic):
    candidates = draw(4, 6, 1)
    scores = opened(critic).score(range(4), candidates, all_wanted(candidates))
    others = candidates.clone()
    others[:, 1:] = draw(4, 5, 99)
    with_others = opened(critic).score(range(4), others, all_wanted(others))
    assert_close(with_others[:, 0], scores[:, 0], atol=1e-5, rtol=1e-6)
    alone = opened(critic).score([2], candidates[2:3, :1], torch.ones(1, 1, dtype=torch.bool))
    assert_close(alone[0, 0], scores[2, 0], atol=1e-5, rtol=1e-6)


def test_what_is_not_wanted_is_not_scored(critic):
    candidates = draw(4, 5, 2)
    wanted = torch.ones(4, 5, dtype=torch.bool)
    wanted[:, 3], wanted[1] = False, False
    scorer = opened(critic)
    scores = scorer.score(range(4), candidates, wanted)
    assert scorer.tokens == 4 * 6 + 4 * 4
    full = opened(critic).score(range(4), candidates, all_wanted(candidates))
    assert_close(scores[wanted], full[wanted], atol=1e-5, rtol=1e-6)


def test_a_closed_slot_can_be_used_again(critic):
    scorer = opened(critic)
    candidates = draw(4, 5, 0)
    scorer.score(range(4), candidates, all_wanted(candidates))
    scorer.close(1)
    scorer.open(1, [60, 61])
    scores = scorer.score(range(4), candidates, all_wanted(candidates))
    assert_close(scores[1, 0].item(), plain(critic, [60, 61, int(candidates[1, 0])]), atol=2e-5, rtol=1e-5)
    assert_close(scores[0, 0].item(), plain(critic, [*SEQUENCES[0], int(candidates[0, 0])]), atol=2e-5, rtol=1e-5)


def test_prompts_are_read_within_the_token_budget(critic):
    scorer = opened(critic, token_budget=8)
    states = scorer.predict(range(4))
    assert scorer.forwards == 3  # 6, then 4 and 3 padded to 8, then 1
    assert_close(states, torch.tensor([plain(critic, tokens) for tokens in SEQUENCES]), atol=2e-5, rtol=1e-5)


def test_predicting_after_a_scored_candidate_costs_nothing(critic):
    scorer = opened(critic)
    candidates = draw(4, 5, 0)
    scores = scorer.score(range(4), candidates, all_wanted(candidates))
    scorer.append(range(4), candidates[:, 2].tolist())
    before = scorer.forwards
    assert torch.equal(scorer.predict(range(4)), scores[:, 2])
    assert scorer.forwards == before


def test_a_long_generation_outgrows_the_first_storage(critic):
    scorer = opened(critic, [[5, 6], [7, 8, 9]])
    sequences = [[5, 6], [7, 8, 9]]
    for step in range(150):
        token = 10 + step % 90
        candidates = torch.tensor([[token, 3], [token, 4]])
        scores = scorer.score([0, 1], candidates, all_wanted(candidates))
        for tokens in sequences:
            tokens.append(token)
        scorer.append([0, 1], [token, token])
    assert_close(scores[1, 0].item(), plain(critic, sequences[1]), atol=5e-5, rtol=1e-5)


def test_a_sequence_beyond_the_critics_positions_is_refused(critic):
    scorer = opened(critic, [[5] * 512])
    candidates = torch.tensor([[3, 4]])
    with pytest.raises(ValueError, match="512 positions"):
        scorer.score([0], candidates, all_wanted(candidates))


def test_a_token_that_the_critic_does_not_know_is_refused(critic):
    scorer = opened(critic)
    candidates = torch.tensor([[3, 5000]])
    with pytest.raises(ValueError, match="5,000 is a candidate"):
        scorer.score([0], candidates, all_wanted(candidates))


def test_a_backbone_that_ignores_the_mask_is_refused(critic_folder, monkeypatch):
    critic = LengthValueModel.from_pretrained(critic_folder)
    forward = critic.model.forward
    monkeypatch.setattr(critic.model, "forward", lambda attention_mask=None, **kwargs: forward(**kwargs))
    with pytest.raises(ValueError, match="does not follow the attention mask"):
        CachedCritic(critic)


def test_an_attention_that_takes_no_mask_is_refused(critic_folder):
    critic = LengthValueModel.from_pretrained(critic_folder)
    critic.config.backbone_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        CachedCritic(critic)


def test_layers_with_a_recurrent_state_are_refused(critic_folder):
    critic = LengthValueModel.from_pretrained(critic_folder)
    critic.config.backbone_config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match="linear_attention"):
        CachedCritic(critic)


def test_a_sliding_window_is_kept_to(critic_folder):
    critic = LengthValueModel.from_pretrained(critic_folder)
    critic.config.backbone_config.layer_types = ["full_attention", "sliding_attention"]
    critic.config.backbone_config.sliding_window = 6
    scorer = opened(critic, [[5, 6, 7, 8, 9, 10]])
    scorer.predict([0])
    with pytest.raises(ValueError, match="sliding window of 6"):
        scorer.score([0], torch.tensor([[3, 4]]), torch.ones(1, 2, dtype=torch.bool))
