"""LenVM-GRPO against stock TRL, and the contracts with TRL 1.16 that it stands on."""

import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close
from trl import GRPOConfig, GRPOTrainer

from lenvm_rl.advantages import length_advantages
from lenvm_rl.model import LengthValueModel
from lenvm_rl.trainers.grpo import LenVMGRPOConfig, LenVMGRPOTrainer
from reward_fns import TruncationReward


def weights(trainer: GRPOTrainer) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def history(trainer: GRPOTrainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("measuring", [False, True], ids=["without a critic", "with a critic that only measures"])
@pytest.mark.parametrize(
    "options", [{}, {"num_iterations": 2, "steps_per_generation": 2, "gradient_accumulation_steps": 1}]
)
def test_coefficient_zero_is_plain_grpo_bit_for_bit(train, critic_folder, measuring, options):
    critic = {"length_critic": str(critic_folder)} if measuring else {}
    ours = train(length_coef=0.0, **critic, **options)
    stock = train(GRPOTrainer, GRPOConfig, **options)
    for name, weight in weights(stock).items():
        assert torch.equal(weight, weights(ours)[name]), name
    assert history(ours, "loss") == history(stock, "loss")


def test_length_credit_changes_the_run(train, critic_folder):
    plain, ours = train(length_coef=0.0), train(length_critic=str(critic_folder), length_gate="all")
    assert any(not torch.equal(weight, weights(ours)[name]) for name, weight in weights(plain).items())


class Recording(LenVMGRPOTrainer):
    """Keeps every micro-batch that reaches the loss."""

    def _compute_loss(self, model, inputs):
        if model.training:
            self.__dict__.setdefault("seen", []).append({k: v.clone() for k, v in inputs.items()})
        return super()._compute_loss(model, inputs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {
            "steps_per_generation": 4,
            "gradient_accumulation_steps": 2,
            "num_iterations": 2,
            "per_device_train_batch_size": 4,
        },
    ],
    ids=["one batch", "accumulation", "reuse and shuffling"],
)
def test_buffered_advantages_belong_to_the_tokens_of_their_micro_batch(train, tokenizer, critic_folder, options):
    trainer = train(Recording, length_critic=str(critic_folder), length_gate="all", max_steps=3, **options)
    critic = LengthValueModel.from_pretrained(critic_folder).eval()
    assert len(trainer.seen) == 3 * options.get("gradient_accumulation_steps", 1)
    for batch in trainer.seen:
        expected = length_part(critic, batch, tokenizer.eos_token_id)
        mask = batch["completion_mask"].bool()
        # the group-normalised task advantage is constant along a row
        task = batch["advantages"] - expected
        first = task[:, :1]
        assert_close(task[mask], first.expand_as(task)[mask], atol=1e-5, rtol=0)
        assert not batch["advantages"][~mask].any()


def length_part(critic: LengthValueModel, batch: dict[str, torch.Tensor], eos: int) -> torch.Tensor:
    """Length advantages of a micro-batch from its own ids, row by row, without padding."""
    rows, width = batch["completion_ids"].shape
    result = torch.zeros(rows, width)
    for row in range(rows):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        values = critic.values(torch.cat([prompt, completion])[None])[0, len(prompt) - 1 :]
        bootstrap = torch.zeros(1) if completion[-1] == eos else values[-1:]
        mask = torch.ones(1, len(completion), dtype=torch.bool)
        gamma = critic.config.gamma
        result[row, : len(completion)] = length_advantages(values[None, :-1], bootstrap, mask, gamma=gamma, lam=1.0)
    return result


def test_completions_that_are_not_correct_feel_no_length_pressure(train, critic_folder):
    trainer = train(
        Recording, length_critic=str(critic_folder), reward_funcs=lambda completions, **_: [0.0] * len(completions)
    )
    for batch in trainer.seen:
        assert not batch["advantages"].any()
    assert history(trainer, "length/gate_rate") == [0.0, 0.0]


def test_every_documented_metric_is_logged(train, critic_folder):
    trainer = train(length_critic=str(critic_folder), length_gate="all")
    documented = set(re.findall(r"length/\w+", LenVMGRPOTrainer.__doc__))
    logged = {key for entry in trainer.state.log_history for key in entry if key.startswith("length/")}
    assert documented - {"length/critic_loss"} == logged  # a frozen critic has none
    assert len(logged) == 13


@pytest.mark.parametrize("gate", ["all", "correct", "solve_rate"])
@pytest.mark.parametrize("scale", ["none", "std"])
def test_gates_and_scales_train(train, critic_folder, gate, scale):
    trainer = train(length_critic=str(critic_folder), length_gate=gate, length_scale=scale, max_steps=1)
    assert all(torch.isfinite(weight).all() for weight in weights(trainer).values())


def test_std_scale_divides_by_the_logged_standard_deviation(train, critic_folder):
    raw = train(Recording, length_critic=str(critic_folder), length_gate="all", max_steps=1)
    scaled = train(Recording, length_critic=str(critic_folder), length_gate="all", length_scale="std", max_steps=1)
    critic = LengthValueModel.from_pretrained(critic_folder).eval()
    batch, other = raw.seen[0], scaled.seen[0]
    assert torch.equal(batch["completion_ids"], other["completion_ids"])
    length = length_part(critic, batch, raw.processing_class.eos_token_id)
    std = history(scaled, "length/advantage_std")[0]
    assert_close(other["advantages"] - batch["advantages"], length * (1 / std - 1), atol=1e-4, rtol=1e-4)


def test_tool_tokens_are_no_actions_but_context(train, critic_folder, tokenizer):
    def rollout(prompts, trainer):
        ids = [tokenizer(prompt).input_ids for prompt in prompts]
        completion = [*tokenizer("so 7 + 1 = 8 . is 8").input_ids, tokenizer.eos_token_id]
        mask = [1, 1, 0, 0, 0, 1, 1, 1, 1, 1]
        return {
            "prompt_ids": ids,
            "completion_ids": [completion] * len(ids),
            "logprobs": None,
            "env_mask": [mask] * len(ids),
        }

    trainer = train(Recording, length_critic=str(critic_folder), length_gate="all", rollout_func=rollout, max_steps=1)
    batch = trainer.seen[0]
    assert not batch["advantages"][:, 2:5].any()
    assert batch["advantages"][:, [0, 1, 5, 9]].all()
    assert history(trainer, "length/true_tokens") == [7.0]


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.04},
        {"loss_type": "grpo"},
        {"loss_type": "cispo", "epsilon_high": 5.0, "importance_sampling_level": "sequence"},
        {"mask_truncated_completions": True},
        {"scale_rewards": "none"},
        {"eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 2, "per_device_eval_batch_size": 4},
    ],
    ids=str,
)
def test_works_with_the_options_of_trl(train, critic_folder, prompts, options):
    evaluation = {"eval_dataset": prompts(4)} if "eval_steps" in options else {}
    trainer = train(length_critic=str(critic_folder), **options, **evaluation)
    assert trainer.state.global_step == 2
    if evaluation:
        assert history(trainer, "eval_length/true_tokens") or history(trainer, "eval_length/coef")


def test_works_with_lora(train, critic_folder):
    peft = pytest.importorskip("peft")
    before = train(max_steps=1, length_coef=0.0, learning_rate=0.0)
    trainer = train(length_critic=str(critic_folder), peft_config=peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    base = {name.removeprefix("base_model.model."): w for name, w in weights(trainer).items() if "lora" not in name}
    for name, weight in weights(before).items():
        if "q_proj" not in name and "v_proj" not in name:
            assert torch.equal(base[name], weight), name
    assert any("lora_B" in name and weight.any() for name, weight in weights(trainer).items())


def test_conversational_prompts(train, critic_folder, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m['content'] }} {% endfor %}")
    dataset = Dataset.from_dict({"prompt": [[{"role": "user", "content": f"{i} + 7 ="}] for i in range(16)]})

    def reward(completions, **_):
        return [float(len(messages[0]["content"].split()) < 8) for messages in completions]

    trainer = train(length_critic=str(critic_folder), train_dataset=dataset, reward_funcs=reward)
    assert trainer.state.global_step == 2


def test_a_resumed_run_is_the_run_that_was_not_interrupted(train, critic_folder, tmp_path):
    options = {"length_critic": str(critic_folder), "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = train(**options)
    resumed = train(**options, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(resumed)[name]), name


def test_tokens_of_masked_completions_are_counted(train, critic_folder):
    options = {"max_completion_length": 4, "max_steps": 1, "length_critic": str(critic_folder)}
    plain, masked = train(**options), train(**options, mask_truncated_completions=True)
    assert history(masked, "completions/clipped_ratio")[0] > 0
    for name in ("length/correct_tokens", "length/tokens_per_correct"):
        assert history(masked, name) == history(plain, name)


def test_a_reward_function_given_by_position_is_guarded_too(
    tokenizer, policy_folder, tmp_path, tiny_run, prompts, short_is_right
):
    trainer = LenVMGRPOTrainer(
        str(policy_folder),
        short_is_right,
        LenVMGRPOConfig(output_dir=str(tmp_path), length_coef=0.0, **tiny_run),
        train_dataset=prompts(),
        processing_class=tokenizer,
    )
    with pytest.raises(ValueError, match="'short_is_right' returned nan for row 0"):
        trainer.reward_funcs[0]._checked([float("nan")])


def test_rollouts_sampled_otherwise_than_the_critics_are_reported(train, critic_folder, tmp_path):
    critic = LengthValueModel.from_pretrained(critic_folder)
    critic.config.temperature = 0.5
    critic.save_pretrained(tmp_path / "critic")
    with pytest.warns(
        UserWarning, match=r"temperature is 1.0, but the length critic was pretrained on rollouts with 0.5"
    ):
        train(length_critic=str(tmp_path / "critic"), max_steps=1)


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_stops_with_its_name(train, reward):
    def broken_reward(completions, **_):
        return [0.0, reward, *[0.0] * (len(completions) - 2)]

    with pytest.raises(ValueError, match=r"'broken_reward' returned (nan|inf) for row 1"):
        train(length_coef=0.0, reward_funcs=broken_reward)


def test_a_critic_that_says_nan_stops_with_the_row(train, critic_folder):
    critic = LengthValueModel.from_pretrained(critic_folder)
    torch.nn.init.constant_(critic.v_head.summary.bias, float("nan"))
    with pytest.raises(ValueError, match="not finite for completion 0"):
        train(loaded_critic=critic)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length_coef": float("nan")}, "length_coef must be a finite number"),
        ({"length_lambda": 1.5}, r"length_lambda must lie in \[0, 1\]"),
        ({"length_gate": "some"}, "length_gate must be one of"),
        ({"length_scale": "max"}, "length_scale must be one of"),
        ({"importance_sampling_level": "sequence"}, "averages token advantages back"),
        ({"loss_type": "luspo"}, "loss_type='luspo' is made for one ratio per completion"),
        ({"length_gamma": 1.5}, r"length_gamma must lie in the open interval \(0, 1\), got 1.5"),
        ({"length_token_budget": 0}, "length_token_budget must be at least 1"),
        ({"advantage_backend": "cuda"}, "advantage_backend must be one of"),
        ({"advantage_normalization": "dler"}, "advantage_normalization must be one of trl, group_centred_batch_std"),
        (
            {"advantage_normalization": "group_centred_batch_std", "multi_objective_aggregation": "normalize_then_sum"},
            "scales each reward function by itself: choose one of the two",
        ),
        ({"max_resample_rounds": 0}, "max_resample_rounds must be at least 1"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(tmp_path, tiny_run, options, message):
    with pytest.raises(ValueError, match=message):
        LenVMGRPOConfig(output_dir=str(tmp_path), **(tiny_run | options))


def test_a_critic_is_required_unless_the_coefficient_is_zero(train):
    with pytest.raises(ValueError, match="length_critic is not set"):
        train()


def test_a_critic_folder_that_does_not_exist_is_named(train):
    with pytest.raises((ValueError, OSError), match="no_such_critic"):
        train(length_critic="./no_such_critic")


def test_a_gamma_that_contradicts_the_critic_is_refused(train, critic_folder):
    with pytest.raises(ValueError, match="gamma"):
        train(length_critic=str(critic_folder), length_gamma=0.5)


def test_an_unknown_gate_reward_is_refused(train, critic_folder):
    with pytest.raises(
        ValueError, match="length_gate_reward='accuracy' is not one of the reward functions: short_is_right"
    ):
        train(length_critic=str(critic_folder), length_gate_reward="accuracy")


@pytest.mark.parametrize(
    ("limit", "tokens"), [(13, 13), ({0: 12, 5: 40}, 40)], ids=["a number", "a schedule that rises"]
)
def test_a_limit_that_no_completion_can_exceed_is_refused(train, short_is_right, limit, tokens):
    reward = TruncationReward(limit, eos_token_ids=1, correctness=short_is_right)
    with pytest.raises(
        ValueError,
        match=f"'truncation_reward' has a limit of {tokens} tokens, but generation stops at max_completion_length=12",
    ):
        train(length_coef=0.0, reward_funcs=[short_is_right, reward])


def test_a_limit_of_what_is_generated_passes(train, short_is_right):
    reward = TruncationReward(12, eos_token_ids=1, correctness=short_is_right)
    train(length_coef=0.0, reward_funcs=[short_is_right, reward], max_steps=1)


def test_a_critic_of_another_tokenizer_is_refused(train, critic_folder, tmp_path):
    critic = LengthValueModel.from_pretrained(critic_folder)
    critic.config.tokenizer_fingerprint = "0" * 64 + ":1"
    critic.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="must share the policy's tokenizer"):
        train(length_critic=str(tmp_path / "other"))


def test_a_critic_that_does_not_know_the_policy_is_reported(train, critic_folder, capsys):
    with pytest.warns(UserWarning, match="made for another policy"):
        train(length_critic=str(critic_folder), max_steps=1)
    assert "explained variance" in capsys.readouterr().out


# What this trainer relies on in TRL. A failure here after an upgrade says where to look.


def test_trl_calls_the_overridden_methods_with_these_arguments():
    assert list(inspect.signature(GRPOTrainer._generate_and_score_completions).parameters) == ["self", "inputs"]
    assert list(inspect.signature(GRPOTrainer._calculate_rewards).parameters) == [
        "self",
        "inputs",
        "prompts",
        "completions",
        "completion_ids_list",
    ]


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo"])
def test_trl_loss_takes_token_advantages_and_keeps_their_credit(train, loss_type):
    trainer = train(length_coef=0.0, max_steps=1, loss_type=loss_type, epsilon_high=5.0)
    trainer.model.train()
    torch.manual_seed(0)
    batch = trainer._generate_and_score_completions([trainer.train_dataset[i // 4] for i in range(8)])
    width = batch["completion_ids"].size(1)

    def loss_and_gradients(advantages):
        trainer.model.zero_grad()
        loss = trainer._compute_loss(trainer.model, batch | {"advantages": advantages})
        loss.backward()
        return loss.detach(), torch.cat([w.grad.flatten() for w in trainer.model.parameters() if w.grad is not None])

    sequence = torch.linspace(-1, 1, 8)
    for ours, theirs in zip(
        loss_and_gradients(sequence[:, None].repeat(1, width)), loss_and_gradients(sequence), strict=True
    ):
        assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    opposed = torch.zeros(8, width)
    opposed[:, 0], opposed[:, 1] = 1.0, -1.0  # as a sequence advantage this would be nothing
    assert loss_and_gradients(opposed)[1].abs().max() > 1e-5


def test_the_saved_configuration_is_json(tmp_path, tiny_run):
    config = LenVMGRPOConfig(output_dir=str(tmp_path), **tiny_run)
    assert json.loads(json.dumps(config.to_dict()))["length_gate"] == "correct"
    assert Path(config.output_dir) == tmp_path


def test_a_dataset_smaller_than_a_batch_of_rollouts_is_refused(train, prompts):
    # TRL would train nothing, and say so in the log only
    with pytest.raises(
        ValueError, match="A batch of rollouts needs 2 prompts, with num_generations=4, but the dataset"
    ):
        train(length_coef=0.0, train_dataset=prompts(1))
