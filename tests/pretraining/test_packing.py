import copy
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import AutoModel, LlamaConfig, MambaConfig, Qwen3Config

from lenvm_rl.model import LengthValueModel
from lenvm_rl.pretraining.data import LengthValueCollator
from lenvm_rl.pretraining.packing import (
    PackingCollator,
    SimilarLengthsSampler,
    attention_by_document,
    attention_width,
    pack,
    packing_layout,
)

SIZES = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 97}
BACKBONES = {
    "the embedded policy": LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=1),
    "SmolLM2": LlamaConfig(
        **SIZES, num_attention_heads=3, num_key_value_heads=1, rope_theta=100_000.0, tie_word_embeddings=True
    ),
    "Qwen3": Qwen3Config(**SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=16),
    "Qwen3 with a window": Qwen3Config(
        **SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=16, use_sliding_window=True, sliding_window=3,
        max_window_layers=0,
    ),
}  # fmt: skip


def rollout(prompt, completion, finished=True, seed=0):
    ids = np.random.default_rng((seed, prompt, completion)).integers(2, 97, prompt + completion)
    return {"prompt_ids": ids[:prompt], "completion_ids": ids[prompt:], "finished": finished}


ROLLOUTS = [rollout(3, 9), rollout(1, 4), rollout(2, 5, finished=False), rollout(6, 1), rollout(4, 12), rollout(1, 1)]


def by_label(labels, numbers):
    """Numbers of all states with a label, completion by completion, sorted: what is there, wherever it lies."""
    rows = [(label.item(), number.item()) for label, number in zip(labels.flatten(), numbers.flatten(), strict=True)]
    return sorted(pair for pair in rows if pair[0] != -100)


LAYOUTS = [("sdpa", "rows"), ("sdpa", "one row"), ("sdpa", "documents"), ("eager", "rows"), ("eager", "one row")]


@pytest.mark.parametrize("attention, layout", LAYOUTS)
@pytest.mark.parametrize("name", BACKBONES)
def test_packed_rollouts_get_the_logits_that_they_get_alone(name, layout, attention):
    if layout == "documents" and "window" in name:
        pytest.skip("needs a mask")
    torch.manual_seed(0)
    backbone = AutoModel.from_config(copy.deepcopy(BACKBONES[name]), attn_implementation=attention)
    model = LengthValueModel.from_backbone(backbone, 0.9).eval()
    torch.nn.init.normal_(model.v_head.summary.weight)
    packed = PackingCollator(0, layout)(ROLLOUTS)
    labels = packed.pop("labels")
    with torch.no_grad():
        with attention_by_document(model.model) if layout == "documents" else nullcontext():
            together = model(**packed).logits
        alone = []
        for one in ROLLOUTS:
            batch = LengthValueCollator(0)([one])
            alone += by_label(batch["labels"], model(batch["input_ids"]).logits)
    found, expected = by_label(labels, together), sorted(alone)
    assert [label for label, _ in found] == [label for label, _ in expected]
    assert_close(torch.tensor([z for _, z in found]), torch.tensor([z for _, z in expected]), rtol=0, atol=1e-5)
    assert together.std() > 0.1


def test_a_row_is_a_sequence_of_whole_rollouts():
    collate = PackingCollator(0, "rows", attention_width=1)  # wide rows cost much
    packed = collate([rollout(2, 3), rollout(1, 1), rollout(1, 5), rollout(1, 1)])
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 0], [0, 1, 0, 1, 0, 1]]
    assert packed["labels"].tolist() == [
        [5, 4, 3, 2, 1, 0],
        [-100, 3, 2, 1, 0, -100],
        [1, 0, 1, 0, -100, -100],
    ]
    assert packed["input_ids"].dtype == packed["labels"].dtype == packed["position_ids"].dtype == torch.int64
    one = PackingCollator(0, "one row")([rollout(2, 3), rollout(1, 1)])
    assert one["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1]]
    assert one["labels"].tolist() == [[-100, 3, 2, 1, 0, 1, 0]]


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


@given(LENGTHS, st.sampled_from([1.0, 50.0, 1e3, math.inf]))
@settings(max_examples=100, deadline=None)
def test_every_rollout_is_packed_once_and_never_costs_more_than_padded(lengths, width):
    rows = pack(lengths, attention_width=width)
    assert sorted(member for row in rows for member in row) == list(range(len(lengths)))
    assert all(rows)
    widest = max(sum(lengths[member] for member in row) for row in rows)
    padded = len(lengths) * max(lengths) * (1 + max(lengths) / width)
    assert len(rows) * widest * (1 + widest / width) <= padded + 1e-9


def test_rows_are_as_wide_as_attention_is_cheap():
    lengths = np.random.default_rng(0).integers(60, 200, 64).tolist()

    def shape(width):
        rows = pack(lengths, attention_width=width)
        return len(rows), max(sum(lengths[member] for member in row) for row in rows)

    assert shape(math.inf) == (1, sum(lengths))
    assert shape(1.0)[1] < 1.5 * max(lengths)
    count, width = shape(3_000.0)
    assert 4 < count < 64 and count * width < 1.07 * sum(lengths)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_can_be_packed(name, dtype, monkeypatch):
    torch.manual_seed(0)
    backbone = AutoModel.from_config(copy.deepcopy(BACKBONES[name])).to(dtype).train()
    assert packing_layout(backbone) == "rows"  # as narrow as these are
    monkeypatch.setattr("lenvm_rl.pretraining.packing.WIDE", 1)
    assert packing_layout(backbone) == ("rows" if "window" in name else "documents")
    assert backbone.training and backbone.config._attn_implementation == "sdpa"
    backbone.config._attn_implementation = "eager"
    assert packing_layout(backbone) == "rows"


def test_attention_by_document_needs_to_know_the_documents():
    backbone = AutoModel.from_config(copy.deepcopy(BACKBONES["Qwen3"]))
    with attention_by_document(backbone), pytest.raises(ValueError, match="takes one row, with position ids"):
        backbone(input_ids=torch.ones(2, 3, dtype=torch.long))
    assert backbone.config._attn_implementation == "sdpa"


def test_the_width_of_rows_follows_the_shape_of_the_backbone():
    # 12 H^2 weights in a layer of a classical transformer: as many operations as attention over 6 H columns, which take
    # twice as long
    config = LlamaConfig(
        vocab_size=9, hidden_size=64, intermediate_size=512 // 3 + 1, num_hidden_layers=3, num_attention_heads=4
    )
    assert attention_width(AutoModel.from_config(config)) == pytest.approx(3 * 64, rel=0.03)


def test_a_recurrent_state_cannot_be_packed():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=8)
    assert packing_layout(AutoModel.from_config(config)) is None


def test_flash_attention_takes_one_row():
    backbone = AutoModel.from_config(copy.deepcopy(BACKBONES["Qwen3"]))
    backbone.config._attn_implementation_internal = "flash_attention_2"
    assert packing_layout(backbone) == "one row"


def test_an_optimizer_step_is_random_and_sorted_by_length():
    lengths = np.random.default_rng(0).integers(1, 100, 64)
    sampler = SimilarLengthsSampler(lengths, step=16, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(64)) and len(sampler) == 64
    steps = [order[start : start + 16] for start in range(0, 64, 16)]
    assert all(list(lengths[step]) == sorted(lengths[step], reverse=True) for step in steps)
    padding = sum(max(lengths[order[i : i + 4]]) for i in range(0, 64, 4)) * 4 / lengths.sum()
    assert padding < 1.2  # 1.8 in random order
    # the steps themselves are as random as without sorting
    assert np.std([lengths[step].mean() for step in steps]) < 15


def test_each_epoch_has_an_order_of_its_own_that_comes_again():
    lengths = np.arange(1, 33)
    one, two = SimilarLengthsSampler(lengths, 8, seed=3), SimilarLengthsSampler(lengths, 8, seed=3)
    first = list(one)
    one.set_epoch(1)
    two.set_epoch(1)
    assert list(one) == list(two) != first
