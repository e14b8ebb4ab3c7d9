import pytest
import torch
from torch.testing import assert_close

from lenvm_rl.decoding import LengthGuide, LengthTilt, RemainingLengthStream
from lenvm_rl.length import logit_to_remaining


def test_the_stream_is_what_the_critic_says_of_every_state(policy, critic, tokenizer, prompts):
    seen = []
    stream = RemainingLengthStream(critic, tokenizer, on_step=lambda step, left: seen.append((step, left.tolist())))
    torch.manual_seed(0)
    output = policy.generate(
        input_ids=prompts.input_ids,
        attention_mask=prompts.attention_mask,
        max_new_tokens=20,
        do_sample=True,
        top_k=0,
        logits_processor=[stream.start(prompts.attention_mask)],
    )
    width = prompts.input_ids.size(1)
    steps = output.size(1) - width
    assert stream.remaining.shape == (4, steps)
    assert [step for step, _ in seen] == list(range(steps))
    completions = output[:, width:].tolist()
    assert any(1 in row[:-1] for row in completions), "no row ends before the others: the test shows too little"
    for row, completion in enumerate(completions):
        length = completion.index(1) + 1 if 1 in completion else steps
        tokens = prompts.input_ids[row][prompts.attention_mask[row].bool()].tolist()
        with torch.no_grad():
            logits = critic(input_ids=torch.tensor([tokens + completion])).logits[0, len(tokens) - 1 :]
        states = min(length, steps)
        expected = logit_to_remaining(logits, 0.9)[:states]
        assert_close(stream.remaining[row, :states], expected, atol=1e-3, rtol=1e-4)
        if length < steps:
            assert stream.remaining[row, length] == 0
            assert stream.remaining[row, length + 1 :].isnan().all()


def test_the_stream_changes_no_completion_and_stands_beside_a_guide(policy, critic, tokenizer, prompts):
    guide = LengthGuide(critic, tokenizer)
    stream = RemainingLengthStream(critic, tokenizer)
    options = {
        "input_ids": prompts.input_ids,
        "attention_mask": prompts.attention_mask,
        "controls": LengthTilt(-2.0),
        "max_new_tokens": 12,
    }
    torch.manual_seed(0)
    alone = guide.generate(policy, **options)
    torch.manual_seed(0)
    both = guide.generate(policy, **options, logits_processor=[stream.start(prompts.attention_mask)])
    assert torch.equal(alone, both)
    assert stream.remaining.size(0) == 4


def test_a_stream_must_be_started_and_fed(critic, tokenizer, prompts):
    stream = RemainingLengthStream(critic, tokenizer)
    with pytest.raises(ValueError, match="start"):
        stream(prompts.input_ids, torch.zeros(4, len(tokenizer)))
    with pytest.raises(ValueError, match="nothing has been generated"):
        stream.start().remaining  # noqa: B018
