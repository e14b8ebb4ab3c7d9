import random
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor
from torch.testing import assert_close
from transformers import TrainingArguments

from lenvm_rl.model import LengthValueModel
from lenvm_rl.pretraining.data import LengthValueCollator
from lenvm_rl.pretraining.trainer import LengthValueTrainer, length_value_targets

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
        arguments = {"learning_rate": 0.1, "lr_scheduler_type": "constant", **arguments}
        args = TrainingArguments(
            str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, **arguments
        )
        evaluate_on = None if evaluate_on is None else Dataset.from_list(evaluate_on)
        return LengthValueTrainer(
            model, args, train_dataset=Dataset.from_list(rollouts), eval_dataset=evaluate_on, pad_token_id=0
        )

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


def test_the_explained_variance_counts_finished_completions(trainer_of, critic):
    scores = trainer_of(critic, evaluate_on=ROLLOUTS, per_device_eval_batch_size=3).evaluate()
    finished = [rollout for rollout in ROLLOUTS if rollout["finished"]]
    errors = torch.cat([plain_errors(critic, rollout) for rollout in finished])
    # 3, 9 and 1 tokens, the end token included
    returns = tensor([0.9**left - 1 for length in (3, 9, 1) for left in range(length, -1, -1)])
    expected = 1 - errors.var(correction=0) / returns.var(correction=0)
    assert scores["eval_explained_variance"] == pytest.approx(expected.item(), rel=1e-4)


def test_the_explained_variance_is_unknown_where_no_return_varies(trainer_of, critic):
    trainer = trainer_of(critic, evaluate_on=[ROLLOUTS[1]])
    scores = trainer.evaluate()
    assert scores["eval_explained_variance"] != scores["eval_explained_variance"]
    assert scores["eval_loss"] == pytest.approx(plain_loss(critic, [ROLLOUTS[1]]).item(), rel=1e-5)
    prediction = SimpleNamespace(predictions=torch.randn(11, 2).numpy(), label_ids=tensor([[N, 0]] * 11).numpy())
    assert trainer._metrics(prediction)["explained_variance"] != trainer._metrics(prediction)["explained_variance"]


def fitted(trainer_of, policy_folder, rollouts):
    torch.manual_seed(0)
    model = LengthValueModel.from_backbone(policy_folder, gamma=GAMMA)
    trainer = trainer_of(
        model,
        rollouts,
        evaluate_on=[countdown(n) for n in range(1, 31)],
        max_steps=80,
        per_device_train_batch_size=32,
        learning_rate=1e-2,
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
