from collections import Counter

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch import tensor

from lenvm_rl.trainers.group_sampling import (
    GroupChoice,
    Place,
    PromptStream,
    Rollouts,
    merged,
    merged_rows,
    refilled,
    signal_groups,
)
from lenvm_rl.trainers.grpo import LenVMGRPOTrainer

NAN = float("nan")
ONE = tensor([1.0])


# The stream of further prompts


def test_every_row_comes_once_in_each_turn():
    rows = PromptStream(5, seed=3).draw(15)
    assert all(sorted(rows[i : i + 5]) == [0, 1, 2, 3, 4] for i in (0, 5, 10))
    assert len({tuple(rows[i : i + 5]) for i in (0, 5, 10)}) > 1


def test_the_sequence_depends_on_the_seed_and_not_on_how_it_is_drawn():
    whole, parts = PromptStream(7, seed=1), PromptStream(7, seed=1)
    rows = whole.draw(20)
    assert [row for count in (3, 0, 9, 8) for row in parts.draw(count)] == rows
    assert PromptStream(7, seed=2).draw(20) != rows


def test_the_stream_does_not_begin_with_the_prompts_of_the_first_batch():
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(42)).tolist()  # TRL's sampler
    assert PromptStream(64, seed=42).draw(64) != shuffled


def test_a_loaded_stream_goes_on_where_it_was_saved():
    stream, other = PromptStream(7, seed=1), PromptStream(7, seed=1)
    stream.draw(10)
    other.load_state_dict(stream.state_dict())
    assert other.draw(9) == stream.draw(9)


def test_the_state_of_another_dataset_is_refused():
    with pytest.raises(ValueError, match="drawn from 7 rows with seed 1, but this run has 8 rows and seed 1"):
        PromptStream(8, seed=1).load_state_dict(PromptStream(7, seed=1).state_dict())


# Which groups have a signal


def test_a_group_has_a_signal_if_its_rewards_differ():
    rewards = tensor([[1.0], [0], [1], [1], [0], [0], [NAN], [0.5], [NAN], [NAN]])
    signal = signal_groups(rewards, ONE, 2, aggregation="sum_then_normalize")
    assert signal.tolist() == [True, False, False, False, False]


def test_rewards_that_cancel_leave_no_signal_unless_they_are_scaled_one_by_one():
    rewards, weights = tensor([[1.0, 0.0, 3.0], [0.0, 1.0, 4.0]]), tensor([1.0, 1.0, 0.0])
    assert signal_groups(rewards, weights, 2, aggregation="sum_then_normalize").tolist() == [False]
    assert signal_groups(rewards, weights, 2, aggregation="normalize_then_sum").tolist() == [True]


def test_with_a_length_signal_a_correct_completion_is_enough():
    rewards = tensor([[1.0], [1.0], [0.0], [0.0]])
    signal = signal_groups(rewards, ONE, 2, aggregation="sum_then_normalize", correct=rewards[:, 0] >= 1)
    assert signal.tolist() == [True, False]


# Choice and merge


def test_each_process_takes_what_it_lacks_and_fills_up_with_its_own():
    choice = GroupChoice(processes=2, groups=3)
    choice.add_round(tensor([True, False, True, False, False, False]))
    assert (choice.missing, choice.kept) == (3, 2)
    choice.add_round(tensor([True, True, True, False, True, False]))  # the first process needs one of its three
    assert (choice.missing, choice.kept) == (2, 4)
    assert choice.batches() == [
        [Place(0, 0, True), Place(0, 2, True), Place(1, 0, True)],
        [Place(0, 0, False), Place(0, 1, False), Place(1, 1, True)],
    ]


def test_rows_are_padded_like_trl_pads_them():
    first = {
        "prompt_ids": tensor([[5, 6], [7, 8]]),
        "prompt_mask": tensor([[1, 1], [1, 1]]),
        "completion_ids": tensor([[9, 1], [9, 2]]),
        "completion_mask": tensor([[1, 1], [1, 1]]),
        "tool_mask": tensor([[1, 0], [1, 1]]),
        "old_per_token_logps": tensor([[-1.0, -2.0], [-3.0, -4.0]]),
        "importance_sampling_ratio": tensor([[0.5], [0.6]]),
        "advantages": tensor([1.0, 2.0]),
        "num_items_in_batch": tensor(8),
    }
    second = {
        "prompt_ids": tensor([[5]]),
        "prompt_mask": tensor([[1]]),
        "completion_ids": tensor([[3, 4, 1]]),
        "completion_mask": tensor([[1, 1, 1]]),
        "tool_mask": tensor([[1, 1, 0]]),
        "old_per_token_logps": tensor([[-5.0, -6.0, -7.0]]),
        "importance_sampling_ratio": tensor([[0.7]]),
        "advantages": tensor([3.0]),
        "num_items_in_batch": tensor(3),
    }
    rows = merged_rows([first, second], [tensor([1]), tensor([0])], pad_token_id=99)
    assert {name: tensor.tolist() for name, tensor in rows.items()} == {
        "prompt_ids": [[7, 8], [99, 5]],
        "prompt_mask": [[1, 1], [0, 1]],
        "completion_ids": [[9, 2, 99], [3, 4, 1]],
        "completion_mask": [[1, 1, 0], [1, 1, 1]],
        "tool_mask": [[1, 1, 1], [1, 1, 0]],
        "old_per_token_logps": [[-3.0, -4.0, 0.0], [-5.0, -6.0, -7.0]],
        "importance_sampling_ratio": [[0.6000000238418579], [0.699999988079071]],
        "advantages": [2.0, 3.0],
    }


def test_images_are_refused():
    with pytest.raises(ValueError, match="cannot merge the batch's 'pixel_values'"):
        merged_rows([{"pixel_values": torch.ones(2, 3)}], [tensor([0])], 0)


def rollouts(rewards, process, processes=2):
    """Rows whose only token is their place in the round of all processes, plus 100 for each round of the test."""
    rewards = tensor(rewards)
    rows = len(rewards) // processes
    ids = torch.arange(rows * process, rows * (process + 1))
    batch = {"completion_ids": ids[:, None], "advantages": ids.float()}
    return Rollouts(batch, rewards[:, None], torch.ones(rows, dtype=torch.long), torch.ones(len(rewards)).bool())


def test_merged_rows_and_rewards_belong_together_on_both_processes():
    rounds = [[1.0, 0, 0, 0, 0, 0, 1, 1], [2.0, 3, 4, 5, 6, 6, 7, 7]]
    choice = GroupChoice(processes=2, groups=2)
    choice.add_round(tensor([True, False, False, False]))
    choice.add_round(tensor([True, True, False, False]))
    results = [merged([rollouts(r, process) for r in rounds], choice, process, 2, 0) for process in (0, 1)]
    expected = [1.0, 0.0, 2.0, 3.0, NAN, NAN, NAN, NAN]
    for result in results:
        torch.testing.assert_close(result.rewards[:, 0], tensor(expected), equal_nan=True)
        assert result.kept.tolist() == [True] * 4 + [False] * 4
    assert results[0].batch["completion_ids"].flatten().tolist() == [0, 1, 0, 1]  # of rounds 0 and 1
    assert results[1].batch["completion_ids"].flatten().tolist() == [4, 5, 6, 7]  # all of round 0


def run_refill(process, signals, groups=2, rounds=4):
    """Refill with prescribed signals per round, for all processes; returns the rows asked for, and the counts."""
    asked, signals = [], iter(signals)

    def roll_out(rows):
        asked.append(rows)
        return rollouts([0.0] * 4 * len(rows), process)

    first = rollouts([0.0] * 4 * groups, process)
    result, counts = refilled(
        first,
        roll_out,
        lambda _: tensor(next(signals)),
        PromptStream(1000, seed=0),
        rounds=rounds,
        processes=2,
        process=process,
        group_size=2,
        pad_token_id=0,
    )
    return asked, counts, result is first


def test_both_processes_generate_equally_often_and_different_prompts():
    signals = [[True, True, False, False], [False, False, True, False], [True, True]]
    (first, counts, _), (second, same, _) = (run_refill(process, signals) for process in (0, 1))
    assert [len(rows) for rows in first] == [len(rows) for rows in second] == [2, 1]  # as the second process lacks
    assert len({row for rows in first + second for row in rows}) == 6
    assert counts == same == {"rounds": 3, "kept_groups": 4, "unfilled_groups": 0}


def test_a_batch_that_is_full_is_left_alone():
    assert run_refill(0, [[True] * 4]) == ([], {"rounds": 1, "kept_groups": 4, "unfilled_groups": 0}, True)


def test_rounds_are_limited():
    asked, counts, _ = run_refill(0, [[False] * 4] * 4, rounds=3)
    assert len(asked) == 3 and counts == {"rounds": 4, "kept_groups": 0, "unfilled_groups": 4}


# In the trainer


class Recording(LenVMGRPOTrainer):
    """Keeps what comes out of each round, and what goes to the loss."""

    def _rolled_out(self, inputs):
        result = super()._rolled_out(inputs)
        self.__dict__.setdefault("rounds", []).append([row["number"] for row in inputs])
        return result

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        self.__dict__.setdefault("batches", []).append({name: value.clone() for name, value in batch.items()})
        return batch


def odd_are_hopeless(completions, number, **_):
    """Prompts with an even number have completions of both kinds, the others none that is right."""
    return [float(n % 2 == 0 and place % 2) for place, n in enumerate(number)]


def history(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def weights(trainer):
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def numbers(trainer, batch):
    """The prompt's number of each row: "12 + 7 ...", number 12."""
    texts = trainer.processing_class.batch_decode(batch["prompt_ids"], skip_special_tokens=True)
    return [int(text.split()[0]) for text in texts]


def test_hopeless_groups_are_replaced_by_groups_of_further_prompts(train):
    trainer = train(
        Recording,
        length_coef=0.0,
        dynamic_sampling=True,
        max_resample_rounds=20,
        reward_funcs=odd_are_hopeless,
        max_steps=4,
    )
    for batch in trainer.batches:
        assert Counter(n % 2 for n in numbers(trainer, batch)) == {0: 8}
        assert batch["advantages"].abs().sign().all()
        assert batch["num_items_in_batch"] == batch["completion_mask"].sum()
        assert (batch["prompt_mask"][:, -1] == 1).all() and (batch["completion_mask"][:, 0] == 1).all()
    rounds = history(trainer, "sampling/rounds")
    assert sum(rounds) == len(trainer.rounds) and max(rounds) > 1
    assert history(trainer, "sampling/kept_groups") == [2] * 4
    assert history(trainer, "sampling/unfilled_groups") == [0] * 4
    assert {len(numbers) for numbers in trainer.rounds} == {4, 8}  # no more groups than were missing


def test_metrics_describe_the_first_round(train):
    options = {"length_coef": 0.0, "reward_funcs": odd_are_hopeless, "max_steps": 1}
    plain = train(Recording, **options)
    refilled_run = train(Recording, dynamic_sampling=True, max_resample_rounds=20, **options)
    assert len(refilled_run.rounds) > 1
    entries = [{k: v for k, v in t.state.log_history[0].items() if k != "num_tokens"} for t in (plain, refilled_run)]
    for name in ("reward", "frac_reward_zero_std", "completions/mean_length", "length/correct_rate"):
        assert entries[0][name] == entries[1][name], name
    assert list(refilled_run._logs["prompt"]) == list(plain._logs["prompt"])
    assert list(refilled_run._logs["rewards"]["odd_are_hopeless"]) == list(plain._logs["rewards"]["odd_are_hopeless"])
    assert history(refilled_run, "num_tokens") > history(plain, "num_tokens")


def test_a_run_whose_groups_all_have_a_signal_is_the_same_bit_for_bit(train):
    def both_kinds(completions, **_):
        return [float(place % 2) for place in range(len(completions))]

    plain = train(length_coef=0.0, reward_funcs=both_kinds)
    dynamic = train(length_coef=0.0, reward_funcs=both_kinds, dynamic_sampling=True)
    for name, weight in weights(plain).items():
        assert torch.equal(weight, weights(dynamic)[name]), name
    assert history(dynamic, "sampling/rounds") == [1, 1]


@pytest.mark.parametrize(
    ("normalization", "gate"),
    [
        ("trl", "correct"),
        ("trl", "all"),
        ("group_centred_batch_std", "correct"),
        ("group_centred_token_std", "all"),
    ],
)
def test_when_rounds_are_used_up_groups_without_a_signal_stay_with_advantage_zero(
    train, critic_folder, normalization, gate
):
    def hopeless(completions, **_):
        return [0.0] * len(completions)

    trainer = train(
        Recording,
        length_critic=critic_folder,
        length_gate=gate,
        dynamic_sampling=True,
        max_resample_rounds=2,
        advantage_normalization=normalization,
        reward_funcs=hopeless,
        max_steps=1,
    )
    assert not trainer.batches[0]["advantages"].any()
    assert numbers(trainer, trainer.batches[0]) == trainer.rounds[0]
    assert history(trainer, "sampling/rounds") == [3] and history(trainer, "sampling/unfilled_groups") == [2]


def test_groups_without_a_signal_take_no_part_in_the_normalisation(train):
    def only_number_two(completions, number, **_):
        return [float(n == 2 and place % 4 == 0) for place, n in enumerate(number)]

    data = Dataset.from_dict({"prompt": [f"{i} + 7 =" for i in range(4)], "number": list(range(4))})
    trainer = train(
        Recording,
        length_coef=0.0,
        dynamic_sampling=True,
        max_resample_rounds=1,
        advantage_normalization="group_centred_batch_std",
        reward_funcs=only_number_two,
        train_dataset=data,
        max_steps=2,  # every prompt, so that number 2 comes once beside another
    )
    batch = next(b for b in trainer.batches if numbers(trainer, b).count(2) == 4)
    expected = torch.zeros(8)
    expected[[n == 2 for n in numbers(trainer, batch)]] = tensor([1.7321, -0.5774, -0.5774, -0.5774])
    torch.testing.assert_close(batch["advantages"], expected, atol=1e-4, rtol=0)


def test_what_depends_on_the_batch_is_normalised_over_the_merged_one(train):
    trainer = train(
        Recording,
        length_coef=0.0,
        dynamic_sampling=True,
        max_resample_rounds=20,
        scale_rewards="batch",
        reward_funcs=odd_are_hopeless,
        max_steps=3,
    )
    assert max(history(trainer, "sampling/rounds")) > 1
    for batch in trainer.batches:  # rewards 0, 1, 0, 1, ...: std 0.5345, where hopeless groups would have made it less
        expected = tensor([-0.9353, 0.9353] * 4)
        torch.testing.assert_close(batch["advantages"], expected, atol=1e-4, rtol=0)


def test_all_correct_groups_are_replaced_without_a_length_signal_and_stay_with_one(train, critic_folder):
    def easy(completions, **_):
        return [1.0] * len(completions)

    options = {"dynamic_sampling": True, "max_resample_rounds": 2, "reward_funcs": easy, "max_steps": 1}
    plain = train(Recording, length_coef=0.0, **options)
    assert history(plain, "sampling/rounds") == [3] and history(plain, "sampling/kept_groups") == [0]
    ours = train(Recording, length_critic=critic_folder, **options)
    assert history(ours, "sampling/rounds") == [1] and history(ours, "sampling/kept_groups") == [2]
    assert ours.batches[0]["advantages"].any()


def test_all_correct_groups_are_replaced_with_a_length_signal_where_that_is_asked_for(train, critic_folder):
    def odd_are_easy(prompts, **_):
        return [1.0 if int(prompt.split()[0]) % 2 else float(place % 2) for place, prompt in enumerate(prompts)]

    options = {"dynamic_sampling": True, "max_resample_rounds": 20, "reward_funcs": odd_are_easy}
    trainer = train(Recording, length_critic=critic_folder, resample_correct_groups=True, **options)
    assert max(history(trainer, "sampling/rounds")) > 1
    for batch in trainer.batches:
        assert Counter(n % 2 for n in numbers(trainer, batch)) == {0: 8}
    with pytest.raises(ValueError, match="set dynamic_sampling=True"):
        train(length_critic=critic_folder, resample_correct_groups=True)


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.04, "num_iterations": 2, "steps_per_generation": 2, "per_device_train_batch_size": 4},
        {"scale_rewards": "batch", "mask_truncated_completions": True, "pad_to_multiple_of": 4},
        {"multi_objective_aggregation": "normalize_then_sum"},
        {"eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 2, "per_device_eval_batch_size": 4},
    ],
    ids=str,
)
def test_works_with_the_options_of_trl(train, critic_folder, prompts, options):
    evaluation = {"eval_dataset": prompts(4)} if "eval_steps" in options else {}
    trainer = train(
        length_critic=critic_folder,
        dynamic_sampling=True,
        max_resample_rounds=20,
        reward_funcs=odd_are_hopeless,
        **options,
        **evaluation,
    )
    assert max(history(trainer, "sampling/rounds")) > 1
    assert all(weight.isfinite().all() for weight in weights(trainer).values())
    assert not any(key.startswith("eval_sampling") for entry in trainer.state.log_history for key in entry)


def test_a_stream_without_a_length_is_refused(train, prompts):
    stream = IterableDataset.from_generator(lambda: iter(prompts(4)))
    with pytest.raises(ValueError, match="train_dataset is a stream without a length"):
        train(length_coef=0.0, dynamic_sampling=True, train_dataset=stream)


def test_groups_split_over_processes_are_refused(tiny_run, tmp_path, monkeypatch):
    from lenvm_rl.trainers.grpo_config import LenVMGRPOConfig

    monkeypatch.setattr(LenVMGRPOConfig, "world_size", 2)
    settings = tiny_run | {"per_device_train_batch_size": 6, "num_generations": 4}
    with pytest.raises(ValueError, match=r"the 6 completions that one generates .* no multiple of num_generations=4"):
        LenVMGRPOConfig(output_dir=str(tmp_path), length_coef=0.0, dynamic_sampling=True, **settings)


def test_reward_functions_see_steps_and_columns_in_every_round(train):
    seen = []

    def spy(completions, number, trainer_state, **_):
        seen.append((trainer_state.global_step, len(number)))
        return odd_are_hopeless(completions, number)

    train(length_coef=0.0, dynamic_sampling=True, reward_funcs=spy, max_steps=1)
    assert len(seen) > 1 and all(step == 0 and rows % 4 == 0 for step, rows in seen)
