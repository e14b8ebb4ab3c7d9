import math
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    T5Config,
)

from lenvm_rl.length import gamma_from_horizon, logit_to_remaining
from lenvm_rl.model import LengthValueConfig, LengthValueModel

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BACKBONES = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
}
PROVENANCE = {"generator": "Qwen/Qwen2.5-7B-Instruct", "temperature": 0.7, "top_p": 0.95, "max_tokens": 4096}


@pytest.fixture(params=BACKBONES)
def language_model(request):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(BACKBONES[request.param])


@pytest.fixture
def critic(language_model):
    return trained(LengthValueModel.from_backbone(language_model, gamma=0.997, **PROVENANCE))


def trained(model):
    """A head that is not zero, as if it had been trained."""
    torch.manual_seed(1)
    torch.nn.init.normal_(model.v_head.summary.weight)
    torch.nn.init.normal_(model.v_head.summary.bias)
    return model


def tokens(batch=3, length=7):
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(2))


def assert_same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_logits_are_the_two_layer_head_on_the_normalised_hidden_state(critic, language_model):
    ids = tokens()
    # the last of the hidden states is taken after the final norm
    hidden = language_model(ids, output_hidden_states=True).hidden_states[-1]
    fc, summary = critic.v_head.fc, critic.v_head.summary
    inner = hidden @ fc.weight.T + fc.bias
    expected = ((inner * torch.sigmoid(inner)) @ summary.weight.T + summary.bias)[..., 0]
    assert_close(critic(ids).logits, expected)
    assert_close(critic.values(ids), -1.0 / (1.0 + torch.exp(-expected)))


def test_no_module_ever_computes_vocabulary_logits(critic):
    widths = {}
    for name, module in critic.named_modules():

        def record(_module, _inputs, output, name=name):
            if isinstance(output, torch.Tensor):
                widths[name] = output.shape[-1] if output.dim() > 2 else 0

        module.register_forward_hook(record)
    critic(tokens())
    assert widths["v_head.fc"] == 32
    assert 64 not in widths.values()  # the vocabulary; no other width of these models is 64
    assert not any("lm_head" in name for name, _ in critic.named_modules())
    assert critic.get_output_embeddings() is None


def test_padding_on_either_side_changes_nothing(critic):
    ids = tokens(batch=1, length=6)
    alone = critic(ids).logits
    left = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1)
    right = torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], dim=1)
    on, off = torch.ones(1, 6, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long)
    assert_close(critic(left, attention_mask=torch.cat([off, on], dim=1)).logits[:, 4:], alone)
    assert_close(critic(right, attention_mask=torch.cat([on, off], dim=1)).logits[:, :6], alone)
    assert_close(critic(left, attention_mask=torch.cat([off, on], dim=1).bool()).logits[:, 4:], alone)


def test_given_positions_are_used(critic):
    ids = tokens()
    positions = torch.arange(7).expand(3, 7)
    assert_close(critic(ids, position_ids=positions).logits, critic(ids).logits)
    assert not torch.allclose(critic(ids, position_ids=positions * 5).logits, critic(ids).logits)


def test_a_cached_prefix_gives_the_values_of_the_whole(critic):
    ids = torch.cat([torch.zeros(3, 2, dtype=torch.long), tokens()], dim=1)
    mask = (ids > 0).long()
    whole = critic(ids, mask).logits
    prefix = critic(ids[:, :5], mask[:, :5], use_cache=True)
    rest = critic(ids[:, 5:], mask, past_key_values=prefix.past_key_values).logits
    assert_close(rest, whole[:, 5:])
    assert critic(ids, mask).past_key_values is None


def test_bfloat16_weights_give_float32_logits_with_float32_resolution(critic):
    half = critic.to(torch.bfloat16)
    logits = half(tokens()).logits
    assert logits.dtype == torch.float32
    assert half.values(tokens()).dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())
    hidden = half.model(tokens()).last_hidden_state.double()
    head = half.v_head
    inner = torch.nn.functional.silu(hidden @ head.fc.weight.double().T + head.fc.bias.double())
    expected = (inner @ head.summary.weight.double().T + head.summary.bias.double())[..., 0]
    assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)


def test_autocast_does_not_reach_the_head(critic):
    hidden = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(3))
    expected = critic.v_head(hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(critic.v_head(hidden), expected)
        assert critic(tokens()).logits.dtype == torch.float32


def test_save_and_reload_is_exact(critic, tmp_path):
    critic.save_pretrained(tmp_path)
    loaded = LengthValueModel.from_pretrained(tmp_path)
    assert_same_weights(loaded, critic)
    assert not loaded.training
    # equal weights, other addresses: CPU kernels differ in the last bit with the alignment
    assert_close(loaded(tokens()).logits, critic(tokens()).logits, rtol=1e-5, atol=1e-6)
    again = LengthValueModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens()).logits, again(tokens()).logits)


def test_gamma_provenance_and_backbone_survive_the_reload(critic, tmp_path):
    critic.save_pretrained(tmp_path)
    config = LengthValueModel.from_pretrained(tmp_path).config
    assert config.gamma == 0.997
    assert {name: getattr(config, name) for name in PROVENANCE} == PROVENANCE
    assert type(config.backbone_config) is type(critic.config.backbone_config)
    assert config.backbone_config.to_dict() == critic.config.backbone_config.to_dict()


def test_a_config_survives_the_round_trip_exactly(tmp_path):
    config = LengthValueConfig(backbone_config=BACKBONES["qwen3"], gamma=gamma_from_horizon(1533), **PROVENANCE)
    config.save_pretrained(tmp_path)
    loaded = LengthValueConfig.from_pretrained(tmp_path)
    assert loaded.to_json_string() == config.to_json_string()
    assert loaded.gamma == gamma_from_horizon(1533)
    assert isinstance(loaded.backbone_config, Qwen3Config)
    assert (loaded.hidden_size, loaded.vocab_size) == (32, 64)


def test_the_auto_classes_know_the_format(critic, tmp_path):
    critic.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), LengthValueConfig)
    assert_same_weights(AutoModel.from_pretrained(tmp_path), critic)


def test_reload_in_another_dtype_and_attention(critic, tmp_path):
    critic.save_pretrained(tmp_path)
    loaded = LengthValueModel.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.model.config._attn_implementation == "eager"
    assert loaded(tokens()).logits.dtype == torch.float32
    loaded.save_pretrained(tmp_path / "half")
    assert LengthValueModel.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    assert LengthValueModel.from_pretrained(tmp_path).model.config._attn_implementation == "sdpa"


def test_from_backbone_takes_the_weights_of_a_model_in_memory(language_model):
    critic = LengthValueModel.from_backbone(language_model, gamma=0.9)
    assert_same_weights(critic.model, language_model.model)
    assert_same_weights(LengthValueModel.from_backbone(language_model.model, gamma=0.9).model, language_model.model)


def test_a_model_in_memory_is_copied_and_left_alone(language_model):
    critic = LengthValueModel.from_backbone(language_model, gamma=0.9)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.add_(1.0)
    assert_same_weights(LengthValueModel.from_backbone(language_model, gamma=0.9).model, language_model.model)
    assert critic.config.backbone_config is not language_model.config


def test_from_backbone_takes_the_weights_of_a_path(language_model, tmp_path):
    language_model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    critic = LengthValueModel.from_backbone(tmp_path, gamma=0.9)
    assert_same_weights(critic.model, language_model.model)
    assert critic.config.backbone_config.model_type == language_model.config.model_type
    torch.manual_seed(5)
    assert_same_weights(LengthValueModel.from_backbone(str(tmp_path), gamma=0.9), critic)
    assert LengthValueModel.from_backbone(tmp_path, gamma=0.9, dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, bos_token_id=1, eos_token_id=2),
        Qwen3MoeConfig(**SIZES, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2),
    ],
    ids=["another base model prefix", "mixture of experts"],
)
def test_other_decoders_work_from_a_path_too(config, tmp_path):
    language_model = AutoModelForCausalLM.from_config(config).eval()
    language_model.save_pretrained(tmp_path / "lm")
    critic = LengthValueModel.from_backbone(tmp_path / "lm", gamma=0.9)
    assert_same_weights(critic.model, language_model.base_model)
    trained(critic).save_pretrained(tmp_path / "critic")
    assert_same_weights(LengthValueModel.from_pretrained(tmp_path / "critic"), critic)


def test_a_fresh_head_says_fifteen_percent_of_the_horizon_everywhere(language_model):
    gamma = gamma_from_horizon(1000)
    critic = LengthValueModel.from_backbone(language_model, gamma=gamma)
    logits = critic(tokens()).logits
    assert torch.equal(logits, torch.zeros(3, 7))
    assert logit_to_remaining(logits, gamma).mean().item() == pytest.approx(150.5, abs=0.1)
    assert 0.015 < critic.v_head.fc.weight.std() < 0.025
    assert torch.equal(critic.v_head.fc.bias, torch.zeros(32))


def test_a_fresh_head_learns_and_reaches_the_backbone(language_model):
    critic = LengthValueModel.from_backbone(language_model, gamma=0.9).train()
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)
    target = torch.linspace(-0.9, 0.0, 7).expand(3, 7)
    for _ in range(2):
        optimizer.zero_grad()
        (critic.values(tokens()) - target).square().mean().backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in critic.parameters())
    assert critic.model.embed_tokens.weight.grad.abs().sum() > 0


def test_a_fresh_head_is_seeded_by_torch(language_model):
    def first_layer(seed):
        torch.manual_seed(seed)
        return LengthValueModel.from_backbone(language_model, gamma=0.9).v_head.fc.weight

    assert torch.equal(first_layer(7), first_layer(7))
    assert not torch.equal(first_layer(7), first_layer(8))


def test_building_from_a_config_alone_gives_a_random_model():
    model = LengthValueModel(LengthValueConfig(backbone_config=BACKBONES["llama"].to_dict(), gamma=0.9))
    assert torch.equal(model(tokens()).logits, torch.zeros(3, 7))
    assert model.model.embed_tokens.weight.std() > 0


def test_gradient_checkpointing_gives_the_same_gradients(critic):
    critic.train()
    critic(tokens()).logits.sum().backward()
    plain = {name: parameter.grad.clone() for name, parameter in critic.named_parameters()}
    critic.zero_grad()
    critic.gradient_checkpointing_enable()
    assert critic.is_gradient_checkpointing
    critic(tokens()).logits.sum().backward()
    for name, parameter in critic.named_parameters():
        assert_close(parameter.grad, plain[name])


def test_the_backbone_says_which_layers_must_not_be_split(critic):
    assert set(critic._no_split_modules) == set(critic.model._no_split_modules)
    assert len(critic._no_split_modules) == 1


@pytest.mark.slow  # a fresh interpreter imports torch and transformers
def test_importing_the_model_pulls_in_no_trainer():
    code = "import sys, lenvm_rl.model; print([m for m in ('trl', 'deepspeed', 'wandb') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# errors


def test_a_model_without_gamma_is_refused():
    with pytest.raises(ValueError, match=r"LengthValueConfig.gamma is not set.*gamma_from_horizon"):
        LengthValueModel(LengthValueConfig(backbone_config=BACKBONES["llama"]))


def test_a_model_without_backbone_is_refused():
    with pytest.raises(ValueError, match="from_backbone"):
        LengthValueModel(LengthValueConfig(gamma=0.9))


@pytest.mark.parametrize("gamma", [0.0, 1.0, 1.2, math.nan, None])
def test_a_gamma_outside_the_open_interval_is_refused(language_model, gamma):
    with pytest.raises(ValueError, match="gamma_from_horizon"):
        LengthValueModel.from_backbone(language_model, gamma=gamma)


def test_a_gamma_that_contradicts_the_stored_one_is_refused(critic, tmp_path):
    critic.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"gamma=0\.9997 was asked for, but .* was trained with gamma=0\.997"):
        LengthValueModel.from_pretrained(tmp_path, gamma=0.9997)
    with pytest.raises(ValueError, match="open interval"):
        LengthValueModel.from_pretrained(tmp_path, gamma=1.0)
    # 0.9970005, rounded: the same horizon
    assert LengthValueModel.from_pretrained(tmp_path, gamma=gamma_from_horizon(1533)).config.gamma == 0.997


def test_a_stored_config_without_gamma_needs_an_explicit_one(critic, tmp_path):
    critic.config.gamma = None
    critic.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gamma is not set"):
        LengthValueModel.from_pretrained(tmp_path)
    assert LengthValueModel.from_pretrained(tmp_path, gamma=0.99).config.gamma == 0.99


@pytest.mark.parametrize("load", [LengthValueModel.from_pretrained, LengthValueModel.from_backbone])
def test_a_path_that_does_not_exist_is_named_in_one_sentence(load, tmp_path):
    with pytest.raises(OSError, match=r"^'.*nowhere' is no folder on this machine, and no model of this name [^.]*\.$"):
        load(str(tmp_path / "nowhere"), gamma=0.9)


def test_a_folder_without_a_config_is_named(tmp_path):
    with pytest.raises(OSError, match=r"has no config\.json"):
        LengthValueModel.from_pretrained(tmp_path)


def test_a_checkpoint_with_missing_tensors_is_refused(critic, tmp_path):
    state = critic.state_dict()
    critic.save_pretrained(tmp_path, state_dict={k: v for k, v in state.items() if k != "v_head.fc.bias"})
    with pytest.raises(ValueError, match=r"lacks 1 of the model's tensors \(v_head.fc.bias\)"):
        LengthValueModel.from_pretrained(tmp_path)
    language_model = AutoModelForCausalLM.from_config(BACKBONES["llama"])
    state = language_model.state_dict()
    language_model.save_pretrained(tmp_path / "lm", state_dict={k: v for k, v in state.items() if ".1." not in k})
    with pytest.raises(ValueError, match=r"lacks 9 of the model's tensors \(model\.layers\.1\."):
        LengthValueModel.from_backbone(tmp_path / "lm", gamma=0.9)


def test_a_vision_language_backbone_is_refused(tmp_path):
    config = Qwen2_5_VLConfig()
    with pytest.raises(ValueError, match="vision-language critics are not supported"):
        LengthValueConfig(backbone_config=config, gamma=0.9)
    config.save_pretrained(tmp_path)
    for load in (LengthValueModel.from_pretrained, LengthValueModel.from_backbone):
        with pytest.raises(ValueError, match="vision-language critics are not supported"):
            load(tmp_path, gamma=0.9)


def test_an_encoder_decoder_is_refused():
    with pytest.raises(ValueError, match="decoder-only"):
        LengthValueConfig(backbone_config=T5Config(), gamma=0.9)


def test_a_critic_is_no_backbone(critic, tmp_path):
    critic.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a LenVM already"):
        LengthValueModel.from_backbone(tmp_path, gamma=0.9)


def test_a_wrapped_model_is_no_backbone(language_model):
    with pytest.raises(ValueError, match="unwrap"):
        LengthValueModel.from_backbone(torch.nn.DataParallel(language_model), gamma=0.9)
