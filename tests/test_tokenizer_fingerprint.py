import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from lenvm_rl.model import LengthValueConfig, LengthValueModel
from lenvm_rl.tokenizer_fingerprint import check_same_tokenizer, tokenizer_fingerprint, vocabulary_fingerprint


def tokenizer(words=("one", "two", "zwölf", "<end>", "<pad>"), eos="<end>", **options):
    vocabulary = {word: index for index, word in enumerate(words)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, words[0])), eos_token=eos, **options
    )


def critic_config(trained_with=None, vocab_size=64, **fields):
    backbone = LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=vocab_size)
    if trained_with is not None:
        fields |= {"tokenizer_fingerprint": tokenizer_fingerprint(trained_with), "tokenizer_size": len(trained_with)}
    return LengthValueConfig(backbone_config=backbone, gamma=0.997, **fields)


def test_the_fingerprint_is_a_hash_of_the_sorted_vocabulary_and_the_end_token():
    # the same in every process: printf '[[0,"one"],[1,"<end>"]]' | sha256sum
    assert tokenizer_fingerprint(tokenizer(("one", "<end>"))) == (
        "4d9e9d38192ca5a8e2d1a28a6d4ef7eb14b7fbb91ca30f8b25dff89698255988:1"
    )


def test_the_fingerprint_survives_save_and_reload(tmp_path):
    tokenizer().save_pretrained(tmp_path)
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == tokenizer_fingerprint(tokenizer())


def test_what_an_id_means_changes_the_fingerprint():
    one = tokenizer()
    assert vocabulary_fingerprint(tokenizer(("two", "one", "zwölf", "<end>", "<pad>"))) != vocabulary_fingerprint(one)
    longer = tokenizer()
    longer.add_tokens(["three"])
    assert vocabulary_fingerprint(longer) != vocabulary_fingerprint(one)
    assert tokenizer_fingerprint(tokenizer(eos="two")) != tokenizer_fingerprint(one)
    assert vocabulary_fingerprint(tokenizer(eos="two")) == vocabulary_fingerprint(one)


def test_the_padding_token_and_the_chat_template_do_not_change_it():
    other = tokenizer(pad_token="<pad>", padding_side="left")
    other.chat_template = "{{ messages }}"
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(tokenizer())


def test_the_same_tokenizer_passes():
    check_same_tokenizer(tokenizer(), critic_config(tokenizer()))
    check_same_tokenizer(tokenizer(pad_token="<pad>"), critic_config(tokenizer()))


def test_another_vocabulary_is_refused_with_both_names_sizes_and_the_remedy():
    policy = tokenizer(("ein", "zwei", "drei", "<end>"))
    with pytest.raises(ValueError) as caught:
        check_same_tokenizer(policy, critic_config(tokenizer(), generator="Qwen/Qwen2.5-7B-Instruct"), "meta/Llama")
    assert str(caught.value) == (
        "length_critic was trained with the tokenizer of 'Qwen/Qwen2.5-7B-Instruct' (5 tokens), but the policy "
        "'meta/Llama' has 4 other tokens. A token-level critic must share the policy's tokenizer: pretrain one with "
        "recipes/pretrain_lenvm.py --generator meta/Llama."
    )


def test_another_end_token_is_refused():
    with pytest.raises(ValueError, match=r"end with token id 3, but the policy .* ends with token id 1"):
        check_same_tokenizer(tokenizer(eos="two"), critic_config(tokenizer()))


def test_without_a_fingerprint_the_ids_must_have_embeddings():
    check_same_tokenizer(tokenizer(), critic_config(vocab_size=5))
    with pytest.raises(ValueError, match=r"has 4 token embeddings, but the policy .* uses token ids up to 4"):
        check_same_tokenizer(tokenizer(), critic_config(vocab_size=4))


def test_from_backbone_remembers_the_generators_tokenizer():
    config = LengthValueModel.from_backbone(
        LengthValueModel(critic_config()).model, gamma=0.9, tokenizer=tokenizer()
    ).config
    assert config.tokenizer_size == 5
    check_same_tokenizer(tokenizer(), config)
    with pytest.raises(ValueError, match="start the LenVM from a model of the generator's family"):
        LengthValueModel.from_backbone(
            LengthValueModel(critic_config(vocab_size=4)).model, gamma=0.9, tokenizer=tokenizer()
        )
