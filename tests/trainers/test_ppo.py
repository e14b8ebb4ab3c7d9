import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForTokenClassification,
)

from lenvm_rl.trainers.grpo import LenVMGRPOTrainer
from lenvm_rl.trainers.ppo import VALUE_FOLDER, LenVMPPOConfig, LenVMPPOTrainer, ValueWatch
from lenvm_rl.trainers.task_critic import taken_over

PLAIN = {"length_coef": 0.0, "num_generations": 1, "value_learning_rate": 1e-2}


class KeepsBatches:
    """Keeps the batches of rollouts as the loss gets them."""

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        self.__dict__.setdefault("batches", []).append({name: value.clone() for name, value in batch.items()})
        self.__dict__.setdefault("rewards", []).append(self._scored[0].clone())
        return batch


class Keeping(KeepsBatches, LenVMPPOTrainer):
    pass


@pytest.fixture
def train_ppo(train):
    def _train_ppo(trainer_class=Keeping, **options):
        return train(trainer_class, LenVMPPOConfig, **PLAIN | options)

    return _train_ppo


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if entry.get(name) is not None]


def weights(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def assert_equal_weights(first, second):
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name


# What the loss gets


def by_hand(rewards, values, lengths, gamma, lam):
    """Advantages of a terminal reward, one sum for each token, in float64."""
    rows = []
    for reward, row, length in zip(rewards.tolist(), values.double().tolist(), lengths.tolist(), strict=True):
        after = [*row[1:length], 0.0]
        deltas = [(reward if t + 1 == length else 0.0) + gamma * after[t] - row[t] for t in range(length)]
        found = [sum((gamma * lam) ** k * deltas[t + k] for k in range(length - t)) for t in range(length)]
        rows.append(found + [0.0] * (len(row) - length))
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("gamma, lam, lam_critic", [(1.0, 0.95, 1.0), (0.9, 1.0, 0.5)])
def test_the_loss_gets_whitened_textbook_advantages_and_decoupled_returns(train_ppo, gamma, lam, lam_critic):
    trainer = train_ppo(gamma=gamma, lam=lam, lam_critic=lam_critic, max_steps=3)
    batch, rewards = trainer.batches[-1], trainer.rewards[-1][:, 0]
    mask, values = batch["completion_mask"].bool(), batch["task_values"]
    assert values[mask].std() > 0.01  # the critic has learned something by now
    lengths = mask.sum(1)
    advantages = by_hand(rewards, values, lengths, gamma, lam)
    chosen = advantages[mask]
    white = (advantages - chosen.mean()) / chosen.std()
    assert_close(batch["advantages"][mask].double(), white[mask], atol=1e-5, rtol=1e-5)
    returns = by_hand(rewards, values, lengths, gamma, lam_critic) + values.double()
    assert_close(batch["task_returns"][mask].double(), returns[mask], atol=1e-6, rtol=1e-6)
    assert not batch["advantages"][~mask].any()


def test_values_are_those_of_the_states_before_the_tokens(train_ppo):
    trainer = train_ppo(max_steps=1, value_learning_rate=1e-30)
    torch.nn.init.normal_(trainer.task_critic.side.model.score.weight)
    batch = trainer.batches[0]
    scored, learned = trainer.task_critic.score(batch), trainer.task_critic.values(batch).detach()
    mask = batch["completion_mask"].bool()
    for row in range(len(mask)):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        completion = batch["completion_ids"][row][mask[row]]
        with torch.no_grad():
            alone = trainer.task_critic.side.model(input_ids=torch.cat([prompt, completion])[None]).logits[0, :, 0]
        expected = alone[len(prompt) - 1 : -1]
        assert_close(scored[row][mask[row]], expected, atol=1e-5, rtol=1e-5)
        assert_close(learned[row][mask[row]], expected, atol=1e-5, rtol=1e-5)


def test_length_adaptive_lambda_is_that_of_each_completion(train_ppo):
    trainer = train_ppo(length_adaptive_lambda=0.5, max_steps=2, whiten_advantages=False)
    batch, rewards = trainer.batches[-1], trainer.rewards[-1][:, 0]
    lengths = batch["completion_mask"].sum(1)
    for row, length in enumerate(lengths.tolist()):
        lam = max(0.0, 1 - 1 / (0.5 * length))
        part = slice(row, row + 1)
        expected = by_hand(rewards[part], batch["task_values"][part], lengths[part], 1.0, lam)
        assert_close(batch["advantages"][part].double(), expected, atol=1e-5, rtol=1e-5)
    expected = [max(0.0, 1 - 2 / length) for length in lengths.tolist()]
    assert logged(trainer, "ppo/lambda")[-1] == pytest.approx(sum(expected) / len(expected))


def test_a_completion_that_no_function_scored_teaches_neither(train_ppo):
    def judge(completions, **_):
        return [None if row == 0 else float(row % 2) for row in range(len(completions))]

    judge.__name__ = "judge"
    batch = train_ppo(reward_funcs=judge, max_steps=2).batches[-1]
    assert not batch["advantages"][0].any() and not batch["task_mask"][0].any()
    mask = batch["completion_mask"].bool()
    assert torch.equal(batch["task_mask"][1:], mask[1:])
    others = batch["advantages"][1:][mask[1:]]
    assert_close(others.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    assert_close(others.std(), torch.tensor(1.0), atol=1e-5, rtol=0)


def test_the_length_advantage_is_added_after_whitening(train_ppo, critic_folder):
    options = {"length_critic": critic_folder, "length_gate": "all", "length_unsolved_groups": True, "max_steps": 1}
    options |= {"length_critic_trust": 0.0}
    plain = train_ppo(**options).batches[0]
    batch = train_ppo(**options | {"length_coef": 0.5}).batches[0]
    assert torch.equal(plain["completion_ids"], batch["completion_ids"])
    assert torch.equal(plain["task_returns"], batch["task_returns"])
    added = (batch["advantages"] - plain["advantages"])[batch["completion_mask"].bool()]
    assert added.std() > 1e-3 and added.abs().max() < 1.0


def test_shaping_enters_the_rewards_and_the_critics_targets(train_ppo, critic_folder):
    options = {"length_critic": critic_folder, "max_steps": 1, "lam": 1.0, "whiten_advantages": False}
    options |= {"length_critic_trust": 0.0}
    plain = train_ppo(**options).batches[0]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        shaped = train_ppo(**options, **{"length_mode": "shaping"} | {"length_coef": 0.5}).batches[0]
    assert not any("what is optimal" in str(warning.message) for warning in said)
    with pytest.warns(UserWarning, match="changes here what is optimal.*: the loss: loss_type='grpo' divides"):
        train_ppo(**options, loss_type="grpo", length_mode="shaping", length_coef=0.5)
    # undiscounted, what is left of the shaping rewards at a token is -beta * Phi
    mask = plain["completion_mask"].bool()
    for name in ("advantages", "task_returns"):
        difference = (shaped[name] - plain[name])[mask]
        assert (difference > 0.05).all() and (difference < 0.5).all()  # -0.5 * V, V in (-0.95, -0.3) for this critic
    assert_close(
        (shaped["advantages"] - plain["advantages"])[mask], (shaped["task_returns"] - plain["task_returns"])[mask]
    )


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_penalty_for_leaving_the_reference_is_taken_from_the_rewards_alone(train_ppo, policy_folder, estimator):
    options = {"beta": 0.5, "kl_in_reward": True, "kl_estimator": estimator, "max_steps": 3, "learning_rate": 1e-2}
    trainer = train_ppo(**options, whiten_advantages=False, lam=1.0, value_learning_rate=1e-30)
    batch, rewards = trainer.batches[-1], trainer.rewards[-1][:, 0]
    mask = batch["completion_mask"].bool()
    difference = batch["old_per_token_logps"] - batch["ref_per_token_logps"]
    assert difference[mask].abs().max() > 1e-3
    penalty = difference if estimator == "k1" else torch.exp(-difference) - 1 + difference
    penalty = torch.where(mask, penalty, 0.0)
    to_go = penalty.flip(1).cumsum(1).flip(1)
    expected = torch.where(mask, rewards[:, None] - 0.5 * to_go, 0.0)  # values are 0
    assert_close(batch["task_returns"], expected, atol=1e-5, rtol=1e-5)
    assert logged(trainer, "ppo/kl")[-1] == pytest.approx((penalty.sum() / mask.sum()).item(), abs=1e-6)
    assert not logged(trainer, "kl")  # TRL's, of the loss
    assert trainer.beta == 0.5


# How the critic learns


def test_the_critic_learns_what_prompts_are_worth(train_ppo, prompts):
    def judge(completions, number, **_):
        return [float(n % 2) for n in number]

    trainer = train_ppo(
        reward_funcs=judge, train_dataset=prompts(16), max_steps=30, learning_rate=1e-9, per_device_train_batch_size=16
    )
    assert logged(trainer, "value/explained_variance")[-1] > 0.9
    assert logged(trainer, "value/prompt_error")[-1] < 0.2 < logged(trainer, "value/prompt_error")[0]
    assert logged(trainer, "value/loss")[-1] < 0.1 * logged(trainer, "value/loss")[0]


def test_minibatches_and_epochs_make_the_critic_step_with_the_policy(train_ppo):
    options = {"per_device_train_batch_size": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 2}
    trainer = train_ppo(**options, num_iterations=2, max_steps=8)
    assert trainer.task_critic.side.steps == 8 and len(trainer.batches) == 2
    # the first step of each window is on the policy that sampled
    kl = logged(trainer, "ppo/approx_kl")
    assert kl[0] == pytest.approx(0.0, abs=1e-6) and kl[4] == pytest.approx(0.0, abs=1e-6)
    assert all(value > 1e-7 for value in (kl[1:4] + kl[5:]))
    assert any(value > 0 for value in logged(trainer, "value/clip_fraction"))


def test_accumulated_minibatches_are_one_large_one(train_ppo):
    large = train_ppo(max_steps=2)
    small = train_ppo(max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert_close(logged(small, "value/loss"), logged(large, "value/loss"), rtol=1e-4, atol=1e-6)
    for name, weight in weights(large.task_critic.side.model).items():
        assert_close(weights(small.task_critic.side.model)[name], weight, atol=1e-4, rtol=1e-3, msg=name)


def test_the_policy_is_frozen_while_the_critic_warms_up(train_ppo, policy_folder):
    start = weights(AutoModelForCausalLM.from_pretrained(policy_folder))
    trainer = train_ppo(max_steps=3, value_warmup_steps=3, weight_decay=0.1, lam_critic=0.0)
    assert_equal_weights(start, weights(trainer.model))
    assert trainer.task_critic.side.steps == 3
    batch, rewards = trainer.batches[-1], trainer.rewards[-1][:, :1]
    mask = batch["completion_mask"].bool()
    assert_close(batch["task_returns"], torch.where(mask, rewards, 0.0).float())  # Monte-Carlo, whatever lam_critic
    freed = train_ppo(max_steps=4, value_warmup_steps=3, weight_decay=0.1)
    assert any(not torch.equal(weight, start[name]) for name, weight in weights(freed.model).items())
    assert logged(freed, "learning_rate")[-1] > 0


def test_a_linear_learning_rate_of_the_critic_ends_with_the_run(train_ppo):
    trainer = train_ppo(max_steps=4, value_lr_schedule="linear", value_lr_warmup_steps=1)
    assert logged(trainer, "value/learning_rate") == pytest.approx([1e-2, 1e-2, 1e-2 * 2 / 3, 1e-2 / 3])


def test_every_metric_is_logged(train_ppo):
    trainer = train_ppo(max_steps=2)
    names = ["loss", "clip_fraction", "grad_norm", "learning_rate", "explained_variance", "mean", "return_mean"]
    names = [f"value/{name}" for name in [*names, "return_std", "bias", "prompt_error"]]
    for name in [*names, "ppo/approx_kl", "ppo/advantage_std", "ppo/lambda", "entropy", "clip_ratio/region_mean"]:
        assert len(logged(trainer, name)) == 2, name
    batch = trainer.batches[-1]
    mask = batch["completion_mask"].bool()
    assert logged(trainer, "value/mean")[-1] == pytest.approx(batch["task_values"][mask].mean().item(), abs=1e-6)
    bias = (batch["task_values"] - batch["task_returns"])[mask].mean().item()
    assert logged(trainer, "value/bias")[-1] == pytest.approx(bias, abs=1e-6)


# Where the critic comes from, and goes to


def test_it_starts_from_the_policy_with_values_of_zero(train_ppo, policy_folder):
    trainer = train_ppo(max_steps=1, value_learning_rate=1e-30)
    critic = trainer.task_critic.side.model
    assert not trainer.batches[0]["task_values"].any()
    policy = AutoModelForCausalLM.from_pretrained(policy_folder)
    assert_equal_weights(weights(policy.model), weights(critic.model))
    assert not {id(weight) for weight in trainer.model.parameters()} & {id(weight) for weight in critic.parameters()}


def test_it_is_saved_as_a_folder_that_transformers_loads_and_a_run_starts_from(train_ppo, tmp_path):
    trainer = train_ppo(max_steps=2)
    trainer.save_model()
    folder = tmp_path / "run" / VALUE_FOLDER
    loaded = AutoModelForTokenClassification.from_pretrained(folder)
    assert type(loaded).__name__ == "LlamaForTokenClassification" and loaded.config.num_labels == 1
    assert_equal_weights(weights(loaded), weights(trainer.task_critic.side.model))
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == 1
    batch = trainer.batches[-1]
    said = trainer.task_critic.score(batch)
    again = train_ppo(value_model=str(folder), max_steps=1, value_learning_rate=1e-30)
    assert_close(again.task_critic.score(batch), said)


def test_a_reward_model_and_a_language_model_may_be_its_start(train_ppo, policy_folder, tokenizer, tmp_path):
    torch.manual_seed(0)
    reward_model = AutoModelForSequenceClassification.from_pretrained(policy_folder, num_labels=1)
    reward_model.save_pretrained(tmp_path / "reward_model")
    tokenizer.save_pretrained(tmp_path / "reward_model")
    trainer = train_ppo(value_model=str(tmp_path / "reward_model"), max_steps=1, value_learning_rate=1e-30)
    score = trainer.task_critic.side.model.score
    assert torch.equal(score.weight, reward_model.score.weight) and score.weight.any()
    assert score.bias.abs() < 1e-20
    trainer = train_ppo(value_model=policy_folder, max_steps=1, value_learning_rate=1e-30)
    assert trainer.task_critic.side.model.score.weight.abs().max() < 1e-20


@pytest.mark.parametrize("value_model", [None, "shared"])
def test_a_policy_with_adapters_has_a_critic_without(train_ppo, policy_folder, value_model):
    from peft import LoraConfig

    adapters = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = train_ppo(peft_config=adapters, value_model=value_model, max_steps=2, beta=0.1, kl_in_reward=True)
    assert trainer.task_critic.side.steps == 2 and len(logged(trainer, "value/loss")) == 2
    if value_model is None:
        names = set(weights(trainer.task_critic.side.model))
        assert names == {*weights(AutoModelForTokenClassification.from_pretrained(policy_folder, num_labels=1))}
    else:
        assert not any("v_head" in name or "summary" in name for name in weights(trainer.model))


def test_evaluation_learns_nothing(train_ppo, prompts):
    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": prompts(4), "per_device_eval_batch_size": 2}
    trainer = train_ppo(max_steps=2, **options)
    assert trainer.task_critic.side.steps == 2
    assert len(logged(trainer, "eval_value/mean")) == 2 and len(logged(trainer, "value/loss")) == 2


def test_the_first_completions_are_those_of_grpo(train, train_ppo):
    class KeepingGRPO(KeepsBatches, LenVMGRPOTrainer):
        pass

    options = {"num_generations": 4, "max_steps": 1}
    grpo, ppo = train(KeepingGRPO, length_coef=0.0, **options), train_ppo(**options)
    assert torch.equal(grpo.batches[0]["completion_ids"], ppo.batches[0]["completion_ids"])


def test_a_head_on_the_policy_learns_without_touching_it(train_ppo, prompts):
    def judge(completions, number, **_):
        return [float(n % 2) for n in number]

    options = {"reward_funcs": judge, "train_dataset": prompts(16), "per_device_train_batch_size": 16}
    options |= {"value_model": "shared", "value_warmup_steps": 30, "max_steps": 30, "value_learning_rate": 3e-2}
    trainer = train_ppo(**options)
    assert logged(trainer, "value/explained_variance")[-1] > 0.5
    assert not (Path(trainer.args.output_dir) / VALUE_FOLDER).exists()


def test_a_weight_lets_the_value_loss_into_the_policy(train_ppo):
    options = {"value_model": "shared", "max_steps": 1, "seed": 1, "max_grad_norm": 0.0}

    class Drawn(Keeping):
        def _prepare_task_critic(self, model):
            critic = super()._prepare_task_critic(model)
            torch.manual_seed(0)
            torch.nn.init.normal_(critic.side.model.summary.weight)
            return critic

    norms = [
        logged(train_ppo(Drawn, **options, value_backbone_coef=coef), "grad_norm")[0] for coef in (0.0, 1e-9, 100.0)
    ]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4) and norms[2] > 5 * norms[0]
    without, within = (train_ppo(Drawn, **options, value_backbone_coef=coef) for coef in (0.0, 0.5))
    expected = logged(without, "loss")[0] + 0.5 * logged(without, "value/loss")[0]
    assert logged(within, "loss")[0] == pytest.approx(expected, rel=1e-4)  # by the head before its step


# Resume


def test_a_resumed_run_is_the_one_that_was_not_interrupted(train_ppo, tmp_path, prompts):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "train_dataset": prompts(24)}
    options |= {"value_lr_schedule": "linear", "value_warmup_steps": 1}
    whole = train_ppo(**options)
    resumed = train_ppo(**options, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_equal_weights(weights(whole.model), weights(resumed.model))
    assert_equal_weights(weights(whole.task_critic.side.model), weights(resumed.task_critic.side.model))
    states = [trainer.task_critic.side.optimizer.state_dict()["state"] for trainer in (whole, resumed)]
    for number, state in states[0].items():
        for name, value in state.items():
            assert torch.equal(value, states[1][number][name]), (number, name)
    assert logged(whole, "value/loss") == logged(resumed, "value/loss")
    assert whole.task_critic.side.steps == resumed.task_critic.side.steps == 5


# What is refused, and said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value_learning_rate": 0.0}, "learning rate of the task critic .* is 0.0, under which it never learns"),
        ({"gamma": 1.1}, r"gamma must lie in \[0, 1\], got 1.1"),
        ({"lam": -0.1}, r"lam must lie in \[0, 1\], got -0.1"),
        ({"lam_critic": 2.0}, r"lam_critic must lie in \[0, 1\], got 2.0"),
        ({"length_adaptive_lambda": 0.0}, "length_adaptive_lambda=0.0 is out of range"),
        ({"value_clip": -1.0}, "value_clip=-1.0 is out of range"),
        ({"value_backbone_coef": 0.1}, "the task critic is a model of its own: set value_model='shared'"),
        ({"dynamic_sampling": True}, "compare the completions of a group"),
        ({"length_mode": "shaping", "length_clip": 1.0, "length_coef": 1.0}, "length_clip would do nothing"),
        ({"kl_in_reward": True}, "kl_in_reward needs a weight: set beta"),
        ({"kl_in_reward": True, "beta": 0.1, "kl_estimator": "k2"}, "kl_estimator must be one of k1, k3, got 'k2'"),
        ({"importance_sampling_level": "sequence"}, "averages token advantages back"),
        ({"per_device_train_batch_size": 1}, "one completion has nothing to be compared with"),
    ],
)
def test_settings_that_cannot_work_are_refused(tiny_run, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        LenVMPPOConfig(str(tmp_path), **tiny_run | PLAIN | options)


def test_one_completion_per_prompt_is_allowed_for_any_batch(tiny_run, tmp_path):
    args = LenVMPPOConfig(str(tmp_path), **tiny_run | PLAIN | {"per_device_train_batch_size": 3})
    assert args.num_generations == 1 and args.num_generations_eval is None and args.generation_batch_size == 3


def test_a_dataset_smaller_than_a_batch_is_refused(train_ppo, prompts):
    with pytest.raises(ValueError, match="needs 8 prompts, with num_generations=1, but the dataset has 6"):
        train_ppo(train_dataset=prompts(6))


def test_a_critic_of_another_tokenizer_is_refused(train_ppo, policy_folder, tmp_path):
    folder = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(policy_folder).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"other' has another tokenizer \([0-9,]+ tokens\) than the policy"):
        train_ppo(value_model=str(folder))


def test_a_loaded_critic_may_be_given_and_one_that_cannot_be_a_critic_is_refused(train_ppo, policy_folder, tokenizer):
    critic = AutoModelForTokenClassification.from_pretrained(policy_folder, num_labels=1)
    assert critic.dropout.p > 0
    torch.nn.init.ones_(critic.score.weight)

    class Given(Keeping):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, value_model=critic, **kwargs)

    trainer = train_ppo(Given, max_steps=1)
    assert trainer.task_critic.side.model is critic and critic.dropout.p == 0
    assert trainer.batches[0]["task_values"].abs().max() > 0.1
    for wrong, message in (
        (AutoModelForCausalLM.from_pretrained(policy_folder), "LlamaForCausalLM, which gives no single value"),
        (AutoModelForTokenClassification.from_pretrained(policy_folder, num_labels=2), "gives no single value"),
    ):
        with pytest.raises(ValueError, match=message):
            taken_over(wrong, tokenizer)
    small = LlamaForTokenClassification(LlamaConfig(vocab_size=50, hidden_size=32, num_labels=1, num_hidden_layers=1))
    with pytest.raises(ValueError, match="value_model has 50 embeddings, but the policy uses token ids up to 123"):
        taken_over(small, tokenizer)


def test_a_classifier_of_several_labels_is_refused(train_ppo, policy_folder, tmp_path):
    model = AutoModelForTokenClassification.from_pretrained(policy_folder, num_labels=3)
    model.save_pretrained(tmp_path / "three")
    with pytest.raises(ValueError, match="three' has 3 labels, and a state has one value"):
        train_ppo(value_model=str(tmp_path / "three"))


def test_a_value_that_is_not_finite_stops_the_run(train_ppo):
    class Broken(LenVMPPOTrainer):
        def _prepare_task_critic(self, model):
            critic = super()._prepare_task_critic(model)
            critic.side.model.score.bias.data.fill_(math.nan)
            return critic

    with pytest.raises(ValueError, match=r"task critic gave a value that is not finite for completion 0 .* diverged"):
        train_ppo(Broken)


def test_a_critic_that_is_worse_than_a_constant_for_too_long_is_reported():
    watch = ValueWatch(patience=3)
    said = [watch.observe(value) for value in (-1.0, -0.1, 0.2, -1.0, math.nan, -2.0, -3.0, math.nan, -1.0, -1.0, -1.0)]
    assert [place for place, spoken in enumerate(said) if spoken] == [6, 10]
    assert "explained less than nothing of the returns for 6 batches in a row" in watch.report(1e-3)
    again = ValueWatch(patience=3)
    again.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert again.below == 6 and not again.observe(0.0) and again.below == 0
    assert not any(ValueWatch(patience=0).observe(-1.0) for _ in range(5))


def test_the_report_is_one_line_of_the_log(train_ppo, caplog):
    class Astray(LenVMPPOTrainer):
        def _use_task_advantages(self, rollouts, advantages, returns, length_part):
            self._task_values = -5.0 * returns + torch.arange(returns.size(1))
            super()._use_task_advantages(rollouts, advantages, returns, length_part)

    train_ppo(Astray, value_patience=2, max_steps=3)
    lines = [record.message for record in caplog.records if "explained less than nothing" in record.message]
    assert len(lines) == 1 and "\n" not in lines[0] and "for 2 batches in a row" in lines[0]
