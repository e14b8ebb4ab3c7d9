import pytest
from datasets import Dataset, IterableDataset

from lenvm_rl.trainers.prompts import check_prompts

CHAT = [{"role": "user", "content": "1 + 1 ="}]


@pytest.mark.parametrize("prompts", [["1 + 1 =", "2 + 2 ="], [CHAT, CHAT]], ids=["text", "chat"])
def test_prompts_pass(prompts):
    check_prompts(Dataset.from_dict({"prompt": prompts}))
    check_prompts([{"prompt": prompt} for prompt in prompts])


@pytest.mark.parametrize("prompts", [["a", None], ["a", "  "], [CHAT, []], [CHAT, None]])
def test_a_row_without_a_prompt_is_named(prompts):
    with pytest.raises(ValueError, match=r"Row 1 of train_dataset has the prompt .*fill it in or drop the row"):
        check_prompts(Dataset.from_dict({"prompt": prompts}))


def test_a_dataset_without_the_column_says_what_it_has():
    with pytest.raises(ValueError, match=r"no column 'prompt', only 'question': rename one"):
        check_prompts(Dataset.from_dict({"question": ["a"]}))


def test_a_stream_is_not_read():
    check_prompts(IterableDataset.from_generator(lambda: iter([{"prompt": None}])))


def test_a_trainer_looks_before_it_trains(train):
    rows = Dataset.from_dict({"prompt": ["1 + 7 =", None, "3 + 7 =", "4 + 7 ="], "number": [0, 1, 2, 3]})
    with pytest.raises(ValueError, match="Row 1 of train_dataset"):
        train(train_dataset=rows, length_coef=0.0)
