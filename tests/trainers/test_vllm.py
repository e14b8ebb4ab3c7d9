"""What TRL and we do around vLLM, with an engine that stands in for it: vLLM itself runs on GPUs only."""

import random
from types import SimpleNamespace

import pytest
import torch
from trl import GRPOConfig
from trl.trainer import grpo_trainer

from lenvm_rl.trainers.grpo import LenVMGRPOConfig, LenVMGRPOTrainer

MODES = pytest.mark.parametrize("mode", ["colocate", "server"])
LIMIT = 12


class Engine:
    """Completions of one to twelve random tokens, whose probabilities are far from the policy's."""

    made: "Engine"

    def __init__(self, model, mode, **settings):
        self.model, self.mode, self.settings, self.synced = model, mode, settings, []
        info = {"model_config": {"logprobs_mode": "processed_logprobs"}}
        self.vllm_client = SimpleNamespace(get_server_info=lambda: info)
        self.random = random.Random(0)
        Engine.made = self

    def sync_weights(self):
        self.synced.append({name for name, _ in self.model.named_parameters()})

    def generate(self, prompts, images, num_generations, profiler):
        lengths = [self.random.randint(1, LIMIT) for _ in prompts]
        ids = [[self.random.randint(2, 60) for _ in range(length - 1)] + [1] for length in lengths]
        logprobs = [[[-20.0 * (token % 2)] for token in row] for row in ids]
        return None, ids, logprobs, None


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(grpo_trainer, "VLLMGeneration", Engine)


class Recording(LenVMGRPOTrainer):
    def _compute_loss(self, model, inputs):
        self.__dict__.setdefault("seen", []).append({k: v.clone() for k, v in inputs.items()})
        return super()._compute_loss(model, inputs)


@MODES
def test_ratios_are_cut_token_by_token(engine, train, critic_folder, mode):
    trainer = train(Recording, length_critic=critic_folder, length_gate="all", use_vllm=True, vllm_mode=mode)
    assert Engine.made.mode == mode and Engine.made.settings["max_completion_length"] == LIMIT
    for batch in trainer.seen:
        mask, ratio = batch["completion_mask"].bool(), batch["importance_sampling_ratio"]
        assert ratio.shape == batch["advantages"].shape == mask.shape
        assert (ratio[mask] <= 3.0).all() and (ratio == 3.0).any() and (ratio[mask] < 3.0).any()
        assert batch["advantages"][mask].abs().gt(0).all()  # no completion was dropped
    assert all(torch.isfinite(weight).all() for weight in trainer.model.parameters())


@MODES
def test_vllm_is_sent_the_policy_and_no_critic(engine, train, critic_folder, mode):
    trainer = train(length_critic=critic_folder, use_vllm=True, vllm_mode=mode)
    assert len(Engine.made.synced) == 2  # once for each step
    for names in Engine.made.synced:
        assert names == {name for name, _ in trainer.model.named_parameters()}
        assert not any("v_head" in name for name in names)


@pytest.mark.parametrize("correction", ["token_truncate", "sequence_mask"])
def test_dynamic_sampling_merges_ratios(engine, train, correction):
    trainer = train(
        Recording,
        use_vllm=True,
        length_coef=0.0,
        dynamic_sampling=True,
        vllm_importance_sampling_mode=correction,
        reward_funcs=lambda completion_ids, **_: [float(len(ids) > 9) for ids in completion_ids],
    )
    for batch in trainer.seen:
        width = batch["completion_mask"].size(1) if correction == "token_truncate" else 1
        assert batch["importance_sampling_ratio"].shape == (8, width)


@MODES
def test_the_default_suits_long_reasoning_and_gives_way(tiny_run, tmp_path, mode):
    assert GRPOConfig(str(tmp_path), **tiny_run).vllm_importance_sampling_mode == "sequence_mask"
    options = {**tiny_run, "use_vllm": True, "vllm_mode": mode}
    config = LenVMGRPOConfig(str(tmp_path), **options)
    assert config.vllm_importance_sampling_mode == "token_truncate"
    assert config.vllm_importance_sampling_correction and config.vllm_importance_sampling_clip_max == 3.0
    options["vllm_importance_sampling_mode"] = "token_mask"
    assert LenVMGRPOConfig(str(tmp_path), **options).vllm_importance_sampling_mode == "token_mask"
