import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from lenvm_rl.model import LengthValueModel
from lenvm_rl.official_checkpoint import HEAD_KEYS
from lenvm_rl.tokenizer_fingerprint import check_same_tokenizer, vocabulary_fingerprint

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


def language_model(tied=False, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**SIZES, tie_word_embeddings=tied))
    return model.to(dtype)


def value_head():
    generator = torch.Generator().manual_seed(1)
    shapes = ((32, 32), (32,), (1, 32), (1,))
    return {key: torch.randn(shape, generator=generator) for key, shape in zip(HEAD_KEYS, shapes, strict=True)}


def write_official(folder, model, head, prefix="", **save_options):
    """What the authors' trainer leaves behind: a causal LM, its plain config, and the head in a file of its own."""
    model.save_pretrained(folder, **save_options)
    if head:
        save_file({prefix + key: tensor for key, tensor in head.items()}, folder / "value_head.safetensors")
    return folder


def rewrite_weights(folder, change):
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})


def assert_holds(critic, model, head):
    state = critic.state_dict()
    expected = {f"model.{key}": tensor for key, tensor in model.model.state_dict().items()} | head
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("tied", [False, True])
def test_the_official_layout_is_read(tied, tmp_path):
    model, head = language_model(tied), value_head()
    critic = LengthValueModel.from_pretrained(
        write_official(tmp_path, model, head), gamma=0.997, generator="Qwen/Qwen2.5-7B-Instruct", temperature=1.0
    )
    assert_holds(critic, model, head)
    assert critic.config.gamma == 0.997
    assert (critic.config.generator, critic.config.temperature) == ("Qwen/Qwen2.5-7B-Instruct", 1.0)
    assert critic.config.name_or_path == str(tmp_path)
    ids = torch.arange(3, 10)[None]
    hidden = model(ids, output_hidden_states=True).hidden_states[-1]
    inner = torch.nn.functional.silu(hidden @ head["v_head.fc.weight"].T + head["v_head.fc.bias"])
    expected = (inner @ head["v_head.summary.weight"].T + head["v_head.summary.bias"])[..., 0]
    torch.testing.assert_close(critic(ids).logits, expected)


def test_an_official_checkpoint_can_be_saved_in_our_format(tmp_path):
    model, head = language_model(), value_head()
    critic = LengthValueModel.from_pretrained(write_official(tmp_path / "official", model, head), gamma=0.997)
    critic.save_pretrained(tmp_path / "ours")
    loaded = LengthValueModel.from_pretrained(tmp_path / "ours")
    assert_holds(loaded, model, head)
    assert loaded.config.gamma == 0.997


def test_tied_embeddings_saved_as_lm_head_only_are_found(tmp_path):
    # the authors' trainer keeps the alphabetically first of two names for one tensor
    model, head = language_model(tied=True), value_head()
    write_official(tmp_path, model, head)

    def keep_lm_head(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        return tensors

    rewrite_weights(tmp_path, keep_lm_head)
    assert_holds(LengthValueModel.from_pretrained(tmp_path, gamma=0.997), model, head)


def test_untied_embeddings_that_are_missing_are_not_made_up(tmp_path):
    write_official(tmp_path, language_model(), value_head())
    rewrite_weights(tmp_path, lambda tensors: {k: t for k, t in tensors.items() if k != "model.embed_tokens.weight"})
    with pytest.raises(ValueError, match=r"lacks 1 of the model's tensors \(model.embed_tokens.weight\)"):
        LengthValueModel.from_pretrained(tmp_path, gamma=0.997)


@pytest.mark.parametrize("prefix", ["pretrained_model.", "retrained_model."])
def test_the_training_wrappers_prefix_is_removed(prefix, tmp_path):
    model, head = language_model(), value_head()
    write_official(tmp_path, model, head, prefix=prefix)
    rewrite_weights(tmp_path, lambda tensors: {prefix + key: tensor for key, tensor in tensors.items()})
    assert_holds(LengthValueModel.from_pretrained(tmp_path, gamma=0.997), model, head)


def test_sharded_weights_are_read(tmp_path):
    model, head = language_model(), value_head()
    write_official(tmp_path, model, head, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists() and len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_holds(LengthValueModel.from_pretrained(tmp_path, gamma=0.997), model, head)


def test_a_missing_shard_is_named(tmp_path):
    write_official(tmp_path, language_model(), value_head(), max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=rf"lacks {shard.name}, which its index names"):
        LengthValueModel.from_pretrained(tmp_path, gamma=0.997)


def test_a_head_inside_the_main_weights_is_read(tmp_path):
    model, head = language_model(), value_head()
    write_official(tmp_path, model, {})
    rewrite_weights(tmp_path, lambda tensors: tensors | head)
    assert_holds(LengthValueModel.from_pretrained(tmp_path, gamma=0.997), model, head)


def test_a_head_saved_by_torch_is_read_without_running_its_code(tmp_path):
    model, head = language_model(), value_head()
    write_official(tmp_path, model, {})
    torch.save(head, tmp_path / "value_head.bin")
    assert_holds(LengthValueModel.from_pretrained(tmp_path, gamma=0.997), model, head)

    class Payload:
        def __reduce__(self):
            return (print, ("this must not run",))

    torch.save({"v_head.fc.weight": Payload()}, tmp_path / "value_head.bin")
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        LengthValueModel.from_pretrained(tmp_path, gamma=0.997)


def test_bfloat16_weights_keep_their_dtype_unless_another_is_asked_for(tmp_path):
    model, head = language_model(dtype=torch.bfloat16), value_head()
    write_official(tmp_path, model, {k: t.bfloat16() for k, t in head.items()})
    critic = LengthValueModel.from_pretrained(tmp_path, gamma=0.997)
    assert {parameter.dtype for parameter in critic.parameters()} == {torch.bfloat16}
    assert critic(torch.arange(3, 10)[None]).logits.dtype == torch.float32
    assert LengthValueModel.from_pretrained(tmp_path, gamma=0.997, dtype=torch.float32).dtype == torch.float32


def test_llama_checkpoints_are_read_too(tmp_path):
    model, head = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)), value_head()
    assert_holds(LengthValueModel.from_pretrained(write_official(tmp_path, model, head), gamma=0.997), model, head)


def test_the_folders_tokenizer_is_remembered_without_its_end_token(tmp_path):
    # the tokenizer in the folder is the LenVM backbone's: same vocabulary, but Qwen3 base ends otherwise than instruct
    vocabulary = {f"t{i}": i for i in range(60)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, "t0")), eos_token="t2")
    # not a Qwen2 folder: AutoTokenizer turns a word-level tokenizer in one into a BPE one (transformers 5.23)
    write_official(tmp_path, AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)), value_head())
    tokenizer.save_pretrained(tmp_path)
    config = LengthValueModel.from_pretrained(tmp_path, gamma=0.997).config
    assert config.tokenizer_fingerprint == vocabulary_fingerprint(tokenizer)
    assert config.tokenizer_size == 60
    tokenizer.eos_token = "t3"
    check_same_tokenizer(tokenizer, config)


# errors


def test_a_missing_gamma_is_an_error_that_says_what_to_pass(tmp_path):
    write_official(tmp_path, language_model(), value_head())
    with pytest.raises(ValueError, match=r"does not store its discount.*gamma=0\.997"):
        LengthValueModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("gamma", [0.0, 1.0, -3.0])
def test_a_gamma_outside_the_open_interval_is_refused(gamma, tmp_path):
    write_official(tmp_path, language_model(), value_head())
    with pytest.raises(ValueError, match="open interval"):
        LengthValueModel.from_pretrained(tmp_path, gamma=gamma)


@pytest.mark.parametrize("gamma", [0.997, None])
def test_a_plain_language_model_is_told_apart(gamma, tmp_path):
    write_official(tmp_path, language_model(), {})
    with pytest.raises(ValueError, match=r"has no value head .* plain language model.*pretrain_lenvm\.py"):
        LengthValueModel.from_pretrained(tmp_path, gamma=gamma)


@pytest.mark.parametrize("missing", HEAD_KEYS)
def test_every_tensor_of_the_head_is_required(missing, tmp_path):
    write_official(tmp_path, language_model(), {k: t for k, t in value_head().items() if k != missing})
    with pytest.raises(ValueError, match=f"lacks {missing}:"):
        LengthValueModel.from_pretrained(tmp_path, gamma=0.997)


def test_a_one_layer_head_is_refused(tmp_path):
    write_official(tmp_path, language_model(), {k: t for k, t in value_head().items() if "summary" in k})
    with pytest.raises(ValueError, match=r"one-layer value head .*pretrain_lenvm\.py"):
        LengthValueModel.from_pretrained(tmp_path, gamma=0.997)


def test_a_vision_tower_in_the_weights_is_refused(tmp_path):
    write_official(tmp_path, language_model(), value_head())
    rewrite_weights(tmp_path, lambda tensors: tensors | {"visual.patch_embed.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match="vision-language critics are not supported"):
        LengthValueModel.from_pretrained(tmp_path, gamma=0.997)


def test_pickled_main_weights_are_refused(tmp_path):
    model = write_official(tmp_path, language_model(), value_head())
    torch.save(load_file(model / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor"):
        LengthValueModel.from_pretrained(tmp_path, gamma=0.997)


def test_a_missing_layer_is_an_error_not_a_random_one(tmp_path):
    write_official(tmp_path, language_model(), value_head())
    rewrite_weights(tmp_path, lambda tensors: {k: t for k, t in tensors.items() if ".1.mlp" not in k})
    with pytest.raises(ValueError, match="lacks 3 of the model's tensors"):
        LengthValueModel.from_pretrained(tmp_path, gamma=0.997)


def test_the_served_architecture_override_in_the_config_does_not_matter(tmp_path):
    # SGLang users edit config.json this way; summary_dropout_prob is what the authors' trainer adds
    model, head = language_model(), value_head()
    write_official(tmp_path, model, head)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"architectures": ["Qwen2ForLengthValueModel"], "summary_dropout_prob": 0.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_holds(LengthValueModel.from_pretrained(tmp_path, gamma=0.997), model, head)
