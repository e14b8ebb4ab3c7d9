import itertools
import math

import pytest
import torch
from torch import tensor

from lenvm_rl.length_distribution import FILE, LengthDistribution, length_edges


def head_of(edges):
    torch.manual_seed(0)
    return LengthDistribution(4, tensor(edges))


def test_edges_grow_by_one_at_first_and_geometrically_later():
    assert length_edges(3, 20).tolist() == [0, 1, 2, 3, 4]
    edges = length_edges(4096, 64).tolist()
    assert edges[:13] == list(range(13)) and edges[-1] == 4097 and len(edges) <= 64
    steps = [b - a for a, b in itertools.pairwise(edges)]
    assert steps == sorted(steps)
    assert max(b / a for a, b in itertools.pairwise(edges[20:])) < 1.15
    with pytest.raises(ValueError, match="at least three bins"):
        length_edges(10, 2)


def test_a_length_belongs_to_the_bin_that_starts_at_or_below_it():
    head = head_of([0, 1, 4, 10])
    assert head.bin_of(tensor([0, 1, 3, 4, 9, 10, 99])).tolist() == [0, 1, 1, 2, 2, 3, 3]


def test_a_cut_completion_only_says_that_more_remained():
    head = head_of([0, 1, 4, 10])
    log_p = tensor([[0.1, 0.2, 0.3, 0.4]]).log().expand(5, -1)
    remaining, known = tensor([2, 2, 0, 3, 10]), tensor([True, False, False, False, False])
    # 2 known: its bin. More than 2: 3 is in the same bin, so .2 + .3 + .4. More than 0: without the first.
    # More than 3: the bin 1..3 is ruled out. More than 10: the open bin.
    assert head.loss(log_p, remaining, known).tolist() == pytest.approx(
        [-math.log(0.2), -math.log(0.9), -math.log(0.9), -math.log(0.7), -math.log(0.4)]
    )


def test_mean_and_quantiles_of_a_known_distribution():
    head = head_of([0, 1, 4, 10])
    log_p = tensor([[0.1, 0.6, 0.2, 0.1], [0.0, 1.0, 0.0, 0.0]]).log()
    forecast = head.forecast(log_p, tensor([0.05, 0.4, 0.7, 0.8, 0.99]))
    # lengths 0 (.1), 1 2 3 (.2 each), 4 to 9 (.2 / 6 each), 10 and more (.1)
    assert forecast.mean.tolist() == pytest.approx([0.6 * 2 + 0.2 * 6.5 + 0.1 * 10, 2.0])
    assert forecast.quantiles[0].tolist() == [0, 2, 3, 6, 10]
    assert forecast.quantiles[1].tolist() == [1, 2, 3, 3, 3]


def test_a_fresh_head_gives_every_bin_the_same_probability():
    log_p = head_of([0, 1, 4, 10])(torch.randn(3, 4))
    assert log_p.exp().flatten().tolist() == pytest.approx([0.25] * 12)


def test_a_saved_head_says_the_same(tmp_path):
    head = head_of([0, 1, 4, 10])
    torch.nn.init.normal_(head.summary.weight)
    assert head.save(tmp_path) == tmp_path / FILE
    hidden = torch.randn(3, 4)
    loaded = LengthDistribution.load(tmp_path)
    assert torch.equal(loaded(hidden), head(hidden)) and torch.equal(loaded.edges, head.edges)


def test_a_missing_or_foreign_file_is_said_to_be_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no length_distribution"):
        LengthDistribution.load(tmp_path)
    from safetensors.torch import save_file

    save_file({"edges": tensor([0, 1, 2])}, str(tmp_path / FILE))
    with pytest.raises(ValueError, match="no head of a length distribution"):
        LengthDistribution.load(tmp_path)
