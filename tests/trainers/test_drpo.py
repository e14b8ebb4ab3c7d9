import math

import pytest
import torch
from torch import tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from lenvm_rl.assets import model_path
from lenvm_rl.tasks import load_task
from lenvm_rl.trainers.drpo import DRPOConfig, DRPOTrainer, drpo_loss

INF = float("inf")


def history(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def batch_of(scores, lengths):
    """Log-probabilities of completions with these mean token log-probabilities, and their mask."""
    mask = torch.arange(max(lengths)) < tensor(lengths)[:, None]
    return (tensor(scores)[:, None] * mask).requires_grad_(), mask


def loss_of(scores, lengths, correct, *, old=None, scored=None, **settings):
    logps, mask = batch_of(scores, lengths)
    correct = tensor(correct, dtype=torch.bool)
    scored = torch.ones_like(correct) if scored is None else tensor(scored, dtype=torch.bool)
    result = drpo_loss(logps, logps.detach() if old is None else old, mask, correct, scored, **settings)
    (gradient,) = torch.autograd.grad(result.loss, logps)
    return result, gradient


def test_the_objective_by_hand():
    # C = 10, lambda = 0.1: brevity 0.8 and 0.7, weights e/(1+e) = 0.7311 and 0.2689
    # J = 0.7311 * -1 + 0.2689 * -2 - log((exp(-1) + exp(-3)) / 2) = -1.2689 + 1.5662
    result, _ = loss_of([-1.0, -2, -1, -3], [2, 3, 4, 9], [1, 1, 0, 0], group_size=4, max_tokens=10, lam=0.1, tau=1.0)
    assert_close(result.loss, tensor(-0.2973), atol=1e-4, rtol=0)
    assert_close(result.objective, -result.loss.detach())
    assert (result.kl.item(), result.skipped_groups.item()) == (0.0, 0.0)


def reference(logps, old, lengths, correct, scored, G, C, lam, tau, limit, beta):
    """The same in loops, one completion at a time, with the formulas as they are published."""
    total, drift, tokens = 0.0, 0.0, 0
    for start in range(0, len(lengths), G):
        positive, negative = [], []
        for row in range(start, start + G):
            s = sum(logps[row][: lengths[row]]) / lengths[row] if lengths[row] else None
            for t in range(lengths[row]):
                drift += old[row][t] - logps[row][t]
                tokens += 1
            if scored[row] and s is not None:
                (positive if correct[row] else negative).append((s, 1 - lengths[row] / C))
        if positive and negative:
            mean = sum(math.exp(r / lam) for _, r in positive) / len(positive)
            total += sum(math.exp(r / lam) / mean * s for s, r in positive) / len(positive)
            total -= tau * math.log(sum(math.exp(s / tau) for s, _ in negative) / len(negative))
    kl = drift / tokens
    return -total / (len(lengths) // G) + max(beta * (kl - limit), 0) * kl, kl


@pytest.mark.parametrize("lam", [0.1, 0.5, INF])
@pytest.mark.parametrize("beta", [0.0, 1e3])
def test_the_loss_is_that_of_an_independent_loop(lam, beta):
    generator = torch.Generator().manual_seed(0)
    G, C, groups = 5, 9, 8
    lengths = torch.randint(0, C + 1, (G * groups,), generator=generator)
    correct = torch.rand(G * groups, generator=generator) < 0.5
    scored = torch.rand(G * groups, generator=generator) < 0.9
    correct[:G], correct[G : 2 * G] = True, False  # a group without wrong ones, one without right ones
    logps = -torch.rand(G * groups, C, generator=generator).double()
    old = logps + 0.05 * torch.rand(G * groups, C, generator=generator)
    settings = {"tau": 2.0, "lam": lam, "kl_limit": 0.01, "kl_penalty": beta}
    mask = torch.arange(C) < lengths[:, None]
    result = drpo_loss(logps, old, mask, correct, scored, group_size=G, max_tokens=C, **settings)
    rows = (logps.tolist(), old.tolist(), lengths.tolist(), correct.tolist(), scored.tolist())
    loss, kl = reference(*rows, G, C, lam, 2.0, 0.01, beta)
    assert_close(result.loss.item(), loss, rtol=1e-9, atol=0)
    assert_close(result.kl.item(), kl, rtol=1e-9, atol=0)
    assert result.skipped_groups >= 2 / groups


def test_every_correct_completion_is_pushed_up_and_every_wrong_one_down():
    # in GRPO with a length penalty, the third correct one would be below the mean of its group
    lengths = [27, 40, 80, 50, 50, 50]
    _, gradient = loss_of([-1.0] * 6, lengths, [1, 1, 1, 0, 0, 0], group_size=6, max_tokens=100, lam=0.5)
    push = -gradient.sum(1)
    assert (push[:3] > 0).all() and (push[3:] < 0).all()
    assert push[0] > push[1] > push[2]


@pytest.mark.parametrize("correct", [[1, 1, 1], [0, 0, 0]], ids=["all correct", "none correct"])
def test_a_group_of_one_kind_adds_nothing_but_counts(correct):
    mixed = loss_of([-1.0, -2, -3], [2, 3, 4], [1, 0, 1], group_size=3, max_tokens=10)[0]
    both, gradient = loss_of(
        [-1.0, -2, -3, -1, -2, -3], [2, 3, 4, 2, 3, 4], [1, 0, 1, *correct], group_size=3, max_tokens=10
    )
    assert_close(both.loss, mixed.loss / 2)
    assert both.skipped_groups == 0.5 and not gradient[3:].any()
    alone, gradient = loss_of([-1.0, -2, -3], [2, 3, 4], correct, group_size=3, max_tokens=10)
    assert alone.loss == 0 and not gradient.any()


def test_what_was_not_scored_or_has_no_tokens_is_neither_correct_nor_wrong():
    few = loss_of([-1.0, -2], [2, 3], [1, 0], group_size=2, max_tokens=10)[0]
    many = loss_of([-1.0, -2, -3, -4], [2, 3, 4, 0], [1, 0, 0, 1], scored=[1, 1, 0, 1], group_size=4, max_tokens=10)[0]
    assert_close(few.loss, many.loss)


def test_the_penalty_acts_beyond_the_limit_only():
    settings = {"group_size": 2, "max_tokens": 10, "kl_penalty": 100.0}
    free, free_gradient = loss_of([-1.0, -2], [2, 3], [1, 0], **settings)
    _, mask = batch_of([-1.0, -2], [2, 3])
    old = tensor([[-0.9], [-1.9]]) * mask  # KL 0.1
    within, gradient = loss_of([-1.0, -2], [2, 3], [1, 0], old=old, kl_limit=0.2, **settings)
    assert within.loss == free.loss and torch.equal(gradient, free_gradient)
    beyond, gradient = loss_of([-1.0, -2], [2, 3], [1, 0], old=old, kl_limit=0.05, **settings)
    assert_close(beyond.loss - free.loss, tensor(100 * 0.05 * 0.1))
    assert_close(gradient - free_gradient, -(100 * 0.05) * mask / 5)  # stopgrad: of KL, not of its square


def test_two_processes_have_the_gradient_of_one():
    torch.manual_seed(0)
    logps, mask = torch.randn(8, 6) - 2, torch.arange(6) < torch.randint(1, 7, (8,))[:, None]
    old, correct, scored = logps + 0.1 * torch.rand(8, 6), torch.arange(8) % 2 == 0, torch.ones(8, dtype=torch.bool)

    def gradient(rows, **settings):
        own = logps[rows].clone().requires_grad_()
        result = drpo_loss(
            own, old[rows], mask[rows], correct[rows], scored[rows], group_size=4, max_tokens=6, **settings
        )
        return torch.autograd.grad(result.loss, own)[0]

    whole = gradient(slice(0, 8))
    total = torch.stack([((old - logps) * mask).sum(), mask.sum()])
    parts = [gradient(rows, reduce=lambda _: total, processes=2) for rows in (slice(0, 4), slice(4, 8))]
    assert_close(torch.cat(parts) / 2, whole)


# In the trainer


class Recording(DRPOTrainer):
    def _compute_loss(self, model, inputs):
        self.__dict__.setdefault("seen", []).append({name: value.clone() for name, value in inputs.items()})
        return super()._compute_loss(model, inputs)


def test_groups_stay_whole_through_shuffling_and_reuse(train):
    trainer = train(
        Recording,
        DRPOConfig,
        per_device_train_batch_size=8,
        steps_per_generation=2,
        num_iterations=2,
        gradient_accumulation_steps=1,
        max_steps=8,
        learning_rate=1e-2,
    )
    assert len(trainer.seen) == 8
    for batch in trainer.seen:
        assert batch["completion_ids"].shape[:2] == (2, 4)
        assert (batch["prompt_ids"] == batch["prompt_ids"][:, :1]).all()
        for name in ("correctness", "completion_mask", "old_per_token_logps"):
            assert batch[name].shape[:2] == (2, 4)
    kl = history(trainer, "drpo/kl")
    assert kl[0] == 0 and max(kl) > 1e-5  # later steps reuse the rollouts
    assert all(math.isfinite(value) for value in history(trainer, "drpo/objective"))


def test_the_trainers_loss_is_the_objective_of_its_rollouts(train, short_is_right):
    trainer = train(Recording, DRPOConfig, max_steps=1, learning_rate=0.0)
    (batch,) = trainer.seen
    flat = {name: value.flatten(0, 1) for name, value in batch.items() if value.ndim > 1}
    ids = torch.cat([flat["prompt_ids"], flat["completion_ids"]], 1)
    attention = torch.cat([flat["prompt_mask"], flat["completion_mask"]], 1)
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, attention_mask=attention).logits
    width = flat["completion_ids"].size(1)
    logps = logits[:, -width - 1 : -1].log_softmax(-1).gather(2, flat["completion_ids"][..., None]).squeeze(2)
    lengths = flat["completion_mask"].sum(1).tolist()
    rows = (logps.tolist(), logps.tolist(), lengths, (flat["correctness"] >= 1).tolist(), [True] * 8)
    loss, _ = reference(*rows, 4, 12, 0.1, 10.0, 1e-4, 1e3)
    assert_close(history(trainer, "drpo/objective")[0], -loss, atol=1e-5, rtol=1e-5)
    assert_close(history(trainer, "loss")[0], loss, atol=1e-4, rtol=0)  # logged with four digits


def test_the_embedded_policy_learns_for_a_few_steps(tiny_run, tmp_path):
    task = load_task("arithmetic", train_size=32, held_out_size=4)
    folder = model_path("embedded/policy")
    settings = {
        "per_device_train_batch_size": 32,
        "num_generations": 8,
        "max_completion_length": 96,
        "max_steps": 3,
        "num_iterations": 2,
        "drpo_tau": 1.0,
    }
    trainer = DRPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
        task.reward_funcs,
        DRPOConfig(output_dir=str(tmp_path), **(tiny_run | settings)),
        train_dataset=task.train,
        processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
    )
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    assert len(history(trainer, "drpo/objective")) == 3 and min(history(trainer, "drpo/skipped_groups")) < 1
    after = dict(trainer.model.named_parameters())
    assert all(after[name].isfinite().all() for name in before)
    assert any(not torch.equal(after[name], weight) for name, weight in before.items())
    # the second step uses the rollouts of the first: there the objective has risen
    assert history(trainer, "drpo/objective")[1] > history(trainer, "drpo/objective")[0]


def test_evaluation_reports_the_objective(train, prompts):
    trainer = train(
        DRPOTrainer,
        DRPOConfig,
        max_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
        num_generations_eval=2,
        eval_dataset=prompts(4),
    )
    assert len(history(trainer, "eval_drpo/objective")) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drpo_lambda": 0.0}, "drpo_lambda must be above 0"),
        ({"drpo_tau": -1.0}, "drpo_tau must be above 0"),
        ({"drpo_kl_limit": float("nan")}, "drpo_kl_limit must be a finite number"),
        ({"drpo_kl_penalty": -1.0}, "drpo_kl_penalty must be a finite number"),
        ({"beta": 0.04}, "a penalty to a reference model, which DRPO does not have"),
        (
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
            "per_device_train_batch_size=2 is no multiple of the 4 completions of a group",
        ),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(tiny_run, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DRPOConfig(output_dir=str(tmp_path), **(tiny_run | options))


def test_one_reward_function_says_what_is_correct(train, short_is_right):
    def other(completions, **_):
        return [7.0] * len(completions)

    with pytest.raises(ValueError, match=r"DRPO takes one reward function, .* but 2 of short_is_right, other"):
        train(DRPOTrainer, DRPOConfig, reward_funcs=[short_is_right, other])
    trainer = train(Recording, DRPOConfig, max_steps=1, reward_funcs=[other, short_is_right], reward_weights=[0.0, 1.0])
    assert set(trainer.seen[0]["correctness"].unique().tolist()) <= {0.0, 1.0}
    assert history(trainer, "rewards/other/mean") == [7.0]


def test_a_reward_that_is_not_finite_stops_with_its_name(train):
    def broken(completions, **_):
        return [float("nan")] * len(completions)

    with pytest.raises(ValueError, match="'broken' returned nan for row 0"):
        train(DRPOTrainer, DRPOConfig, reward_funcs=broken)
