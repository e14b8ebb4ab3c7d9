import json
import logging
import math
import os
import random
import socket
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor
from torch.testing import assert_close
from transformers import TrainingArguments

from lenvm_rl.length import logit_to_remaining
from lenvm_rl.model import LengthValueModel
from lenvm_rl.pretraining.arguments import LengthValueTrainingArguments
from lenvm_rl.pretraining.data import LengthValueCollator
from lenvm_rl.pretraining.packing import PackingCollator
from lenvm_rl.pretraining.trainer import (
    LengthValueTrainer,
    length_value_loss,
    length_value_targets,
    merge_adapters,
    remaining_targets,
)

GAMMA, EOS, N = 0.9, 1, -100


def test_targets_of_a_finished_completion():
    # spec.md section 2: G = -.3439, -.271, -.19, -.1, 0; a prompt of two tokens, and padding
    labels = tensor([[N, 4, 3, 2, 1, 0, N, N]])
    targets = length_value_targets(torch.full((1, 8), -0.7), labels, GAMMA)
    assert_close(targets, tensor([[0.0, -0.3439, -0.271, -0.19, -0.1, 0.0, 0.0, 0.0]]))


def test_targets_of_a_cut_completion_value_the_tail_by_the_critic():
    # spec.md section 4, with V = -.30 at the cut: -(1 - .9^l) + .9^l * -.30
    labels = tensor([[N, 4, 3, 2, 1, N, N]])
    values = tensor([[-0.9, -0.8, -0.8, -0.8, -0.8, -0.30, -0.9]])
    targets = length_value_targets(values, labels, GAMMA)
    assert_close(targets, tensor([[0.0, -0.54073, -0.4897, -0.433, -0.37, 0.0, 0.0]]))


def test_a_cut_at_the_end_of_a_row_and_a_finished_row_share_a_batch():
    labels = tensor([[2, 1, N], [N, 1, 0], [1, N, N]])
    values = tensor([[-0.5, -0.5, -0.2], [-0.5, -0.5, -0.5], [-0.5, -0.4, -0.9]])
    expected = tensor([[-0.352, -0.28, 0.0], [0.0, -0.1, 0.0], [-0.46, 0.0, 0.0]])
    assert_close(length_value_targets(values, labels, GAMMA), expected)


def test_targets_carry_no_gradient():
    values = tensor([[-0.5, -0.5, -0.2]], requires_grad=True)
    assert not length_value_targets(values, tensor([[2, 1, N]]), GAMMA).requires_grad


@given(st.integers(1, 5), st.integers(1, 8), st.booleans(), st.integers(0, 4), st.integers(0, 999))
@settings(max_examples=50, deadline=None)
def test_targets_solve_the_recursion_of_the_length_reward(prompt, completion, finished, padding, seed):
    row = {"prompt_ids": [5] * prompt, "completion_ids": [6] * completion, "finished": finished}
    longer = {"prompt_ids": [5] * prompt, "completion_ids": [6] * (completion + padding), "finished": True}
    labels = LengthValueCollator(0)([row, longer])["labels"]
    values = -torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    end = prompt + completion - 1
    value = 0.0 if finished else values[0, end].item()
    expected = [0.0] * labels.size(1)
    for column in range(end - 1, prompt - 2, -1):
        value = -(1 - GAMMA) + GAMMA * value  # r_t + gamma * V_{t+1}
        expected[column] = value
    assert length_value_targets(values, labels, GAMMA)[0].tolist() == pytest.approx(expected)


def countdown(start, cut=None):
    """A rollout whose every token says how many are left: n, n - 1, ..., 1, <eos>. The number k has the id k + 3."""
    completion = [*range(start + 2, 3, -1), EOS]
    return {
        "prompt_ids": [start + 3],
        "completion_ids": completion[:cut],
        "finished": cut is None,
    }


ROLLOUTS = [
    countdown(3),
    {"prompt_ids": [50, 60, 70], "completion_ids": [20, 30, 40, 20, 30], "finished": False},
    countdown(9),
    {"prompt_ids": [50, 60], "completion_ids": [EOS], "finished": True},
]


@pytest.fixture
def critic(critic_folder):
    return LengthValueModel.from_pretrained(critic_folder)


@pytest.fixture
def trainer_of(tmp_path):
    def build(model, rollouts=ROLLOUTS, evaluate_on=None, **arguments):
        defaults = {"learning_rate": 0.1, "lr_scheduler_type": "constant", "save_strategy": "no"}
        args = LengthValueTrainingArguments(
            str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, **(defaults | arguments)
        )
        rollouts, evaluate_on = (Dataset.from_list(x) if isinstance(x, list) else x for x in (rollouts, evaluate_on))
        return LengthValueTrainer(model, args, train_dataset=rollouts, eval_dataset=evaluate_on, pad_token_id=0)

    return build


def plain_errors(model, rollout):
    """V - target at every state of one rollout that has a target, without padding, masks or labels."""
    ids = [*rollout["prompt_ids"], *rollout["completion_ids"]]
    values = model.values(tensor([ids]))[0, len(rollout["prompt_ids"]) - 1 :]
    targets = [0.0 if rollout["finished"] else values[-1].item()]
    for _ in rollout["completion_ids"]:
        targets.insert(0, -(1 - GAMMA) + GAMMA * targets[0])
    errors = values - tensor(targets)
    return errors if rollout["finished"] else errors[:-1]


def plain_loss(model, rollouts):
    return torch.cat([plain_errors(model, rollout) for rollout in rollouts]).square().mean()


SGD = {"optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0}


@pytest.mark.parametrize("rows, accumulation", [(4, 1), (2, 2), (1, 4)])
def test_one_step_follows_the_token_mean_over_the_whole_accumulated_batch(
    trainer_of, critic, critic_folder, rows, accumulation
):
    plain_loss(critic, ROLLOUTS).backward()
    expected = {name: p.detach() - 0.1 * p.grad for name, p in critic.named_parameters()}
    model = LengthValueModel.from_pretrained(critic_folder)
    trainer_of(
        model,
        max_steps=1,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        **SGD,
    ).train()
    moved = 0.0
    for name, parameter in model.named_parameters():
        assert_close(parameter.detach(), expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
        moved += (critic.get_parameter(name) - parameter).abs().max().item()
    assert moved > 1e-3


def test_accumulation_changes_nothing_over_several_steps(trainer_of, critic_folder):
    rollouts = [countdown(n) for n in range(1, 15)] + [countdown(20, cut=5), countdown(20, cut=12)]
    weights = []
    for rows, accumulation in ((4, 1), (2, 2)):
        model = LengthValueModel.from_pretrained(critic_folder)
        trainer_of(
            model,
            rollouts,
            max_steps=6,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulation,
            seed=3,
            **SGD,
        ).train()
        weights.append(model.state_dict())
    for name, one in weights[0].items():
        assert_close(one, weights[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_the_evaluation_loss_is_a_token_mean_whatever_the_batch_size(trainer_of, critic, rows):
    trainer = trainer_of(critic, evaluate_on=ROLLOUTS, per_device_eval_batch_size=rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain_loss(critic, ROLLOUTS).item(), rel=1e-5)


def test_the_explained_variance_counts_the_states_before_each_token_of_finished_completions(trainer_of, critic):
    scores = trainer_of(critic, evaluate_on=ROLLOUTS, per_device_eval_batch_size=3).evaluate()
    finished = [rollout for rollout in ROLLOUTS if rollout["finished"]]
    errors = torch.cat([plain_errors(critic, rollout)[:-1] for rollout in finished])
    # 3, 9 and 1 tokens, the end token included
    returns = tensor([0.9**left - 1 for length in (3, 9, 1) for left in range(length, 0, -1)])
    expected = 1 - errors.var(correction=0) / returns.var(correction=0)
    assert scores["eval_explained_variance"] == pytest.approx(expected.item(), rel=1e-4)
    assert scores["eval_mean_squared_error"] == pytest.approx(errors.square().mean().item(), rel=1e-4)


def test_what_is_not_known_is_not_reported_as_a_number(trainer_of, critic):
    scores = trainer_of(critic, evaluate_on=[ROLLOUTS[1]]).evaluate()  # one rollout, which was cut
    assert math.isnan(scores["eval_explained_variance"]) and math.isnan(scores["eval_prompt_noise_floor"])
    assert scores["eval_loss"] == pytest.approx(plain_loss(critic, [ROLLOUTS[1]]).item(), rel=1e-5)


def test_the_error_at_the_prompt_belongs_to_the_right_prompt(trainer_of, critic):
    # evaluation goes by length, and prompts come back far apart
    rollouts = [countdown(n) for n in (4, 2, 9)] + [countdown(4, cut=2), {**countdown(9), "completion_ids": [7, EOS]}]
    scores = trainer_of(critic, evaluate_on=rollouts, per_device_eval_batch_size=2).evaluate()
    errors = []
    for prompt, lengths in {7: [4, 2], 5: [2], 12: [9, 2]}.items():
        value = critic.values(tensor([[prompt]]))[0, -1].item()
        true = math.log(sum(0.9**n for n in lengths) / len(lengths)) / math.log(0.9)
        errors.append(abs(math.log(1 + value) / math.log(0.9) - true) / true)
    assert scores["eval_prompt_relative_error"] == pytest.approx(sum(errors) / 3, rel=1e-4)


def fitted(trainer_of, policy_folder, rollouts, max_steps=80, **settings):
    torch.manual_seed(0)
    model = LengthValueModel.from_backbone(policy_folder, gamma=GAMMA)
    trainer = trainer_of(
        model,
        rollouts,
        evaluate_on=[countdown(n) for n in range(1, 31)],
        max_steps=max_steps,
        per_device_train_batch_size=32,
        learning_rate=1e-2,
        **settings,
    )
    trainer.train()
    return trainer


def test_a_critic_learns_a_remaining_length_that_can_be_read_from_the_tokens(trainer_of, policy_folder):
    rng = random.Random(0)
    trainer = fitted(trainer_of, policy_folder, [countdown(rng.randint(1, 30)) for _ in range(256)])
    scores = trainer.evaluate()
    assert scores["eval_explained_variance"] > 0.9
    assert scores["eval_loss"] < 0.005


def test_a_critic_learns_the_same_where_half_of_the_completions_were_cut(trainer_of, policy_folder):
    rng = random.Random(0)
    rollouts = [countdown(n, cut=rng.choice([None, rng.randint(1, n)])) for n in rng.choices(range(1, 31), k=256)]
    scores = fitted(trainer_of, policy_folder, rollouts).evaluate()
    assert scores["eval_explained_variance"] > 0.9
    assert scores["eval_loss"] < 0.005


def test_a_saved_critic_gives_the_same_evaluation(trainer_of, critic, tmp_path):
    trainer = trainer_of(critic, evaluate_on=ROLLOUTS, max_steps=3)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    reloaded = LengthValueModel.from_pretrained(tmp_path / "saved")
    again = trainer_of(reloaded, evaluate_on=ROLLOUTS)
    for name in ("eval_loss", "eval_explained_variance"):
        assert again.evaluate()[name] == trainer.evaluate()[name]
    ids = tensor([[50, 60, 70, 20]])
    assert torch.equal(reloaded.values(ids), critic.values(ids))
    assert reloaded.config.gamma == GAMMA and reloaded.config.generator == "tiny"


@pytest.mark.parametrize("where", ["rollouts", "evaluate_on"])
def test_rollouts_of_another_vocabulary_are_refused(trainer_of, critic, tokenizer, where):
    size = len(tokenizer)
    foreign = [{"prompt_ids": [5], "completion_ids": [size], "finished": True}]
    with pytest.raises(ValueError, match=f"Rollout 0 holds a token id outside the critic's vocabulary of {size}"):
        trainer_of(critic, **{where: foreign})


def test_other_arguments_are_refused(critic, tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="takes a LengthValueTrainingArguments"):
        LengthValueTrainer(critic, args, train_dataset=Dataset.from_list(ROLLOUTS), pad_token_id=0)


def test_empty_completions_are_not_trained_on(trainer_of, critic):
    empty = {"prompt_ids": [50], "completion_ids": [], "finished": False}
    with pytest.warns(UserWarning, match="1 of 5 rollouts have an empty completion"):
        trainer = trainer_of(critic, [*ROLLOUTS, empty], evaluate_on=ROLLOUTS)
    assert len(trainer.train_dataset) == 4


def test_a_dataset_on_disk_stays_there(trainer_of, critic, tmp_path):
    Dataset.from_list(ROLLOUTS).save_to_disk(str(tmp_path / "rollouts"))
    mapped = Dataset.load_from_disk(str(tmp_path / "rollouts"))
    trainer = trainer_of(critic, mapped, evaluate_on=mapped)
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
        assert loader.dataset.cache_files and next(iter(loader))["labels"].max() == 9


# --- objectives


def batch_of(rollouts, layout=None):
    collator = LengthValueCollator(0) if layout is None else PackingCollator(0, layout)
    return collator(rollouts)


def random_logits(labels, seed=0, scale=2.0):
    return scale * torch.randn(labels.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def per_completion(labels, numbers):
    """{(first label, ordinal): numbers} of the completions of any layout, found by walking through the rows."""
    found = []
    for row_labels, row_numbers in zip(labels.tolist(), numbers.tolist(), strict=True):
        before = N
        for label, number in zip(row_labels, row_numbers, strict=True):
            if label > 0 and before != label + 1:
                found.append([])
            if label > 0 or (label == 0 and before == 1) or (label == N and before == 1):
                found[-1].append(number)
            before = label
    return found


MIXED = [countdown(3), countdown(9, cut=4), {**countdown(5), "prompt_ids": [9, 8]}, countdown(1), countdown(7, cut=1)]


@pytest.mark.parametrize("layout", [None, "rows", "one row"])
@pytest.mark.parametrize("td_lambda", [1.0, 0.9, 0.3, 0.0])
@pytest.mark.parametrize("space", ["value", "length"])
def test_targets_are_those_of_a_loop_backwards_through_each_completion(layout, td_lambda, space):
    labels = batch_of(MIXED, layout)["labels"]
    z = random_logits(labels)
    if space == "value":
        predictions, reward, gamma = -torch.sigmoid(z), -(1 - GAMMA), GAMMA
        targets = length_value_targets(predictions, labels, GAMMA, td_lambda=td_lambda)
    else:
        predictions, reward, gamma = logit_to_remaining(z, GAMMA), 1.0, 1.0
        targets = remaining_targets(predictions, labels, td_lambda=td_lambda)
    cuts = [label[-1] for label in per_completion(labels, labels)]
    seen = 0
    for values, found, cut in zip(
        per_completion(labels, predictions), per_completion(labels, targets), cuts, strict=True
    ):
        follows = target = 0.0 if cut == 0 else values[-1]
        for t in reversed(range(len(values) - 1)):
            target = reward + gamma * (td_lambda * target + (1 - td_lambda) * follows)
            follows = values[t]
            assert found[t] == pytest.approx(target, rel=1e-5, abs=1e-6)
            seen += 1
        assert cut != 0 or found[-1] == 0
    assert seen == 3 + 4 + 5 + 1 + 1


@pytest.mark.parametrize("layout", [None, "rows"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss": "bce"},
        {"parameterization": "length"},
        {"parameterization": "log_length"},
        {"censoring": "bound"},
        {"censoring": "bound", "parameterization": "length"},
        {"censoring": "bound", "loss": "bce"},
    ],
)
def test_the_loss_of_a_state_is_the_written_formula(layout, settings):
    labels = batch_of(MIXED, layout)["labels"]
    z = random_logits(labels)
    errors = length_value_loss(z, labels, GAMMA, **settings)
    assert (errors[labels == N] == 0).all()
    checked = 0
    for logits, left, found in zip(*(per_completion(labels, x) for x in (z, labels, errors)), strict=True):
        remaining = [math.log(1 + math.exp(x)) / -math.log(GAMMA) for x in logits]
        was_cut = left[-1] == N
        for x, length, label, error in zip(logits, remaining, left, found, strict=True):
            if label == N:
                continue
            target = label + (remaining[-1] if was_cut and settings.get("censoring") != "bound" else 0)
            u, predicted = 1 - GAMMA**target, 1 / (1 + math.exp(-x))
            if settings.get("loss") == "bce":
                expected = -u * math.log(predicted) - (1 - u) * math.log(1 - predicted)
            elif settings.get("parameterization") == "length":
                expected = (math.log(GAMMA) * (length - target)) ** 2
            elif settings.get("parameterization") == "log_length":
                expected = (math.log(1 + length) - math.log(1 + target)) ** 2
            else:
                expected = (predicted - u) ** 2
            if was_cut and settings.get("censoring") == "bound" and length >= target:
                expected = 0.0
            assert error == pytest.approx(expected, rel=1e-6, abs=1e-9)
            checked += 1
    assert checked == sum(1 for row in MIXED for _ in row["completion_ids"]) + 3


def test_every_parameterization_is_right_at_the_same_logits():
    # a head that knows the length is right whatever its error is measured on, and so all are saved and used alike
    labels = batch_of([countdown(8)])["labels"]
    remaining = labels.clamp(min=0).double() + 1e-9
    z = torch.log(torch.expm1(-math.log(GAMMA) * remaining))
    for parameterization in ("value", "length", "log_length"):
        assert length_value_loss(z, labels, GAMMA, parameterization=parameterization).max() < 1e-12
    assert_close(-torch.sigmoid(z)[labels > 0], GAMMA ** labels[labels > 0].double() - 1)


@pytest.mark.parametrize("settings", [{"loss": "bce"}, {"parameterization": "log_length"}, {"td_lambda": 0.8}])
def test_other_objectives_learn_the_countdown_too(trainer_of, policy_folder, settings):
    rng = random.Random(0)
    rollouts = [countdown(rng.randint(1, 30)) for _ in range(192)]
    trainer = fitted(trainer_of, policy_folder, rollouts, max_steps=50, **settings)
    assert trainer.evaluate()["eval_explained_variance"] > 0.8


def test_dropped_completions_are_not_seen_at_all(trainer_of, critic):
    trainer = trainer_of(critic, censoring="drop", evaluate_on=ROLLOUTS)
    assert trainer.train_dataset["finished"][:] == [True, True, True] and len(trainer.eval_dataset) == 4
    with pytest.raises(ValueError, match="censoring 'drop' leaves nothing to train on"):
        trainer_of(critic, [ROLLOUTS[1]], censoring="drop")


def test_the_official_targets_end_where_a_completion_was_cut(trainer_of, critic):
    trainer = trainer_of(critic, [countdown(9, cut=4)], censoring="official", packing=False)
    assert next(iter(trainer.get_train_dataloader()))["labels"].tolist() == [[4, 3, 2, 1, 0]]
    assert next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))["labels"].tolist() == [[4, 3, 2, 1, N]]


# --- censoring, where it matters


def test_bootstrapping_recovers_what_the_limit_hid_better_than_the_other_ways():
    # spec.md section 4: 30 % are cut; the state does not reveal its position, so one number is all a critic can say
    stop, gamma = 0.05, 0.96
    limit = round(math.log(0.3) / math.log(1 - stop))
    rng = random.Random(0)
    lengths = [math.ceil(math.log(1 - rng.random()) / math.log(1 - stop)) for _ in range(2_000)]
    assert sum(length > limit for length in lengths) / len(lengths) == pytest.approx(0.3, abs=0.02)
    # V = -(1 - gamma) + gamma * (1 - stop) * V
    truth = -(1 - gamma) / (1 - gamma * (1 - stop))
    settled = {name: settled_value(name, lengths, limit, gamma) for name in CENSORED}
    errors = {name: abs(value - truth) for name, value in settled.items()}
    assert errors["bootstrap"] < 0.01
    assert errors["bootstrap"] < 0.2 * min(errors["bound"], errors["official"], errors["drop"])
    assert errors["bound"] < errors["official"] < errors["drop"]


CENSORED = ("bootstrap", "bound", "official", "drop")


def settled_value(censoring, lengths, limit, gamma):
    """Where a critic of a single number ends, by gradient descent on `length_value_loss`."""
    rollouts = [
        {"prompt_ids": [5], "completion_ids": [6] * min(length, limit), "finished": length <= limit}
        for length in lengths
        if censoring != "drop" or length <= limit
    ]
    labels = LengthValueCollator(0, official=censoring == "official")(rollouts)["labels"]
    known = labels > 0  # the end can be told from the other states
    z = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.SGD([z], lr=10.0)
    for _ in range(60):
        optimizer.zero_grad()
        errors = length_value_loss(z.expand(labels.shape), labels, gamma, censoring=censoring)
        (errors[known].sum() / known.sum()).backward()
        optimizer.step()
    return -torch.sigmoid(z).item()


# --- ways to train


@pytest.mark.parametrize(
    "censoring, td_lambda, layout",
    [
        ("bootstrap", 1.0, "rows"),
        ("bootstrap", 1.0, "documents"),
        ("bootstrap", 0.7, "rows"),
        ("bound", 1.0, "rows"),
        ("official", 1.0, "rows"),
    ],
)
def test_packing_changes_the_speed_and_nothing_else(
    trainer_of, critic_folder, censoring, td_lambda, layout, monkeypatch
):
    if layout == "documents":
        monkeypatch.setattr("lenvm_rl.pretraining.packing.WIDE", 1)
    weights = []
    for packing in (True, False):
        model = LengthValueModel.from_pretrained(critic_folder)
        settings = {"max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
        trainer = trainer_of(
            model, MIXED + ROLLOUTS, packing=packing, censoring=censoring, td_lambda=td_lambda, **settings, **SGD
        )
        assert trainer._layout == (layout if packing else None)
        trainer.train()
        weights.append(model.state_dict())
    for name, one in weights[0].items():
        assert_close(one, weights[1][name], rtol=1e-4, atol=1e-5)


def test_where_packing_cannot_be_similar_lengths_share_a_micro_batch(trainer_of, critic, monkeypatch, caplog):
    monkeypatch.setattr("lenvm_rl.pretraining.trainer.packing_layout", lambda backbone: None)
    rollouts = [countdown(n) for n in range(1, 17)]
    with caplog.at_level(logging.WARNING):
        trainer = trainer_of(
            critic, rollouts, per_device_train_batch_size=4, gradient_accumulation_steps=4, max_steps=1
        )
    assert "LlamaModel cannot keep packed rollouts apart, so they are padded; the 4 micro-batches" in caplog.text
    widths = [batch["input_ids"].shape[1] for batch in trainer.get_train_dataloader()]
    assert widths == [17, 13, 9, 5]
    trainer.train()


def test_gradient_checkpointing_gives_the_same_losses(trainer_of, critic_folder):
    histories = []
    for checkpointing in (False, True):
        trainer = trainer_of(
            LengthValueModel.from_pretrained(critic_folder),
            gradient_checkpointing=checkpointing,
            max_steps=3,
            per_device_train_batch_size=4,
            logging_steps=1,
            **SGD,
        )
        trainer.train()
        histories.append([float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry])
    assert histories[0] == pytest.approx(histories[1], rel=1e-6) and len(histories[0]) == 3


def test_bf16_trains_close_to_float32(trainer_of, critic_folder):
    losses = []
    for bf16 in (False, True):
        trainer = trainer_of(
            LengthValueModel.from_pretrained(critic_folder), evaluate_on=ROLLOUTS, bf16=bf16, max_steps=3, **SGD
        )
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[0] != losses[1]


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2}, {"packing": False}, {"fallback": True}])
def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_stopped(
    trainer_of, critic_folder, tmp_path, settings, monkeypatch
):
    if settings.pop("fallback", False):
        monkeypatch.setattr("lenvm_rl.pretraining.trainer.packing_layout", lambda backbone: None)
    rollouts = [countdown(n) for n in range(1, 13)]
    weights = []
    for resume in (None, tmp_path / "checkpoint-4"):
        torch.manual_seed(0)
        trainer = trainer_of(
            LengthValueModel.from_pretrained(critic_folder),
            rollouts,
            num_train_epochs=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            save_strategy="steps",
            save_steps=4,
            **settings,
        )
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        assert trainer.state.global_step == 9
        weights.append({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
    for name, one in weights[0].items():
        assert torch.equal(one, weights[1][name]), name


def test_lora_trains_adapters_and_head_and_is_saved_merged(trainer_of, critic_folder, tmp_path):
    model = LengthValueModel.from_pretrained(critic_folder)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = trainer_of(model, lora_rank=2, max_steps=4, evaluate_on=ROLLOUTS, learning_rate=1e-2, packing=True)
    trainer.train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"model", "v_head"}
    assert all(".lora_" in name for name in trained if name.startswith("model."))
    trainer.save_model(str(tmp_path / "saved"))
    merged = LengthValueModel.from_pretrained(tmp_path / "saved")
    assert dict(merged.named_parameters()).keys() == before.keys()
    assert not torch.equal(merged.model.layers[0].mlp.up_proj.weight, before["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(merged.model.norm.weight, before["model.norm.weight"])
    ids = tensor([[50, 60, 70, 20]])
    assert_close(merged.values(ids), model.eval().values(ids), rtol=1e-5, atol=1e-6)
    assert merged.config.gamma == GAMMA


def test_merging_adds_the_scaled_product_of_the_factors():
    a, b, w = tensor([[1.0, 2.0]]), tensor([[3.0], [4.0]]), tensor([[1.0, 1.0], [1.0, 1.0]])
    state = {"x.base_layer.weight": w, "x.lora_A.default.weight": a, "x.lora_B.default.weight": b, "y": w}
    merged = merge_adapters(state, 0.5)
    assert merged.keys() == {"x.weight", "y"}
    assert merged["x.weight"].tolist() == [[2.5, 4.0], [3.0, 5.0]]


def test_lora_without_peft_says_what_to_install(trainer_of, critic, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="lora_rank needs peft: pip install"):
        trainer_of(critic, lora_rank=2)


def test_a_frozen_backbone_stays_as_it_is_and_keeps_no_graph(trainer_of, critic_folder):
    model = LengthValueModel.from_pretrained(critic_folder)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = trainer_of(model, frozen_backbone=True, max_steps=3, learning_rate=1e-2)
    graphs = []
    model.v_head.register_forward_pre_hook(lambda _, args: graphs.append(args[0].requires_grad))
    trainer.train()
    assert graphs and not any(graphs)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("model."), name


TWO = """
import json, sys
from datasets import Dataset
from lenvm_rl.model import LengthValueModel
from lenvm_rl.pretraining.arguments import LengthValueTrainingArguments
from lenvm_rl.pretraining.trainer import LengthValueTrainer

rollouts, held_out, critic, output, settings = json.loads(sys.argv[1])
trainer = LengthValueTrainer(
    LengthValueModel.from_pretrained(critic),
    LengthValueTrainingArguments(output, per_device_train_batch_size=2, per_device_eval_batch_size=2, **settings),
    train_dataset=Dataset.from_list(rollouts),
    eval_dataset=Dataset.from_list(held_out),
    pad_token_id=0,
)
trainer.train()
scores = trainer.evaluate()
trainer.save_model()
if trainer.args.process_index == 0:
    print("RESULT", json.dumps([trainer.state.log_history, scores, trainer.args.world_size]))
"""


def run_two_processes(*arguments):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", TWO, json.dumps(arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen(command, env={**environment, "RANK": r, "LOCAL_RANK": r}, **pipes) for r in ("0", "1")]
    outputs = [run.communicate(timeout=250) for run in runs]
    assert all(run.returncode == 0 for run in runs), [stderr[-2000:] for _, stderr in outputs]
    (line,) = [line for line in outputs[0][0].splitlines() if line.startswith("RESULT")]
    return json.loads(line.removeprefix("RESULT"))


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_with_unequal_tokens_do_what_one_does(trainer_of, critic, critic_folder, tmp_path):
    rollouts = [countdown(n) for n in (1, 20, 2, 25, 4)] + [countdown(30, cut=9), countdown(3), countdown(3, cut=2)]
    # odd in number, so that the last batch of an evaluation is filled up with rollouts that must not count twice
    held_out = rollouts[:7]
    settings = {"max_steps": 3, "logging_steps": 1, "learning_rate": 0.1, "lr_scheduler_type": "constant", **SGD}
    trainer = trainer_of(critic, rollouts, evaluate_on=held_out, per_device_train_batch_size=4, **settings)
    trainer.train()
    scores = trainer.evaluate()
    settings |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    history, two, processes = run_two_processes(rollouts, held_out, critic_folder, str(tmp_path / "two"), settings)
    assert processes == 2
    losses = [
        [float(entry["loss"]) for entry in log if "loss" in entry] for log in (trainer.state.log_history, history)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[0]) == 3
    for name, number in scores.items():
        if "runtime" not in name and "per_second" not in name and "preparation" not in name:
            assert two[name] == pytest.approx(number, rel=1e-4, abs=1e-5, nan_ok=True), name
    weights = LengthValueModel.from_pretrained(tmp_path / "two").state_dict()
    for name, tensors in critic.state_dict().items():
        assert_close(tensors, weights[name], rtol=1e-4, atol=1e-5)
