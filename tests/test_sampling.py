from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from lenvm_rl.sampling import (
    Completion,
    SamplingSettings,
    end_token_ids,
    prompt_token_ids,
    sample_completions,
    sample_texts,
)
from lenvm_rl.tasks.arithmetic import build_tokenizer

PAD, EOS, TURN = 0, 1, 9
PROMPTS = [[20, 21], [30], [40, 41, 42], [50, 51], [60]]


class ScriptedModel(nn.Module):
    """Continues each prompt as it is told, whatever the padding, and remembers the calls of `generate`."""

    device = torch.device("cpu")

    def __init__(self, script, ends=EOS):
        super().__init__()
        self.script, self.calls = script, []
        self.generation_config = GenerationConfig(eos_token_id=ends)

    def generate(self, input_ids, attention_mask, generation_config):
        self.calls.append((input_ids.tolist(), attention_mask.tolist(), generation_config, self.training))
        continued = [
            self.script[tuple(row[keep].tolist())] for row, keep in zip(input_ids, attention_mask.bool(), strict=True)
        ]
        width = max(map(len, continued))  # as transformers does: all rows end together, the rest is padding
        tails = [tail + [generation_config.pad_token_id] * (width - len(tail)) for tail in continued]
        return torch.cat([input_ids, torch.tensor(tails)], dim=1)


@pytest.fixture(scope="module")
def policy(policy_folder):
    return AutoModelForCausalLM.from_pretrained(policy_folder)


def scripted(continuations, ends=EOS):
    return ScriptedModel({tuple(p): c for p, c in zip(PROMPTS, continuations, strict=False)}, ends)


def test_a_completion_is_finished_by_an_end_token_and_cut_at_the_limit(tokenizer):
    model = scripted([[7, 8, EOS], [7, 8, 7, 8], [EOS]])
    completions = sample_completions(model, tokenizer, PROMPTS[:3], SamplingSettings(4))
    assert completions == [
        Completion([7, 8, EOS], finished=True),
        Completion([7, 8, 7, 8], finished=False),
        Completion([EOS], finished=True),
    ]


def test_a_finish_reason_is_that_of_a_server():
    assert [Completion([7], finished=finished).finish_reason for finished in (True, False)] == ["stop", "length"]


def test_every_end_token_of_the_model_and_of_the_tokenizer_ends_a_completion(tokenizer):
    model = scripted([[7, TURN], [7, 8, EOS], [7, 8, 3, 4]], ends=[TURN, 3])
    completions = sample_completions(model, tokenizer, PROMPTS[:3], SamplingSettings(4))
    assert [completion.ids for completion in completions] == [[7, TURN], [7, 8, EOS], [7, 8, 3]]
    assert all(completion.finished for completion in completions)
    assert model.calls[0][2].eos_token_id == [EOS, TURN, 3]


@pytest.mark.parametrize(
    "declared, of_tokenizer, expected",
    [
        (None, 1, [1]),
        (1, 1, [1]),
        (9, 1, [1, 9]),
        ([9, 1], 1, [9, 1]),
        ([9, 3], 1, [1, 9, 3]),
        (9, None, [9]),
    ],
)
def test_end_tokens_are_those_of_the_model_with_the_tokenizers(declared, of_tokenizer, expected):
    tokenizer = SimpleNamespace(eos_token_id=of_tokenizer)
    assert end_token_ids(scripted([], ends=declared), tokenizer) == expected


def test_without_any_end_token_there_is_nothing_to_wait_for():
    with pytest.raises(ValueError, match="so no completion could ever finish"):
        end_token_ids(scripted([], ends=None), SimpleNamespace(eos_token_id=None))


def test_the_end_token_pads_where_there_is_no_padding_token():
    model = scripted([[7, 8, EOS], [EOS]])
    tokenizer = SimpleNamespace(pad_token_id=None, eos_token_id=EOS)
    completions = sample_completions(model, tokenizer, PROMPTS[:2], SamplingSettings(4))
    assert [completion.ids for completion in completions] == [[7, 8, EOS], [EOS]]
    assert model.calls[0][:2] == ([[20, 21], [EOS, 30]], [[1, 1], [0, 1]])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_completions_come_in_the_order_of_the_prompts_whatever_the_batch_size(tokenizer, batch_size):
    continuations = [[7] * n + [EOS] for n in range(5)]
    model, made = scripted(continuations), []
    completions = sample_completions(
        model,
        tokenizer,
        PROMPTS,
        SamplingSettings(8),
        batch_size=batch_size,
        on_batch=lambda completions, tokens: made.append((completions, tokens)),
    )
    assert [completion.ids for completion in completions] == continuations
    assert len(model.calls) == -(-5 // batch_size)
    # all five completions and their 1 + 2 + 3 + 4 + 5 tokens were reported
    assert sum(count for count, _ in made) == 5 and sum(tokens for _, tokens in made) == 15


def test_prompts_are_padded_on_the_left(tokenizer):
    model = scripted([[EOS]] * 3)
    sample_completions(model, tokenizer, PROMPTS[:3], SamplingSettings(4))
    ids, mask, _, _ = model.calls[0]
    assert ids == [[PAD, 20, 21], [PAD, PAD, 30], [40, 41, 42]]
    assert mask == [[0, 1, 1], [0, 0, 1], [1, 1, 1]]


def test_no_prompts_give_no_completions(tokenizer):
    assert sample_completions(scripted([]), tokenizer, [], SamplingSettings(4)) == []


def test_an_empty_prompt_is_refused(tokenizer):
    with pytest.raises(ValueError, match="prompt 1 has no tokens: there is nothing to complete"):
        sample_completions(scripted([]), tokenizer, [[20], []], SamplingSettings(4))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_samples_in_evaluation_mode_and_gets_its_own_mode_back(tokenizer, training):
    model = scripted([[EOS]]).train(training)
    sample_completions(model, tokenizer, PROMPTS[:1], SamplingSettings(4))
    assert not model.calls[0][3] and model.training == training
    with pytest.raises(KeyError):  # the script knows no such prompt: generate fails
        sample_completions(model, tokenizer, [[99]], SamplingSettings(4))
    assert model.training == training


def test_the_same_random_state_gives_the_same_completions(policy, tokenizer, problems):
    ids = prompt_token_ids(tokenizer, problems["prompt"])

    def sample(seed):
        torch.manual_seed(seed)
        return sample_completions(policy, tokenizer, ids, SamplingSettings(12))

    assert sample(0) == sample(0)
    assert sample(0) != sample(1)


def test_a_real_policy_finishes_some_completions_and_is_cut_in_others(policy, tokenizer, problems):
    torch.manual_seed(0)
    ids = prompt_token_ids(tokenizer, problems["prompt"])
    completions = sample_completions(policy, tokenizer, ids, SamplingSettings(12), batch_size=5)
    assert 0 < sum(completion.finished for completion in completions) < 16
    for completion in completions:
        assert 1 <= len(completion.ids) <= 12
        assert completion.ids.count(EOS) == completion.finished
        assert (completion.ids[-1] == EOS) if completion.finished else len(completion.ids) == 12


def test_a_nearly_greedy_policy_says_the_same_whatever_the_batch_size(policy, tokenizer, problems):
    ids = prompt_token_ids(tokenizer, problems["prompt"])
    greedy = SamplingSettings(8, top_p=1e-6)
    together = sample_completions(policy, tokenizer, ids, greedy)
    assert sample_completions(policy, tokenizer, ids, greedy, batch_size=3) == together
    alone = policy.generate(torch.tensor([ids[4]]), max_new_tokens=8, do_sample=False)[0, len(ids[4]) :].tolist()
    assert together[4].ids == alone


def test_settings_stored_with_the_model_do_not_bend_the_distribution(policy_folder, tokenizer, problems):
    # Qwen2.5-Instruct, for one, stores temperature 0.7, top-k 20 and a repetition penalty; TRL's rollouts ignore all
    ids = prompt_token_ids(tokenizer, problems["prompt"])

    def sample(**stored):
        policy = AutoModelForCausalLM.from_pretrained(policy_folder)
        policy.generation_config.update(**stored)
        torch.manual_seed(0)
        return sample_completions(policy, tokenizer, ids, SamplingSettings(12))

    plain = sample()
    assert sample(do_sample=True, temperature=0.1, top_k=1, top_p=0.1) == plain
    assert sample(repetition_penalty=3.0) == plain


def test_prompts_are_tokenised_as_trl_does(problems):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] }} . {% endfor %}"
        "{% if add_generation_prompt %}99 ={% endif %}"
    )
    plain = problems["prompt"][:3]
    assert prompt_token_ids(tokenizer, plain) == tokenizer(text=plain)["input_ids"]
    conversations = [[{"role": "system", "content": "77"}, {"role": "user", "content": text}] for text in plain]
    # the call of trl.GRPOTrainer._tokenize_prompts (1.16)
    expected = tokenizer.apply_chat_template(
        conversation=conversations, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    assert prompt_token_ids(tokenizer, conversations) == expected
    assert tokenizer.decode(expected[0]) == f"77 . {plain[0]} . 99 ="


def test_sampled_texts_hold_no_special_tokens_and_leave_the_random_state_alone(policy, tokenizer, problems):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    prompts, limit = problems["prompt"][:4], SamplingSettings(12)
    texts = sample_texts(policy, tokenizer, prompts, limit)
    assert torch.equal(torch.rand(3), expected)
    assert len(texts) == 4 and "<eos>" not in " ".join(texts)
    assert sample_texts(policy, tokenizer, prompts, limit) == texts
    assert sample_texts(policy, tokenizer, prompts, limit, seed=1) != texts


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0: rollouts are sampled"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"top_p must lie in \(0, 1\], got 1.1"),
    ],
)
def test_a_setting_outside_its_range_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        SamplingSettings(**{"max_new_tokens": 4, **setting})
