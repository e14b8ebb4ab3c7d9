"""The adapter on batches made by hand: vLLM itself is not needed, and was not run."""

from enum import Enum, auto
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from lenvm_rl.decoding import (
    AtLeast,
    AtMost,
    LengthGuide,
    LengthTarget,
    LengthTilt,
    SoftTarget,
    VLLMLengthProcessor,
    control_from_arguments,
)


class Direction(Enum):
    UNIDIRECTIONAL = auto()
    SWAP = auto()


def sampling(extra_args=None, **options):
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    return SimpleNamespace(extra_args=extra_args, **{**neutral, **options})


def update(size, added=(), removed=(), moved=()):
    return SimpleNamespace(batch_size=size, added=list(added), removed=list(removed), moved=list(moved))


@pytest.fixture
def processor(critic_folder):
    config = SimpleNamespace(
        additional_config={"length_guide": {"critic": critic_folder, "num_candidates": 5, "top_p": 0.95}},
        model_config=SimpleNamespace(tokenizer=critic_folder),
    )
    return VLLMLengthProcessor(config, torch.device("cpu"), False)


def expected(critic, tokenizer, control, prompt, output, scores):
    """The same step by the guide of transformers."""
    guide = LengthGuide(critic, tokenizer, top_p=0.95).start(control)
    for length in range(len(output) + 1):
        result = guide(torch.tensor([[*prompt, *output[:length]]]), scores)
    return result


def draw(rows, tokenizer, seed):
    return torch.randn(rows, len(tokenizer), generator=torch.Generator().manual_seed(seed))


def test_rows_follow_their_requests_through_every_change_of_the_batch(processor, critic, tokenizer):
    prompts = [[5, 9, 17], [30, 31, 32, 33], [7, 8], [50, 51]]
    arguments = [{"length_tilt": -3.0}, None, {"length_at_most": 9, "length_tilt": 2.0}, {"length_target": 12}]
    outputs: list[list[int]] = [[], [], [], []]
    controls = [control_from_arguments(a) for a in arguments]

    def check(order, seed):
        scores = draw(len(order), tokenizer, seed)
        result = processor.apply(scores.clone())
        for row, request in enumerate(order):
            if controls[request] is None:
                assert torch.equal(result[row], scores[row])
            else:
                own = expected(
                    critic, tokenizer, controls[request], prompts[request], outputs[request], scores[row : row + 1]
                )
                assert_close(result[row : row + 1], own, atol=1e-4, rtol=1e-5)

    def generate(*requests):
        for request in requests:
            outputs[request].append(20 + request + len(outputs[request]))

    def added(index, request):
        return index, sampling(arguments[request]), prompts[request], outputs[request]

    processor.update_state(update(3, added=[added(0, 0), added(1, 1), added(2, 2)]))
    check([0, 1, 2], 0)
    generate(0, 1, 2)
    processor.update_state(None)
    check([0, 1, 2], 1)
    generate(0, 1, 2)
    # the first request ends and the last one takes its place
    processor.update_state(update(2, removed=[0], moved=[(2, 0, Direction.UNIDIRECTIONAL)]))
    check([2, 1], 2)
    generate(1, 2)
    processor.update_state(update(3, added=[added(2, 3)], moved=[(0, 1, Direction.SWAP)]))
    check([1, 2, 3], 3)
    generate(1, 2, 3)
    processor.update_state(update(3, moved=[(1, 2, Direction.SWAP)]))
    check([1, 3, 2], 6)
    processor.update_state(update(3, moved=[(2, 1, Direction.SWAP)]))
    check([1, 2, 3], 7)
    # a new request replaces one that was never reported as removed
    outputs[0], prompts[0] = [], [60, 61, 62]
    processor.update_state(update(3, added=[added(1, 0)]))
    check([1, 0, 3], 4)
    processor.update_state(update(1, removed=[1, 2]))
    check([1], 5)
    assert not processor.scorer.sequences


def test_a_resumed_request_brings_its_output_along(processor, critic, tokenizer):
    prompt, output = [5, 9, 17], [20, 21, 22]
    processor.update_state(update(1, added=[(0, sampling({"length_target": 9}), prompt, output)]))
    scores = draw(1, tokenizer, 0)
    result = processor.apply(scores.clone())
    assert_close(result, expected(critic, tokenizer, LengthTarget(9), prompt, output, scores), atol=1e-4, rtol=1e-5)


def test_budgets_are_kept(processor, tokenizer):
    output: list[int] = []
    processor.update_state(update(1, added=[(0, sampling({"length_at_most": 3}), [5, 6], output)]))
    processor.apply(draw(1, tokenizer, 0))
    output += [20, 21]
    assert processor.apply(draw(1, tokenizer, 1)).argmax(1).item() == tokenizer.eos_token_id


def test_arguments_name_controls():
    assert control_from_arguments(None) is None
    assert control_from_arguments({"other": 3}) is None
    assert control_from_arguments({"length_tilt": -2.0}) == LengthTilt(-2.0)
    assert control_from_arguments({"length_soft_target": 30}) == SoftTarget(30)
    both = control_from_arguments({"length_at_most": 40, "length_at_least": 20})
    assert both == AtLeast(20) & AtMost(40)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length_budget": 3}, "unknown argument 'length_budget'"),
        ({"length_at_least": 50, "length_at_most": 20}, "contradict"),
        ({"length_tilt": float("inf")}, "finite"),
        ({"length_target": 0}, "at least 1 token"),
    ],
)
def test_bad_arguments_are_refused_when_the_request_arrives(arguments, message):
    with pytest.raises(ValueError, match=message):
        VLLMLengthProcessor.validate_params(sampling(arguments))


@pytest.mark.parametrize(
    "options", [{"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.1}, {"repetition_penalty": 1.1}]
)
def test_sampling_that_would_bend_the_guided_distribution_is_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        VLLMLengthProcessor.validate_params(sampling({"length_tilt": -1.0}, **options))
    VLLMLengthProcessor.validate_params(sampling(None, **options))


def test_greedy_requests_are_guided_too(processor):
    VLLMLengthProcessor.validate_params(sampling({"length_tilt": -1.0}, temperature=0.0, top_k=-1))
    assert not processor.is_argmax_invariant()


def test_tokens_that_are_not_yet_known_are_refused(processor, tokenizer):
    output: list[int] = []
    processor.update_state(update(1, added=[(0, sampling({"length_tilt": 1.0}), [5], output)]))
    output.append(-1)
    with pytest.raises(ValueError, match="async_scheduling=False"):
        processor.apply(draw(1, tokenizer, 0))


def test_the_engines_settings_are_checked(critic_folder):
    def build(settings):
        config = SimpleNamespace(
            additional_config={"length_guide": settings}, model_config=SimpleNamespace(tokenizer=critic_folder)
        )
        return VLLMLengthProcessor(config, torch.device("cpu"), False)

    with pytest.raises(ValueError, match="no critic"):
        build({})
    with pytest.raises(ValueError, match="unknown setting 'candidates'"):
        build({"critic": critic_folder, "candidates": 5})
    with pytest.raises(ValueError, match="at least 1"):
        build({"critic": critic_folder, "num_candidates": 0})
