import pytest
from datasets import Dataset
from torch import tensor

from lenvm_rl.pretraining.data import LengthValueCollator, check_rollouts

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


def test_tensors_hold_token_ids():
    batch = LengthValueCollator(pad_token_id=0)([FINISHED])
    assert batch["input_ids"].dtype == batch["labels"].dtype == tensor([1]).dtype


def rollouts(**columns):
    return Dataset.from_dict(
        {"prompt_ids": [[5], [6, 7]], "completion_ids": [[8, 1], [9]], "finished": [True, False], **columns}
    )


def test_rollouts_of_the_critics_vocabulary_pass():
    check_rollouts(rollouts(), vocab_size=10)


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"prompt_ids": [], "completion_ids": [], "finished": []}, "There are no rollouts to train on"),
        ({"prompt_ids": [[5], []]}, "Rollout 1 has an empty prompt: drop it"),
        ({"completion_ids": [[], [9]]}, "Rollout 0 has an empty completion: drop it"),
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
