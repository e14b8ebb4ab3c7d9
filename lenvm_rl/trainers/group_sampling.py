"""Dynamic sampling: groups that teach nothing are replaced by groups of further prompts (DAPO; DLER, arXiv 2510.15110).

1. A group without a signal is one whose completions all earned the same. With a length signal, one that has a correct
   completion says which of its tokens were superfluous, and stays.
2. A round generates as many new groups on every process as the one that lacks most; each keeps what it lacks.
   Decisions rest on the gathered rewards, so all processes decide alike and make the same collective calls, and no row
   changes process: groups must lie whole on one process.
3. When the rounds are used up, groups of the first round without a signal stay, with advantage 0.
4. The further prompts come from a stream of its own (`PromptStream`), so the prompts of the first rounds are those of a
   run without dynamic sampling.
"""

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lenvm_rl.trainers.normalization import combined_rewards

PADDED_LEFT = ("prompt_ids", "prompt_mask")
ROW_TENSORS = (
    *PADDED_LEFT,
    "completion_ids",
    "completion_mask",
    "advantages",
    "old_per_token_logps",
    "ref_per_token_logps",
    "sampling_per_token_logps",
    "importance_sampling_ratio",
    "tool_mask",
    "length_target",
)
"""What TRL 1.16, and the trainer of this project, put into a batch of text: one row per completion each. Anything else
is refused, not guessed at."""


@dataclass(frozen=True)
class Rollouts:
    """A scored generation batch: this process's rows, and everybody's rewards."""

    batch: dict[str, Any]
    """TRL's tensors, B rows each."""
    rewards: Tensor
    """(processes * B, F) of all processes, in their order. nan where there was none, and where `kept` is 0."""
    generated: Tensor
    """(B,) tokens that were generated, also where `mask_truncated_completions` hides them."""
    kept: Tensor
    """(processes * B,) bool: 0 for groups without a signal that fill up the batch."""


class PromptStream:
    """An endless, seeded sequence of rows of a dataset: one permutation after the other.

    Args:
        size: rows of the dataset.
        seed: of the permutations.

    Guaranteed: the sequence depends on size and seed alone, every row comes once in each `size` draws, and after
    `load_state_dict` of a checkpoint's state the next draw is the one that would have followed. All processes draw the
    same; a run with another number of processes draws the same sequence, but deals it out otherwise.
    Not guaranteed: that a row differs from those of the batch that it completes.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.position = 0
        self._shuffled: tuple[int, list[int]] = (-1, [])

    def draw(self, count: int) -> list[int]:
        """The next `count` rows."""
        rows = [self._row(self.position + offset) for offset in range(count)]
        self.position += count
        return rows

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return {"position": self.position, "size": self.size, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`.

        Raises:
            ValueError: it belongs to another dataset or seed.
        """
        if (state["size"], state["seed"]) != (self.size, self.seed):
            raise ValueError(
                f"The checkpoint's further prompts were drawn from {state['size']} rows with seed {state['seed']}, but "
                f"this run has {self.size} rows and seed {self.seed}: resume with the same dataset and seed."
            )
        self.position = int(state["position"])

    def _row(self, position: int) -> int:
        turn, offset = divmod(position, self.size)
        if turn != self._shuffled[0]:
            # not the seed itself: TRL's sampler begins with that permutation, and the batch would meet its own prompts
            generator = torch.Generator().manual_seed((self.seed * 0x9E3779B1 + turn * 0x85EBCA77 + 1) % 2**32)
            self._shuffled = turn, torch.randperm(self.size, generator=generator).tolist()
        return self._shuffled[1][offset]


def signal_groups(
    rewards: Tensor, weights: Tensor, group_size: int, *, aggregation: str, correct: Tensor | None = None
) -> Tensor:
    """Which groups have something to teach.

    Args:
        rewards: (N, F) of whole groups; nan where a function gave none.
        weights: (F,) of the reward functions.
        group_size: completions per prompt.
        aggregation: TRL's `multi_objective_aggregation`. Under "normalize_then_sum" each function is scaled by itself,
            so one that varies is enough.
        correct: (N,) bool where there is a length signal: a correct completion is then enough.

    Returns:
        (N / group_size,) bool.
    """
    by_function = aggregation == "normalize_then_sum"
    seen = rewards[:, weights != 0] if by_function else combined_rewards(rewards, weights)[:, None]
    groups = seen.reshape(-1, group_size, seen.size(1))
    most = groups.nan_to_num(nan=-torch.inf).amax(dim=1)
    least = groups.nan_to_num(nan=torch.inf).amin(dim=1)
    signal = (most > least).any(dim=1)
    return signal if correct is None else signal | correct.view(-1, group_size).any(dim=1)


class Place(NamedTuple):
    """Where a group was generated."""

    round: int
    group: int
    """Its number among those of its round and process."""
    has_signal: bool


class GroupChoice:
    """Which groups of which round make up the batch of every process; the same object on all of them.

    Args:
        processes: how many there are.
        groups: groups that each process needs.
    """

    def __init__(self, processes: int, groups: int) -> None:
        self.groups = groups
        self._rounds = 0
        self._chosen: list[list[Place]] = [[] for _ in range(processes)]
        self._without_signal: list[list[Place]] = [[] for _ in range(processes)]  # in the first round

    @property
    def kept(self) -> int:
        """Groups with a signal that were chosen, of all processes."""
        return sum(len(chosen) for chosen in self._chosen)

    @property
    def missing(self) -> int:
        """Groups that the process with the fewest still needs."""
        return self.groups - min(len(chosen) for chosen in self._chosen)

    def add_round(self, signal: Tensor) -> None:
        """Take what is needed of another round.

        Args:
            signal: (processes * groups of the round,) bool, of `signal_groups`.
        """
        for process, groups in enumerate(signal.view(len(self._chosen), -1).tolist()):
            chosen = self._chosen[process]
            for group, has_signal in enumerate(groups):
                if has_signal and len(chosen) < self.groups:
                    chosen.append(Place(self._rounds, group, True))
                elif not has_signal and self._rounds == 0:
                    self._without_signal[process].append(Place(0, group, False))
        self._rounds += 1

    def batches(self) -> list[list[Place]]:
        """The groups of each process, round by round; what is missing is made up from the first round."""
        return [
            sorted(chosen + spare[: self.groups - len(chosen)])
            for chosen, spare in zip(self._chosen, self._without_signal, strict=True)
        ]


def refilled(
    first: Rollouts,
    roll_out: Callable[[list[int]], Rollouts],
    signal: Callable[[Rollouts], Tensor],
    prompts: PromptStream,
    *,
    rounds: int,
    processes: int,
    process: int,
    group_size: int,
    pad_token_id: int,
) -> tuple[Rollouts, dict[str, int]]:
    """A batch whose groups all have a signal, as far as so many rounds of further generation reach.

    Args:
        first: the batch as it was generated.
        roll_out: generates and scores a group for each of these rows of the dataset. Collective.
        signal: `signal_groups` of what a round gave.
        prompts: where further rows come from.
        rounds: how many further rounds there may be, at least 1.
        processes, process: how many there are, and which one this is.
        group_size: completions per prompt.
        pad_token_id: of the policy's tokenizer.

    Returns:
        `first` itself if it has no group to replace, else the batch of `merged`; and what to log.
    """
    choice = GroupChoice(processes, len(first.generated) // group_size)
    choice.add_round(signal(first))
    history = [first]
    while choice.missing and len(history) <= rounds:
        groups = choice.missing
        rows = prompts.draw(groups * processes)
        history.append(roll_out(rows[groups * process : groups * (process + 1)]))
        choice.add_round(signal(history[-1]))
    counts = {
        "rounds": len(history),
        "kept_groups": choice.kept,
        "unfilled_groups": choice.groups * processes - choice.kept,
    }
    return first if len(history) == 1 else merged(history, choice, process, group_size, pad_token_id), counts


def merged(
    rounds: Sequence[Rollouts], choice: GroupChoice, process: int, group_size: int, pad_token_id: int
) -> Rollouts:
    """The batch that a choice describes.

    Args:
        rounds: as they were added to the choice.
        choice: of what they hold.
        process: this one's number.
        group_size: completions per prompt.
        pad_token_id: of the policy's tokenizer.

    Returns:
        Rollouts in which groups without a signal have rewards nan and are not `kept`. Two things are left to the
        caller: advantages are those of each round, and `num_items_in_batch`, a sum over processes, is missing.

    Raises:
        ValueError: a batch with tensors that are not one row per completion, such as images.
    """
    batches = choice.batches()
    device, functions = rounds[0].rewards.device, rounds[0].rewards.size(1)
    rewards = []
    for number, places in enumerate(batches):
        for place in places:
            everyone = rounds[place.round].rewards.view(len(batches), -1, group_size, functions)
            group = everyone[number, place.group]
            rewards.append(group if place.has_signal else torch.full_like(group, torch.nan))
    kept = torch.tensor([place.has_signal for places in batches for place in places], device=device)
    rows = [
        [place.group * group_size + k for place in batches[process] if place.round == turn for k in range(group_size)]
        for turn in range(len(rounds))
    ]
    indices = [torch.tensor(numbers, dtype=torch.long, device=device) for numbers in rows]
    return Rollouts(
        batch=merged_rows([rollouts.batch for rollouts in rounds], indices, pad_token_id),
        rewards=torch.cat(rewards),
        generated=torch.cat([rollouts.generated[index] for rollouts, index in zip(rounds, indices, strict=True)]),
        kept=kept.repeat_interleave(group_size),
    )


def merged_rows(batches: Sequence[dict[str, Any]], rows: Sequence[Tensor], pad_token_id: int) -> dict[str, Any]:
    """Rows of several batches as one: prompts padded on the left, completions on the right, to the widest.

    Args:
        batches: TRL's tensors.
        rows: row numbers to take of each batch, in order.
        pad_token_id: for the ids; masks and log-probabilities are padded with 0, tool masks with 1, as TRL does.

    Raises:
        ValueError: a tensor that TRL does not put into a batch of text.
    """
    result: dict[str, Any] = {}
    for name in batches[0]:
        if name == "num_items_in_batch":
            continue
        if name not in ROW_TENSORS:
            raise ValueError(
                f"dynamic_sampling cannot merge the batch's {name!r}, which may not be one row per completion: train "
                "on text without images, or set dynamic_sampling=False."
            )
        parts = [batch[name][index] for batch, index in zip(batches, rows, strict=True)]
        if parts[0].ndim == 2:
            width = max(part.size(1) for part in parts)
            value = pad_token_id if name.endswith("_ids") else int(name == "tool_mask")
            parts = [_padded(part, width, value, left=name in PADDED_LEFT) for part in parts]
        result[name] = torch.cat(parts)
    return result


def _padded(rows: Tensor, width: int, value: int, *, left: bool) -> Tensor:
    more = width - rows.size(1)
    return torch.nn.functional.pad(rows, (more, 0) if left else (0, more), value=value)


@contextmanager
def unlogged(metrics: MutableMapping[str, list[float]], table: dict[str, Any]) -> Iterator[None]:
    """Leave TRL's metrics and its table of completions as they are; only the count of tokens goes on.

    Args:
        metrics: `trainer._metrics["train"]`.
        table: `trainer._logs`: deques, and dicts of deques that make their entries themselves.
    """
    before = {name: list(values) for name, values in metrics.items()}
    columns = {
        name: {key: rows.copy() for key, rows in column.items()} if isinstance(column, dict) else column.copy()
        for name, column in table.items()
    }
    yield
    before["num_tokens"] = metrics["num_tokens"]
    metrics.clear()
    metrics.update(before)
    for name, column in columns.items():
        if isinstance(column, dict):
            table[name].clear()
            table[name].update(column)
        else:
            table[name] = column
