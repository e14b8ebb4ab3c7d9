import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM

from lenvm_rl.pretraining.data import check_rollouts
from lenvm_rl.pretraining.rollouts import choose_gamma, sample_rollouts
from lenvm_rl.progress import progress_bar
from lenvm_rl.sampling import SamplingSettings


@pytest.fixture(scope="module")
def policy(policy_folder):
    return AutoModelForCausalLM.from_pretrained(policy_folder)


@pytest.fixture(scope="module")
def sample(policy, tokenizer, problems):
    def sampled(prompts=problems["prompt"][:6], completions=3, **options):
        return sample_rollouts(
            policy, tokenizer, prompts, SamplingSettings(10), completions_per_prompt=completions, **options
        )

    return sampled


def test_every_prompt_has_its_completions_side_by_side(sample, tokenizer, problems):
    rollouts = sample()
    assert rollouts.column_names == ["prompt_id", "prompt_ids", "completion_ids", "finished"]
    assert rollouts["prompt_id"][:] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5]
    for row in rollouts:
        assert row["prompt_ids"] == tokenizer(problems["prompt"][row["prompt_id"]]).input_ids
        assert row["finished"] == (row["completion_ids"][-1] == tokenizer.eos_token_id)
        assert row["finished"] or len(row["completion_ids"]) == 10
    assert len({tuple(ids) for ids in rollouts["completion_ids"]}) > 6  # three different ones of a prompt
    check_rollouts(rollouts, vocab_size=len(tokenizer))


def test_the_seed_decides(sample):
    assert sample(seed=1).to_dict() == sample(seed=1).to_dict()
    assert sample(seed=1).to_dict() != sample(seed=2).to_dict()


@pytest.mark.parametrize("prompts, completions", [([], 3), (["1 + 1 ="], 0)])
def test_nothing_to_sample_is_refused(sample, prompts, completions):
    message = f"{len(prompts)} prompts with {completions} completions each give no rollouts"
    with pytest.raises(ValueError, match=message):
        sample(prompts, completions)


def of_lengths(finished, cut=()):
    lengths = [*finished, *cut]
    return Dataset.from_dict(
        {
            "completion_ids": [[7] * length for length in lengths],
            "finished": [True] * len(finished) + [False] * len(cut),
        }
    )


def test_gamma_uses_the_range_of_values_up_to_the_99th_percentile():
    # lengths 1..100: the 99th percentile is 99.01, and 0.01 ** (1 / 99.01) = 0.9545529
    assert choose_gamma(of_lengths(range(1, 101)), max_new_tokens=500) == pytest.approx(0.9545529, abs=1e-7)


def test_one_percent_cut_is_left_out_and_more_makes_the_limit_the_horizon():
    ninety_nine = list(range(1, 100))  # their 99th percentile is 98.02
    assert choose_gamma(of_lengths(ninety_nine, cut=[500]), 500) == pytest.approx(0.01 ** (1 / 98.02))
    # spec.md section 1: a horizon of 1533 tokens gives 0.9970005
    assert choose_gamma(of_lengths(ninety_nine, cut=[1533] * 2), 1533) == pytest.approx(0.9970005, abs=1e-7)
    assert choose_gamma(of_lengths([], cut=[1533]), 1533) == pytest.approx(0.9970005, abs=1e-7)


def test_the_progress_bar_counts_completions_and_tokens_on_stderr(capsys):
    with progress_bar("rollouts", total=30) as advance:
        advance(10, 400)
        advance(20, 800)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "rollouts" in shown.err and "30/30" in shown.err and "tokens/s" in shown.err


def test_the_progress_bar_of_other_processes_is_invisible(capsys):
    with progress_bar("rollouts", total=30, visible=False) as advance:
        advance(30, 1200)
    assert capsys.readouterr().err == ""
