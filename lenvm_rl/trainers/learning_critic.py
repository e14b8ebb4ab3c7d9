"""Length critics that learn during the run, each from the lengths of the rollouts that it has just judged.

1. **Online**: a pretrained critic with an optimizer of its own (`side_model.py`), regressed on every batch of rollouts.
2. **Refresh**: the same, on the latest batches, and only while it explains too little of the newest one.
3. **Shared**: a value head on the policy's own hidden states (`hidden_states.py`), which costs no second model and as
   a rule no forward. It learns without gradient to the policy, whose loss may have a weighed part in it.

A batch is judged before it is learned from, so that no advantage is measured against its own return. Targets are
Monte-Carlo returns of the states before each token; the tail of a cut completion has the value that the critic gave it.
"""

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from lenvm_rl.atomic_file import atomic_file
from lenvm_rl.critic import CriticOutput, LengthCritic, before_tokens, micro_batches, without_padding
from lenvm_rl.model import LengthValueModel
from lenvm_rl.trainers.hidden_states import HiddenStates, fresh_head, with_fixed_head
from lenvm_rl.trainers.side_model import SideModel


class LearningCritic(LengthCritic):
    """What critics that learn have in common: a model with an optimizer, whose state goes into checkpoints."""

    side: SideModel

    @abstractmethod
    def learn(self, batch: dict[str, Tensor], mask: Tensor, targets: Tensor, explained_variance: float) -> float:
        """Learn from rollouts that were judged. Collective.

        Args:
            batch: `prompt_ids`, `prompt_mask`, `completion_ids` and `completion_mask`, as for `score`.
            mask: (B, T) bool, the policy's own tokens.
            targets: (B, T) Monte-Carlo returns of the states before each token.
            explained_variance: how well it judged them.

        Returns:
            Mean squared error before each optimizer step; nan where it made none, which TRL leaves out of its averages.
        """

    def save(self, folder: Path, *, writes: bool = True) -> None:
        """Write what a resumed run needs, into a folder of its own. Collective with DeepSpeed."""
        self.side.save(folder, writes=writes)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote. Collective with DeepSpeed."""
        self.side.load(folder)


class OnlineCritic(LearningCritic):
    """A pretrained critic that follows the policy.

    Args:
        model: whole on every process, or loaded under ZeRO-3 initialisation; it is taken over.
        accelerator: the trainer's.
        gamma: its discount.
        token_budget: tokens of one forward, padding included.
        learning_rate: of its AdamW.
        steps: optimizer steps on each batch of rollouts.
        refresh_below: explained variance below which it learns; None learns from every batch.
        window: the latest batches of rollouts, which a refresh learns from.
    """

    def __init__(
        self,
        model: LengthValueModel,
        accelerator: Accelerator,
        *,
        gamma: float,
        token_budget: int,
        learning_rate: float,
        steps: int,
        refresh_below: float | None = None,
        window: int = 1,
    ) -> None:
        super().__init__(model, accelerator, gamma=gamma, token_budget=token_budget)
        self.side = SideModel(
            model.requires_grad_(True), accelerator, learning_rate=learning_rate, name="length critic"
        )
        self.model = self.side  # type: ignore[assignment]
        self.steps, self.refresh_below, self.window = steps, refresh_below, window if refresh_below is not None else 1
        self._recent: list[Judged] = []

    def learn(self, batch: dict[str, Tensor], mask: Tensor, targets: Tensor, explained_variance: float) -> float:
        ids, prompt_lengths, lengths = without_padding(
            batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], batch["completion_mask"]
        )
        self._recent = [*self._recent, Judged(ids, prompt_lengths, lengths, mask, targets)][-self.window :]
        if self.refresh_below is not None and not explained_variance < self.refresh_below:
            return float("nan")
        rows = Judged.joined(self._recent)

        def logits(chosen: list[int]) -> Tensor:
            """(rows, T) head outputs of the states before each token."""
            width = int((rows.prompt_lengths + rows.lengths)[chosen].max())
            states = self.side(input_ids=rows.ids[chosen, :width]).logits
            return before_tokens(states, rows.prompt_lengths[chosen], rows.mask.size(1))

        return fit(
            self.side,
            logits,
            rows.mask,
            rows.targets,
            (rows.prompt_lengths + rows.lengths).tolist(),
            steps=self.steps * len(self._recent),
            token_budget=self.token_budget,
            batches=len(self._recent),
        )

    def save(self, folder: Path, *, writes: bool = True) -> None:
        super().save(folder, writes=writes)
        if self.window > 1:
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(folder / self._recent_file) as file:
                torch.save([rows._asdict() for rows in self._recent], file)

    def load(self, folder: Path) -> None:
        super().load(folder)
        if self.window > 1:
            # gloo's device, "cpu:0", is none that tensors are loaded to
            saved = torch.load(folder / self._recent_file, map_location="cpu", weights_only=True)
            device = self.accelerator.device
            self._recent = [Judged(**{name: rows[name].to(device) for name in Judged._fields}) for rows in saved]

    @property
    def _recent_file(self) -> str:
        return f"recent_rollouts_{self.accelerator.process_index}.pt"

    def save_pretrained(self, path: str | Path) -> None:
        """Write the critic as it is now. Collective; the main process writes."""
        self.side.save_pretrained(path)


class Judged(NamedTuple):
    """Rollouts with what each of their states was worth."""

    ids: Tensor
    """(B, S), padded on the right."""
    prompt_lengths: Tensor
    """(B,)"""
    lengths: Tensor
    """(B,)"""
    mask: Tensor
    """(B, T)"""
    targets: Tensor
    """(B, T)"""

    @staticmethod
    def joined(batches: "list[Judged]") -> "Judged":
        """One batch of all rows, as wide as the widest."""
        if len(batches) == 1:
            return batches[0]
        columns = []
        for tensors in zip(*batches, strict=True):
            width = max(tensor.size(-1) for tensor in tensors)
            columns.append(torch.cat([pad(x, (0, width - x.size(-1))) if x.ndim == 2 else x for x in tensors]))
        return Judged(*columns)


class SharedCritic(LearningCritic):
    """A value head on the policy's hidden states.

    Args:
        hidden_states: of the policy.
        hidden_size: of these.
        accelerator: the trainer's.
        gamma: discount.
        token_budget: tokens of one forward while it learns.
        learning_rate: of the head's AdamW.
        steps: optimizer steps on each batch of rollouts.
    """

    def __init__(
        self,
        hidden_states: HiddenStates,
        hidden_size: int,
        accelerator: Accelerator,
        *,
        gamma: float,
        token_budget: int,
        learning_rate: float,
        steps: int,
    ) -> None:
        head = fresh_head(hidden_size)  # V = -1/2 everywhere, where its gradient is largest
        super().__init__(head, accelerator, gamma=gamma, token_budget=token_budget)
        self.side = SideModel(
            head.requires_grad_(True), accelerator, learning_rate=learning_rate, replicate=True, name="length head"
        )
        self.hidden_states, self.steps = hidden_states, steps
        self._states = torch.empty(0)

    @torch.no_grad()
    def score(
        self, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor, finished: Tensor
    ) -> CriticOutput:
        batch = {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask}
        batch |= {"completion_ids": completion_ids, "completion_mask": completion_mask}
        self._states = self.hidden_states.of(batch, cut=~finished)
        values = -torch.sigmoid(self.side(hidden=self._states).float())
        lengths = completion_mask.sum(1, keepdim=True)
        after_last = values.gather(1, lengths).squeeze(1)
        offsets = torch.arange(completion_ids.size(1), device=values.device)
        return CriticOutput(values[:, :-1].masked_fill(offsets >= lengths, 0.0), after_last.masked_fill(finished, 0.0))

    def learn(self, batch: dict[str, Tensor], mask: Tensor, targets: Tensor, explained_variance: float) -> float:
        states, lengths = self._states, batch["completion_mask"].sum(1).clamp(min=1).tolist()

        def logits(chosen: list[int]) -> Tensor:
            """(rows, T) head outputs, 0 where all of these rows have ended."""
            width = max(lengths[row] for row in chosen)
            return pad(self.side(hidden=states[chosen, :width]), (0, mask.size(1) - width))

        loss = fit(self.side, logits, mask, targets, lengths, steps=self.steps, token_budget=self.token_budget)
        self._states = torch.empty(0)
        return loss

    def values_for_policy(self, states: Tensor) -> Tensor:
        """(B, T) values of (B, T, H) hidden states, with gradient to these alone."""
        return -torch.sigmoid(with_fixed_head(self.side.model, states).float())

    def as_model(self, policy: PreTrainedModel, tokenizer: Any) -> LengthValueModel:
        """A Length Value Model of its own: the policy's decoder, whole and copied, under the head.

        Args:
            policy: what `whole_policy` gives.
            tokenizer: of the policy.

        Raises:
            ValueError: a policy with adapters, or in parts.
        """
        model = LengthValueModel.from_backbone(policy, self.gamma, tokenizer=tokenizer)
        model.v_head.load_state_dict(self.side.model.state_dict())
        return model


def fit(
    side: SideModel,
    logits: Callable[[list[int]], Tensor],
    mask: Tensor,
    targets: Tensor,
    lengths: list[int],
    *,
    steps: int,
    token_budget: int,
    batches: int = 1,
) -> float:
    """Regress a critic on rollouts: token means over all processes, as many optimizer steps as they are shared out to.

    Args:
        side: the critic.
        logits: (n, T) head outputs of these rows, with gradient.
        mask: (B, T) bool, the policy's own tokens.
        targets: (B, T) values.
        lengths: tokens of a forward of each row, padding included.
        steps: optimizer steps; the same on all processes.
        token_budget: tokens of one forward.
        batches: generation batches that the rows are of, one after the other.

    Returns:
        Mean squared error of the tokens of each step, before it; over steps, their mean.
    """
    accelerator = side.accelerator
    # seeded by the updates so far: a resumed run draws what the uninterrupted one drew, and all launches draw the same
    shares = own_shares(
        steps, len(lengths), batches, accelerator.num_processes, accelerator.process_index, seed=side.steps
    )
    whole = torch.zeros((), dtype=torch.float64, device=mask.device)
    side.train()
    for chosen in shares:
        parts = [
            [chosen[row] for row in batch] for batch in micro_batches([lengths[row] for row in chosen], token_budget)
        ]
        counts = torch.tensor([float(mask[chosen].sum()), float(len(parts))], device=mask.device, dtype=torch.float64)
        gathered = accelerator.gather(counts[None])
        tokens, turns = gathered[:, 0].sum().item(), int(gathered[:, 1].max())
        if not tokens:
            continue
        for turn in range(turns):
            # a process that is done, or has no rows, keeps in step with one that counts for nothing
            part = parts[turn] if turn < len(parts) else [0]
            errors = (-torch.sigmoid(logits(part).float()) - targets[part]).square()
            counted = mask[part] if turn < len(parts) else torch.zeros_like(mask[part])
            loss = torch.where(counted, errors, 0.0).sum() / tokens
            side.backward(loss, last=turn + 1 == turns)
            whole += loss.detach() / steps
        side.step()
    side.eval()
    return float(accelerator.reduce(whole, reduction="sum"))


def own_shares(steps: int, rows: int, batches: int, processes: int, process: int, *, seed: int) -> list[list[int]]:
    """This process's rows in each optimizer step: the rows of all processes, shuffled and dealt out.

    Args:
        steps: to deal to.
        rows: of this process; all have as many.
        batches: generation batches, of which each process holds its own rows one after the other.
        processes, process: how many there are, and which one this is.
        seed: of the shuffle; the same on all processes.
    """
    each = rows // batches
    order = torch.randperm(rows * processes, generator=torch.Generator().manual_seed(seed)).tolist()
    shares = []
    for step in range(steps):
        share = []
        for number in order[step::steps]:
            batch, row = divmod(number, each * processes)
            owner, own = divmod(row, each)
            if owner == process:
                share.append(batch * each + own)
        shares.append(share)
    return shares
