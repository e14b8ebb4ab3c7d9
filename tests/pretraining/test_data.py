import numpy as np
import pytest
from datasets import Dataset
from torch import tensor

from lenvm_rl.pretraining.data import (
    LengthValueCollator,
    check_backbone_tokenizer,
    check_rollouts,
    completion_lengths,
    prompt_groups,
    rollout_lengths,
)

FINISHED = {"prompt_ids": [5, 6, 7], "completion_ids": [8, 9, 1], "finished": True}
CUT = {"prompt_ids": [5], "completion_ids": [8, 9], "finished": False}


def collated(*rollouts):
    batch = LengthValueCollator(pad_token_id=0)(rollouts)
    assert batch.keys() == {"input_ids", "labels"}
    return batch["input_ids"].tolist(), batch["labels"].tolist()


def test_a_label_counts_the_tokens_that_remain_after_a_state():
    # s_0 is the last prompt token; the state after the end token has nothing left
    assert collated(FINISHED) == ([[5, 6, 7, 8, 9, 1]], [[-100, -100, 3, 2, 1, 0]])


def test_the_last_state_of_a_cut_completion_has_no_label():
    assert collated(CUT) == ([[5, 8, 9]], [[2, 1, -100]])


def test_rows_are_padded_on_the_right_without_labels():
    input_ids, labels = collated(CUT, FINISHED)
    assert input_ids == [[5, 8, 9, 0, 0, 0], [5, 6, 7, 8, 9, 1]]
    assert labels == [[2, 1, -100, -100, -100, -100], [-100, -100, 3, 2, 1, 0]]


def test_a_completion_of_one_token_is_labelled():
    assert collated({"prompt_ids": [5, 6], "completion_ids": [1], "finished": True})[1] == [[-100, 1, 0]]
    assert collated({"prompt_ids": [5, 6], "completion_ids": [8], "finished": False})[1] == [[-100, 1, -100]]


def test_an_empty_completion_teaches_nothing():
    # the state after the prompt would look like an end
    for finished in (True, False):
        assert collated({"prompt_ids": [5, 6], "completion_ids": [], "finished": finished})[1] == [[-100, -100]]


def test_the_official_labels_take_a_cut_for_an_end():
    batch = LengthValueCollator(pad_token_id=0, official=True)([CUT, FINISHED])
    assert batch["labels"].tolist() == [[2, 1, 0, -100, -100, -100], [-100, -100, 3, 2, 1, 0]]


def test_arrays_make_the_same_batch_as_lists():
    arrays = [{name: np.array(column) for name, column in row.items()} for row in (FINISHED, CUT)]
    batch = LengthValueCollator(pad_token_id=0)(arrays)
    assert (batch["input_ids"].tolist(), batch["labels"].tolist()) == collated(FINISHED, CUT)


def test_tensors_hold_token_ids():
    batch = LengthValueCollator(pad_token_id=0)([FINISHED])
    assert batch["input_ids"].dtype == batch["labels"].dtype == tensor([1]).dtype


def rollouts(**columns):
    return Dataset.from_dict(
        {"prompt_ids": [[5], [6, 7]], "completion_ids": [[8, 1], [9]], "finished": [True, False], **columns}
    )


def test_rollouts_of_the_critics_vocabulary_pass_as_they_are():
    given = rollouts()
    assert check_rollouts(given, vocab_size=10) is given


def test_empty_completions_are_counted_and_left_out():
    given = rollouts(prompt_ids=[[5]] * 3, completion_ids=[[8, 1], [], [9]], finished=[True, False, False])
    with pytest.warns(UserWarning, match="1 of 3 rollouts have an empty completion and are left out"):
        kept = check_rollouts(given, vocab_size=10)
    assert kept["completion_ids"][:] == [[8, 1], [9]] and kept["finished"][:] == [True, False]


def test_rows_far_down_are_checked_too():
    columns = {"prompt_ids": [[5]] * 2500, "finished": [True] * 2500}
    completions = [[8, 1]] * 2500
    completions[2400], completions[1200] = [8, 10], []
    with pytest.raises(ValueError, match="Rollout 2400 holds a token id outside"):
        check_rollouts(rollouts(**columns, completion_ids=completions), vocab_size=10)
    with pytest.warns(UserWarning, match="1 of 2,500 rollouts"):
        assert len(check_rollouts(rollouts(**columns, completion_ids=completions), vocab_size=11)) == 2499


@pytest.mark.parametrize(
    "name, values", [("temperature", [1.0, 0.7]), ("top_p", [0.9, 1.0]), ("max_new_tokens", [8, 4])]
)
def test_rollouts_of_different_sampling_settings_are_refused(name, values):
    low, high = sorted(values)
    with pytest.raises(ValueError, match=rf"different settings \({name} {low} and {high}\). A length value is that of"):
        check_rollouts(rollouts(**{name: values}), vocab_size=10)
    check_rollouts(rollouts(**{name: values[:1] * 2}), vocab_size=10)
    check_rollouts(rollouts(**{name: [values[0], None]}), vocab_size=10)  # a file that does not say it


def test_a_prompt_is_known_by_its_tokens():
    given = rollouts(prompt_ids=[[5], [5, 6], [5], [6], [5, 6]], completion_ids=[[8]] * 5, finished=[True] * 5)
    assert prompt_groups(given).tolist() == [0, 1, 0, 2, 1]
    many = rollouts(prompt_ids=[[i % 7, 1] for i in range(2500)], completion_ids=[[8]] * 2500, finished=[True] * 2500)
    assert prompt_groups(many).tolist() == [i % 7 for i in range(2500)]
    assert rollout_lengths(given).tolist() == [2, 3, 2, 2, 3]


def test_lengths_are_those_of_the_completions():
    lengths, finished = completion_lengths(rollouts())
    assert lengths.tolist() == [2, 1] and finished.tolist() == [True, False]
    lengths, finished = completion_lengths(rollouts().select([1]))
    assert lengths.tolist() == [1] and finished.tolist() == [False]


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"prompt_ids": [], "completion_ids": [], "finished": []}, "There are no rollouts to train on"),
        ({"prompt_ids": [[5], []]}, "Rollout 1 has an empty prompt: drop it"),
        ({"completion_ids": [[], []]}, "All completions are empty: there is nothing to train on"),
        ({"completion_ids": [[8, 1], [10]]}, "Rollout 1 holds a token id outside the critic's vocabulary of 10"),
        ({"prompt_ids": [[5], [6, -1]]}, "Rollout 1 holds a token id outside the critic's vocabulary of 10"),
    ],
)
def test_rollouts_that_cannot_be_learned_from_are_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        check_rollouts(rollouts(**columns), vocab_size=10)


def test_missing_columns_are_named():
    with pytest.raises(
        ValueError, match="prompt_ids, completion_ids, finished, but have no prompt_ids and no finished"
    ):
        check_rollouts(rollouts().remove_columns(["prompt_ids", "finished"]), vocab_size=10)


def words(tokens, name):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(tokens, unk_token="t0")))
    tokenizer.name_or_path = name
    return tokenizer


def test_a_backbone_must_read_the_tokens_that_the_generator_writes():
    own = {f"t{i}": i for i in range(300)}
    generator = words(own, "policy")
    check_backbone_tokenizer(generator, words(own, "sibling"))
    check_backbone_tokenizer(generator, words({**own, "more": 300}, "larger"))
    with pytest.warns(
        UserWarning, match="2 tokens of 'policy' have other ids, or none, in the tokenizer of 'base', such"
    ):
        check_backbone_tokenizer(generator, words({f"t{i}": i for i in range(298)}, "base"))
    turned = words({f"t{i}": 299 - i for i in range(300)}, "stranger")
    with pytest.raises(
        ValueError, match="300 of the 300 tokens of 'policy' have other ids in the tokenizer of 'stranger'"
    ):
        check_backbone_tokenizer(generator, turned)
