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
from rollouts import END, MIXED, countdown
from torch import tensor
from torch.testing import assert_close
from transformers import TrainingArguments

from lenvm_rl.model import LengthValueModel
from lenvm_rl.pretraining.arguments import LengthValueTrainingArguments
from lenvm_rl.pretraining.trainer import LengthValueTrainer, merge_adapters

GAMMA, N = 0.9, -100

ROLLOUTS = [
    countdown(3),
    {"prompt_ids": [50, 60, 70], "completion_ids": [20, 30, 40, 20, 30], "finished": False},
    countdown(9),
    {"prompt_ids": [50, 60], "completion_ids": [END], "finished": True},
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
    rollouts = [countdown(n) for n in (4, 2, 9)] + [countdown(4, cut=2), {**countdown(9), "completion_ids": [7, END]}]
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
