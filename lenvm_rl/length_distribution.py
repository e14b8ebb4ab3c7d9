"""How long a completion may still become, as a distribution: a second head on the hidden states of a frozen LenVM.

1. The value of a LenVM is the mean of a concave function of the length, so the length that it stands for lies below the
   mean (LenVM appendix F), and it has no spread. This head says both, and needs no second backbone.
2. p(l) over bins whose edges grow geometrically, since a length is known to a factor rather than to a token. Below some
   twenty tokens a bin is a single length. The last bin is open: all that is longer than the longest length seen.
3. Trained by cross-entropy on the states of finished completions; of a cut completion it is only known that more than
   what was seen remains, and the loss is -log P(l > seen).
4. Stored as ``length_distribution.safetensors`` in the folder of the critic, whose other files stay as they are.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lenvm_rl.atomic_file import atomic_file

__all__ = ["FILE", "LengthDistribution", "LengthForecast", "length_edges"]

FILE = "length_distribution.safetensors"


class LengthForecast(NamedTuple):
    """What is said of the remaining length of N states."""

    mean: Tensor
    """(N,) tokens. A lower bound as far as the open last bin has mass: that counts as its lower edge."""
    quantiles: Tensor
    """(N, Q) tokens."""


def length_edges(longest: int, bins: int) -> Tensor:
    """Integer edges of bins: bin k holds the lengths from edge k up to, but without, edge k + 1; the last is open.

    Args:
        longest: the longest length that is told from longer ones.
        bins: at most this many, the open one included.

    Returns:
        (K,) int64 lower edges from 0 to longest + 1, growing by one at first and geometrically later.

    Raises:
        ValueError: fewer than three bins, or no length to tell apart.
    """
    if bins < 3 or longest < 1:
        raise ValueError(f"A distribution needs at least three bins and a length of one token, got {bins}, {longest}.")
    if longest + 2 <= bins:
        return torch.arange(longest + 2)
    low, high = 1e-9, 10.0
    for _ in range(100):  # the ratio at which the edges, a token apart at least, reach the end with the last bin
        ratio = (low + high) / 2
        low, high = (ratio, high) if _edges(ratio, longest, bins)[-1] <= longest else (low, ratio)
    return torch.tensor([e for e in _edges(high, longest, bins) if e <= longest] + [longest + 1])


def _edges(ratio: float, longest: int, bins: int) -> list[int]:
    edges = [0]
    while len(edges) < bins and edges[-1] <= longest:
        edges.append(max(edges[-1] + 1, round(edges[-1] * (1 + ratio))))
    return edges


class LengthDistribution(nn.Module):
    """Linear(H, H) -> SiLU -> Linear(H, K): log-probabilities of the bins, in float32.

    Args:
        hidden_size: width of the critic.
        edges: (K,) lower edges of the bins, of `length_edges`.

    A fresh head gives every bin the same probability.
    """

    def __init__(self, hidden_size: int, edges: Tensor) -> None:
        super().__init__()
        self.edges: Tensor
        self.register_buffer("edges", edges)
        self.fc = nn.Linear(hidden_size, hidden_size)
        self.summary = nn.Linear(hidden_size, len(edges))
        nn.init.zeros_(self.summary.weight)
        nn.init.zeros_(self.summary.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., H) hidden states after the critic's final norm -> (..., K) log-probabilities."""
        return torch.log_softmax(self.summary(F.silu(self.fc(hidden.float()))), -1)

    def loss(self, log_p: Tensor, remaining: Tensor, known: Tensor) -> Tensor:
        """-log p of what was seen: (N,).

        Args:
            log_p: (N, K).
            remaining: (N,) tokens that followed.
            known: (N,) bool: nothing else followed; otherwise the completion was cut, and more did.
        """
        own = self.bin_of(remaining)
        exact = log_p.gather(-1, own[:, None]).squeeze(-1)
        # the bin of what was seen may hold longer ones as well, and then all of it counts
        longer = torch.cat([self.edges[1:] > remaining[:, None] + 1, torch.ones_like(known[:, None])], -1)
        censored = log_p.masked_fill(~longer, -torch.inf).logsumexp(-1)
        return -torch.where(known, exact, censored)

    def bin_of(self, remaining: Tensor) -> Tensor:
        """Number of the bin that holds each length, same shape."""
        return torch.bucketize(remaining, self.edges, right=True) - 1

    def forecast(self, log_p: Tensor, levels: Tensor) -> LengthForecast:
        """Mean and quantiles.

        Args:
            log_p: (N, K).
            levels: (Q,) in (0, 1). Within a bin all lengths count as equally likely; the open bin as its lower edge.
        """
        p = log_p.double().exp()
        last = self.edges[-1:].double()
        upper = torch.cat([self.edges[1:].double() - 1, last])  # largest length of each bin
        mean = (p * (self.edges.double() + upper) / 2).sum(-1)
        below = torch.cat([torch.zeros_like(p[:, :1]), p.cumsum(-1)[:, :-1]], -1)
        wanted = levels.to(p).expand(len(p), -1).contiguous()
        bins = torch.searchsorted(p.cumsum(-1).contiguous(), wanted).clamp(max=len(self.edges) - 1)
        share = ((wanted - below.gather(1, bins)) / p.gather(1, bins).clamp(min=1e-300)).clamp(0, 1)
        lengths = (upper - self.edges.double() + 1)[bins]
        within = torch.minimum((share * lengths).ceil() - 1, lengths - 1).clamp(min=0)
        return LengthForecast(mean, self.edges.double()[bins] + within)

    def save(self, folder: str | Path) -> Path:
        """Write the head beside its critic; a reader sees the old file or the new one."""
        path = Path(folder) / FILE
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        metadata = {"lenvm_rl": json.dumps({"kind": "length distribution", "version": 1})}
        with atomic_file(path) as file:
            file.write(save(tensors, metadata))
        return path

    @classmethod
    def load(cls, folder: str | Path) -> "LengthDistribution":
        """The head in a critic's folder.

        Raises:
            FileNotFoundError: there is none.
            ValueError: a file that is none.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} holds no {FILE}: fit one with python recipes/evaluate.py predict --distribution {folder}."
            )
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        try:
            head = cls(tensors["fc.weight"].shape[1], tensors["edges"])
            head.load_state_dict(tensors)
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{path} is no head of a length distribution: {error}") from None
        return head.eval()
