"""Critics that learn during the run: online, on refresh, and as a head on the policy."""

import pytest
import torch
from accelerate import Accelerator
from torch import tensor
from torch.testing import assert_close

from lenvm_rl.model import LengthValueModel
from lenvm_rl.trainers.grpo import LenVMGRPOTrainer
from lenvm_rl.trainers.learning_critic import OnlineCritic, fit, own_shares
from lenvm_rl.trainers.side_model import SideModel


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class PerState(torch.nn.Module):
    """A critic of a table: one logit for each state of each row."""

    def __init__(self, rows, states):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(rows, states))

    def forward(self, rows):
        return self.logits[rows]


def test_a_fit_reaches_the_returns_where_the_mask_is_one():
    side = SideModel(PerState(3, 2), Accelerator(cpu=True), learning_rate=0.1)
    mask, targets = (
        tensor([[True, True], [True, False], [True, True]]),
        tensor([[-0.2, -0.1], [-0.7, 9.0], [-0.4, -0.3]]),
    )
    losses = [
        fit(side, lambda rows: side(rows=rows), mask, targets, [2, 2, 2], steps=3, token_budget=4) for _ in range(60)
    ]
    values = -torch.sigmoid(side.model.logits)
    assert_close(values[mask], targets[mask], atol=5e-3, rtol=0)
    assert side.model.logits[1, 1] == 0  # nobody asked about this state
    first = ((0.3**2 + 0.4**2) + 0.2**2 + (0.1**2 + 0.2**2)) / 5
    assert losses[0] < 1.5 * first and losses[-1] < 1e-4


def test_the_first_loss_is_the_mean_over_all_tokens():
    side = SideModel(PerState(2, 2), Accelerator(cpu=True), learning_rate=0.1)
    mask, targets = tensor([[True, True], [True, False]]), tensor([[-0.2, -0.1], [-0.7, 0.0]])
    loss = fit(side, lambda rows: side(rows=rows), mask, targets, [2, 2], steps=1, token_budget=2)
    assert loss == pytest.approx((0.3**2 + 0.4**2 + 0.2**2) / 3)


def test_rollouts_without_a_token_teach_nothing():
    side = SideModel(PerState(2, 2), Accelerator(cpu=True), learning_rate=0.1)
    nothing = torch.zeros(2, 2, dtype=torch.bool)
    assert fit(side, lambda rows: side(rows=rows), nothing, torch.zeros(2, 2), [2, 2], steps=2, token_budget=8) == 0.0
    assert side.steps == 0


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_the_rows_that_one_would_take(processes):
    # two generation batches of six rows; one process holds them in order, several hold their part of each
    whole = own_shares(4, 12, 2, 1, 0, seed=7)
    each = 6 // processes
    found = [[] for _ in range(4)]
    for process in range(processes):
        for step, rows in enumerate(own_shares(4, 2 * each, 2, processes, process, seed=7)):
            for row in rows:
                batch, own = divmod(row, each)
                found[step].append(batch * 6 + process * each + own)
    assert [sorted(rows) for rows in found] == [sorted(rows) for rows in whole]
    assert sorted(row for rows in found for row in rows) == list(range(12))


def test_an_online_critic_learns_what_the_policy_does_now(train, critic_folder):
    options = {
        "length_critic": critic_folder,
        "max_steps": 8,
        "learning_rate": 1e-6,
    }
    online = train(length_critic_update="online", length_critic_steps=8, length_critic_learning_rate=1e-2, **options)
    frozen = train(**options)
    late = [sum(logged(trainer, "length/explained_variance")[4:]) / 4 for trainer in (online, frozen)]
    assert late[0] > late[1] + 0.1  # nothing can be explained of a random policy, but a wrong mean is unlearned


def test_a_batch_is_judged_before_it_is_learned_from(train, critic_folder):
    frozen, online = (
        train(length_critic=critic_folder, max_steps=1),
        train(length_critic=critic_folder, length_critic_update="online", max_steps=1),
    )
    assert logged(online, "length/explained_variance") == logged(frozen, "length/explained_variance")
    for ours, theirs in zip(online.model.parameters(), frozen.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_refresh_waits_until_the_critic_explains_too_little(train, critic_folder):
    content = train(length_critic=critic_folder, length_critic_update="refresh", length_critic_refresh_below=-100.0)
    assert isinstance(content.length_critic, OnlineCritic) and content.length_critic.side.steps == 0
    needy = train(
        length_critic=critic_folder,
        length_critic_update="refresh",
        length_critic_refresh_below=1.0,
        length_critic_refresh_window=2,
        length_critic_steps=3,
        max_steps=3,
    )
    assert needy.length_critic.side.steps == 3 * (1 + 2 + 2)  # batches at hand: one, then two


@pytest.mark.parametrize("critic", ["online", "shared"])
def test_cut_completions_are_learned_from_although_the_loss_leaves_them_out(train, critic_folder, critic):
    options = {"length_critic_update": "online"} if critic == "online" else {}
    options |= {"length_critic": "shared" if critic == "shared" else critic_folder, "max_steps": 1}

    class Learning(LenVMGRPOTrainer):
        def _use_advantages(self, rollouts, advantages, mask):
            super()._use_advantages(rollouts, advantages, mask)
            learn = self.length_critic.learn

            def watched(batch, mask, targets, explained_variance):
                self.learned = batch, mask, targets, rollouts.generated
                return learn(batch, mask, targets, explained_variance)

            self.length_critic.learn = watched

    hidden, plain = (train(Learning, mask_truncated_completions=m, **options) for m in (True, False))
    assert (hidden.learned[3] == 12).any()  # the limit cut some
    for ours, theirs in zip(hidden.learned[1:], plain.learned[1:], strict=True):
        assert_close(ours, theirs)
    assert hidden.learned[1].sum(1).tolist() == hidden.learned[3].tolist()


def test_a_critic_that_is_no_head_of_the_policy_has_no_part_in_its_loss(train, critic_folder):
    with pytest.raises(ValueError, match="the critic is a model of its own: set length_critic='shared'"):
        train(length_critic=critic_folder, length_backbone_coef=0.1)


def test_no_gradient_of_the_head_reaches_the_policy(train):
    # a coefficient of 0 leaves the policy what plain GRPO makes of it, although the head learns
    measuring, plain = train(length_critic="shared", length_coef=0.0), train(length_coef=0.0)
    assert measuring.length_critic.side.steps > 0
    for ours, theirs in zip(measuring.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_error_of_the_head_joins_the_loss_of_the_policy_where_it_has_a_weight(train):
    options = {"length_critic": "shared", "length_coef": 0.0, "length_critic_steps": 1, "max_steps": 2}
    # a head that hardly moves says -1/2 when the completions are judged and when the policy learns
    still = options | {"length_critic_learning_rate": 1e-12}
    without, within = train(**still), train(**still, length_backbone_coef=0.5)
    error = logged(without, "length/critic_loss")[0]
    assert error > 0.01
    assert logged(within, "loss")[0] == pytest.approx(logged(without, "loss")[0] + 0.5 * error, abs=2e-6)
    # one that says something of the states moves the policy
    without, within = (train(**options, length_critic_learning_rate=0.1, length_backbone_coef=c) for c in (0.0, 5.0))
    assert logged(within, "grad_norm")[0] != pytest.approx(logged(without, "grad_norm")[0], rel=0.01)
    assert logged(within, "length/critic_loss")[0] == logged(without, "length/critic_loss")[0]


@pytest.mark.parametrize(
    "options",
    [
        {"length_critic_update": "online"},
        {"length_critic_update": "refresh", "length_critic_refresh_below": 1.0, "length_critic_refresh_window": 3},
        {"length_critic": "shared", "length_backbone_coef": 0.1},
    ],
    ids=["online", "refresh", "shared"],
)
def test_a_resumed_run_is_the_run_that_was_not_interrupted(train, critic_folder, tmp_path, options):
    options = {"length_critic": critic_folder, "max_steps": 4, "save_strategy": "steps", "save_steps": 2} | options
    whole = train(**options)
    expected = [weight.clone() for weight in (*whole.model.parameters(), *whole.length_critic.side.model.parameters())]
    resumed = train(**options, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    found = (*resumed.model.parameters(), *resumed.length_critic.side.model.parameters())
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_the_critic_that_learned_is_saved_as_a_model(train, critic_folder, tmp_path):
    trainer = train(length_critic=critic_folder, length_critic_update="online")
    assert trainer.save_length_critic(tmp_path / "critic")
    loaded = LengthValueModel.from_pretrained(tmp_path / "critic")
    for ours, theirs in zip(loaded.parameters(), trainer.length_critic.side.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert loaded.config.gamma == trainer.length_critic.gamma


def test_a_shared_critic_is_saved_with_the_policy_under_it(train, tokenizer, tmp_path):
    trainer = train(length_critic="shared")
    torch.nn.init.normal_(trainer.length_critic.side.model.summary.weight)
    assert trainer.save_length_critic(tmp_path / "critic")
    loaded = LengthValueModel.from_pretrained(tmp_path / "critic")
    ids = tokenizer("3 + 7 =", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = trainer.model.get_decoder()(input_ids=ids).last_hidden_state
        assert_close(loaded(ids).logits, trainer.length_critic.side(hidden=hidden))


def test_a_frozen_critic_is_not_saved_again(train, critic_folder, tmp_path):
    assert not train(length_critic=critic_folder, max_steps=1).save_length_critic(tmp_path / "critic")
    assert not (tmp_path / "critic").exists()
