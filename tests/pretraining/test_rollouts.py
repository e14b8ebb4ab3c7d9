import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from lenvm_rl.pretraining.data import check_rollouts
from lenvm_rl.pretraining.generators import Skipped, TransformersGenerator
from lenvm_rl.pretraining.rollouts import choose_gamma, describe_gamma, sample_rollouts, shard_seed
from lenvm_rl.pretraining.storage import SCHEMA, load_rollouts
from lenvm_rl.progress import progress_bar
from lenvm_rl.sampling import Completion, SamplingSettings, prompt_token_ids, sample_completions

SETTINGS = SamplingSettings(10)


class ScriptedGenerator:
    """Says the seed and the first token of the prompt; fails, or skips, where it is told."""

    backend, name, completions_per_shard = "scripted", "nobody", 4

    def __init__(self, fail_at=None, skip=lambda ids: False, error=RuntimeError):
        self.calls, self.fail_at, self.skip, self.error = [], fail_at, skip, error

    def __call__(self, prompt_ids, settings, seed, on_batch):
        if len(self.calls) == self.fail_at:
            raise self.error("killed")
        self.calls.append((list(prompt_ids), seed))
        on_batch(len(prompt_ids), len(prompt_ids))
        return [
            Skipped(f"no answer to {ids[0]}") if self.skip(ids) else Completion([seed % 100 + 2, row, ids[0]], True)
            for row, ids in enumerate(prompt_ids)
        ]

    def notes(self):
        return ["a note"] if self.skip([0]) else []


@pytest.fixture(scope="module")
def policy(policy_folder):
    return AutoModelForCausalLM.from_pretrained(policy_folder)


@pytest.fixture(scope="module")
def sample(policy, tokenizer, problems):
    def sampled(prompts=problems["prompt"][:6], completions=3, batch_size=256, **options):
        generator = TransformersGenerator(policy, tokenizer, batch_size=batch_size, name="tiny")
        return sample_rollouts(generator, tokenizer, prompts, SETTINGS, completions_per_prompt=completions, **options)

    return sampled


@pytest.fixture(scope="module")
def scripted(tokenizer, problems):
    def sampled(generator, folder, prompts=problems["prompt"][:7], completions=2, settings=SETTINGS, **options):
        return sample_rollouts(
            generator, tokenizer, prompts, settings, completions_per_prompt=completions, folder=folder, **options
        )

    return sampled


def test_every_prompt_has_its_completions_side_by_side(sample, tokenizer, problems):
    rollouts = sample()
    assert rollouts.column_names == SCHEMA.names
    assert rollouts["prompt_id"][:] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5]
    assert rollouts["sample"][:] == [0, 1, 2] * 6
    for row in rollouts:
        assert row["prompt_ids"] == tokenizer(problems["prompt"][row["prompt_id"]]).input_ids
        assert row["finished"] == (row["completion_ids"][-1] == tokenizer.eos_token_id)
        assert row["finished"] or len(row["completion_ids"]) == 10
        assert row["finish_reason"] == ("stop" if row["finished"] else "length")
        assert (row["max_new_tokens"], row["temperature"], row["top_p"]) == (10, 1.0, 1.0)
    assert len({tuple(ids) for ids in rollouts["completion_ids"]}) > 6  # three different ones of a prompt
    check_rollouts(rollouts, vocab_size=len(tokenizer))


def test_the_seed_decides(sample):
    assert sample(seed=1).to_dict() == sample(seed=1).to_dict()
    assert sample(seed=1).to_dict() != sample(seed=2).to_dict()


def test_rollouts_in_memory_are_one_continued_draw_from_the_seed(sample, policy, tokenizer, problems):
    # what the embedded critic was trained on: a change here changes the weights that the recipe makes
    ids = [row for row in prompt_token_ids(tokenizer, problems["prompt"][:6]) for _ in range(3)]
    torch.manual_seed(3)
    expected = sample_completions(policy, tokenizer, ids, SETTINGS, batch_size=4)
    state = torch.get_rng_state()
    rollouts = sample(seed=3, batch_size=4)
    assert rollouts["completion_ids"][:] == [completion.ids for completion in expected]
    assert torch.equal(torch.get_rng_state(), state)  # the critic's head is drawn from here


def test_a_folder_of_one_shard_holds_what_memory_would(sample, tmp_path):
    assert sample(seed=1, folder=tmp_path, prompts_per_shard=6).to_list() == sample(seed=1).to_list()


@pytest.mark.parametrize("prompts, completions", [([], 3), (["1 + 1 ="], 0)])
def test_nothing_to_sample_is_refused(sample, prompts, completions):
    message = f"{len(prompts)} prompts with {completions} completions each give no rollouts"
    with pytest.raises(ValueError, match=message):
        sample(prompts, completions)


def test_options_that_make_no_sense_are_refused(sample, tmp_path):
    with pytest.raises(ValueError, match="prompts_per_shard must be at least 1, got 0"):
        sample(folder=tmp_path, prompts_per_shard=0)
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        sample(["1 + 1 =", ""], folder=tmp_path)
    with pytest.raises(ValueError, match="Several processes share their rollouts through a folder: name one"):
        sample(accelerator=SimpleNamespace(num_processes=2))


# stopping and continuing


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_a_run_that_failed_continues_to_the_rollouts_of_one_that_did_not(sample, policy, tmp_path, monkeypatch, done):
    expected = sample(folder=tmp_path / "whole", prompts_per_shard=2).to_list()
    made = []
    generate = policy.generate

    def failing(**inputs):
        if len(made) == done:
            raise RuntimeError("killed")
        made.append(inputs)
        return generate(**inputs)

    monkeypatch.setattr(policy, "generate", failing)
    with pytest.raises(RuntimeError, match="killed") if done < 3 else nullcontext():
        sample(folder=tmp_path / "resumed", prompts_per_shard=2)
    monkeypatch.undo()
    torch.manual_seed(99)  # whatever the state of the second process
    assert sample(folder=tmp_path / "resumed", prompts_per_shard=2).to_list() == expected


def test_nothing_is_asked_for_twice_and_nothing_when_all_is_there(scripted, tmp_path):
    first, second, third = ScriptedGenerator(fail_at=2), ScriptedGenerator(), ScriptedGenerator()
    with pytest.raises(RuntimeError, match="killed"):
        scripted(first, tmp_path)
    whole = scripted(second, tmp_path).to_list()
    assert scripted(third, tmp_path).to_list() == whole
    assert [seed for _, seed in first.calls + second.calls] == [shard_seed(0, shard) for shard in range(4)]
    assert third.calls == []


def test_the_blocks_of_a_folder_have_seeds_of_their_own():
    seeds = [shard_seed(0, shard) for shard in range(1000)] + [shard_seed(1, shard) for shard in range(1000)]
    assert len(set(seeds)) == 2000 and shard_seed(5, 0) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_random_state_after_sampling_does_not_depend_on_how_much_was_left(sample, tmp_path):
    states = []
    for before in range(2):
        torch.manual_seed(before)
        sample(folder=tmp_path, prompts_per_shard=2)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_a_folder_is_not_continued_with_other_settings(scripted, problems, tmp_path):
    scripted(ScriptedGenerator(), tmp_path)
    for change, message in (
        ({"settings": SamplingSettings(10, temperature=0.7)}, "asked for temperature 0.7 instead of 1.0"),
        ({"completions": 3}, "completions_per_prompt 3 instead of 2"),
        ({"seed": 1}, "seed 1 instead of 0"),
        ({"prompts": problems["prompt"][1:8]}, "prompts_sha256"),
    ):
        with pytest.raises(ValueError, match=message):
            scripted(ScriptedGenerator(), tmp_path, **change)
    scripted(ScriptedGenerator(), tmp_path, prompts_per_shard=7)  # the size of the shards is the folder's own


def test_a_damaged_shard_is_named_before_anything_is_sampled(scripted, tmp_path):
    with pytest.raises(RuntimeError):
        scripted(ScriptedGenerator(fail_at=2), tmp_path)
    whole = (tmp_path / "rollouts-00001.parquet").read_bytes()
    (tmp_path / "rollouts-00001.parquet").write_bytes(whole[:200])
    generator = ScriptedGenerator()
    with pytest.raises(ValueError, match=r"rollouts-00001.parquet is damaged .* Delete it and run"):
        scripted(generator, tmp_path)
    assert generator.calls == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_run_says_how_to_continue(scripted, tmp_path, capsys, stop):
    with pytest.raises(stop):
        scripted(ScriptedGenerator(fail_at=3, error=stop), tmp_path)
    expected = f"Stopped: 3 of 4 shards of rollouts are in {tmp_path}. Run the same command again to continue."
    assert expected in " ".join(capsys.readouterr().err.split())


def test_sigterm_stops_a_run_as_ctrl_c_does_and_its_handler_is_put_back(scripted, tmp_path):
    before = signal.getsignal(signal.SIGTERM)

    class Terminated(ScriptedGenerator):
        def __call__(self, *arguments):
            if len(self.calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__call__(*arguments)

    with pytest.raises(SystemExit) as stopped:
        scripted(Terminated(), tmp_path)
    assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    assert len(load_rollouts(tmp_path, partial=True)) == 8


def test_processes_share_the_shards_and_each_gets_all_rollouts(scripted, tmp_path):
    whole = scripted(ScriptedGenerator(), tmp_path / "one").to_list()
    generators, results = [ScriptedGenerator() for _ in range(3)], {}

    def process(rank):
        accelerator = SimpleNamespace(num_processes=3, process_index=rank, main_process_first=nullcontext)
        results[rank] = scripted(generators[rank], tmp_path / "three", accelerator=accelerator).to_list()

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert results == {0: whole, 1: whole, 2: whole}
    assert [len(generator.calls) for generator in generators] == [2, 1, 1]


# a process of its own samples with the tiny policy, shard by shard; it forks, so that the imports are paid for once
KILLED = """
import os, random, signal, sys, time
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from lenvm_rl.pretraining.generators import TransformersGenerator
from lenvm_rl.pretraining.rollouts import sample_rollouts
from lenvm_rl.sampling import SamplingSettings

policy_folder, out, seed = sys.argv[1:]
torch.set_num_threads(1)
policy = AutoModelForCausalLM.from_pretrained(policy_folder)
tokenizer = AutoTokenizer.from_pretrained(policy_folder)
generator = TransformersGenerator(policy, tokenizer, batch_size=4, name="tiny")
prompts = [f"{a} + {b} =" for a in range(12) for b in range(5)]

def sample(folder):
    settings = SamplingSettings(10)
    return sample_rollouts(generator, tokenizer, prompts, settings, completions_per_prompt=4, folder=folder)

started = time.perf_counter()
expected = sample(f"{out}/whole").to_list()
whole_seconds = time.perf_counter() - started
rng, kills = random.Random(int(seed)), 0
for folder in [f"{out}/{k}" for k in range(3)]:
    while True:
        child = os.fork()
        if child == 0:
            sample(folder)
            os._exit(0)
        time.sleep(rng.uniform(0, whole_seconds / 2))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills += os.WIFSIGNALED(status)
        if not os.WIFSIGNALED(status):
            break
    assert sample(folder).to_list() == expected, folder
    assert not [name for name in os.listdir(folder) if name.endswith(".tmp")]
print(kills, len(expected))
"""


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_moments_ends_with_the_rollouts_of_one_that_is_not(policy_folder, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, policy_folder, str(tmp_path), "0"],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kills, rollouts = map(int, done.stdout.split())
    assert kills >= 3 and rollouts == 240


@pytest.mark.slow
def test_a_terminated_recipe_leaves_its_shards_and_the_same_command_completes_them(policy_folder, tmp_path):
    command = [
        *[sys.executable, "recipes/pretrain_lenvm.py", "--generator", policy_folder, "--sample_only", "true"],
        *["--rollouts_dir", str(tmp_path / "r"), "--prompts", "400", "--completions_per_prompt", "6"],
        *[
            "--held_out_prompts",
            "5",
            "--sampling_batch_size",
            "12",
            "--max_new_tokens",
            "10",
            "--output_dir",
            str(tmp_path / "o"),
        ],
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    while run.poll() is None and not (tmp_path / "r" / "train" / "rollouts-00003.parquet").exists():
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    _, error = run.communicate(timeout=60)
    assert run.returncode == 143 and "Run the same command again to continue" in error, error
    stored = len(list((tmp_path / "r" / "train").glob("rollouts-*.parquet")))
    assert 4 <= stored < 200
    again = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert again.returncode == 0 and again.stdout.startswith("gamma 0."), again.stderr
    assert len(load_rollouts(tmp_path / "r" / "train")) == 2400
    settings = json.loads((tmp_path / "r" / "held_out" / "settings.json").read_text())
    assert settings["prompts"] == 5 and settings["sampling"]["max_new_tokens"] == 10


# completions that cannot be had


def test_completions_that_could_not_be_had_are_counted_and_not_asked_for_again(scripted, tmp_path, tokenizer, problems):
    prompts = [f"{number} + 1 =" for number in range(7)]
    unlucky = tokenizer("3").input_ids[0]

    def skip(ids):
        return ids[0] in (0, unlucky)

    with pytest.warns(UserWarning) as caught:
        rollouts = scripted(ScriptedGenerator(skip=skip), tmp_path, prompts)
    messages = [str(warning.message) for warning in caught]
    assert f"2 completions could not be had and are missing: 2 x no answer to {unlucky}." in messages
    assert "a note" in messages
    assert rollouts["prompt_id"][:] == [0, 0, 1, 1, 2, 2, 4, 4, 5, 5, 6, 6]
    again = ScriptedGenerator()
    with pytest.warns(UserWarning, match="2 completions could not be had"):
        assert scripted(again, tmp_path, prompts).to_list() == rollouts.to_list()
    assert again.calls == []
    in_memory = ScriptedGenerator(skip=lambda ids: ids[0] == unlucky)
    with pytest.warns(UserWarning, match="2 completions could not be had"):
        assert len(scripted(in_memory, None, prompts)) == 12


def test_a_generator_that_gives_nothing_stops_the_run_and_what_was_stored_is_kept(scripted, tmp_path):
    generator = ScriptedGenerator(skip=lambda ids: len(generator.calls) > 2)
    with pytest.raises(OSError, match=r"nobody gave no completion of prompts 4 to 5: 2 x no answer to \d+"):
        scripted(generator, tmp_path)
    assert load_rollouts(tmp_path, partial=True)["prompt_id"][:] == [0, 0, 1, 1, 2, 2, 3, 3]


# gamma


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


def test_empty_completions_say_nothing_about_gamma():
    lengths = list(range(1, 101))
    assert choose_gamma(of_lengths([*lengths, *[0] * 50]), 500) == choose_gamma(of_lengths(lengths), 500)
    for nothing in (of_lengths([0, 0]), of_lengths([])):
        with pytest.raises(ValueError, match="no completions to choose gamma from: sample some, or set length_gamma"):
            choose_gamma(nothing, 500)


def test_a_gamma_that_is_given_is_taken_if_it_is_one():
    assert choose_gamma(of_lengths([5]), 500, override=0.997) == 0.997
    for wrong in (0.0, 1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="length_gamma must lie in the open interval"):
            choose_gamma(of_lengths([5]), 500, override=wrong)


def test_gamma_is_described_in_tokens():
    # reference/lenvm.md 1.4: 0.997 is half of the range at 231 tokens and 99 % at 1533
    assert describe_gamma(0.997) == ("gamma 0.997: half of the range of values at 231 remaining tokens, 99 % at 1,533")
    with pytest.raises(ValueError, match="open interval"):
        describe_gamma(1.0)


# progress


def test_the_progress_bar_counts_completions_and_tokens_on_stderr(capsys):
    with progress_bar("rollouts", total=30) as advance:
        advance(10, 400)
        advance(20, 800)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "rollouts" in shown.err and "30/30" in shown.err and "tokens/s" in shown.err


def test_the_progress_bar_of_a_continued_run_starts_where_the_last_one_ended(capsys):
    with progress_bar("rollouts", total=30, done=20) as advance:
        advance(5, 200)
    assert "25/30" in capsys.readouterr().err


def test_the_progress_bar_of_other_processes_is_invisible(capsys):
    with progress_bar("rollouts", total=30, visible=False) as advance:
        advance(30, 1200)
    assert capsys.readouterr().err == ""
