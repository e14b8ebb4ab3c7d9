import errno
import json
import os

import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from lenvm_rl.atomic_file import temporary_path
from lenvm_rl.pretraining import storage
from lenvm_rl.pretraining.generators import Skipped
from lenvm_rl.pretraining.storage import (
    SCHEMA,
    RolloutFolder,
    RolloutSettings,
    load_rollouts,
    rollout_table,
)
from lenvm_rl.sampling import Completion, SamplingSettings

SAMPLING = SamplingSettings(8, temperature=0.5, top_p=0.9)
SETTINGS = RolloutSettings(
    backend="scripted",
    generator="nobody",
    sampling=SAMPLING,
    tokenizer_fingerprint="ab" * 32 + ":1",
    prompts=5,
    prompts_sha256="cd" * 32,
    completions_per_prompt=2,
    seed=0,
    prompts_per_shard=2,
)


def shard(store, number):
    """Prompt p is [10 + p]; its sample s is p + 1 times the token 7, finished if s is 0."""
    prompts = store.prompts(number)
    completions = [Completion([7] * (p + 1), finished=s == 0) for p in prompts for s in range(2)]
    return rollout_table(prompts.start, [[10 + p] for p in prompts], completions, SAMPLING)


def change(**settings):
    sampling = settings.pop("sampling", {})
    fields = {**vars(SETTINGS), **settings, "sampling": SamplingSettings(**{**vars(SAMPLING), **sampling})}
    return RolloutSettings(**fields)


@pytest.fixture
def store(tmp_path):
    return RolloutFolder.open(tmp_path / "rollouts", SETTINGS)


@pytest.fixture
def full(store):
    for number in range(3):
        store.write(number, *shard(store, number))
    return store


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_row_says_all_about_its_completion():
    completions = [Completion([7, 1], True), Skipped("gone"), Completion([8], False), Completion([9], False)]
    table, skipped = rollout_table(4, [[5], [6, 6]], completions, SAMPLING)
    drawn = {"max_new_tokens": 8, "temperature": 0.5, "top_p": 0.9}
    cut = {"finish_reason": "length", "finished": False, **drawn}
    assert table.to_pylist() == [
        {
            "prompt_id": 4,
            "sample": 0,
            "prompt_ids": [5],
            "completion_ids": [7, 1],
            "finish_reason": "stop",
            "finished": True,
            **drawn,
        },
        {"prompt_id": 5, "sample": 0, "prompt_ids": [6, 6], "completion_ids": [8], **cut},
        {"prompt_id": 5, "sample": 1, "prompt_ids": [6, 6], "completion_ids": [9], **cut},
    ]
    assert skipped == [(4, 1, "gone")] and table.schema == SCHEMA


def test_a_new_folder_lacks_every_shard_and_a_written_one_is_not_asked_for_again(store):
    assert store.missing() == [0, 1, 2]
    assert [store.completions(number) for number in range(3)] == [4, 4, 2]
    store.write(1, *shard(store, 1))
    assert store.missing() == [0, 2] and store.missing([1, 2]) == [2]
    again = RolloutFolder.open(store.folder, SETTINGS)
    assert again.missing() == [0, 2] and again.settings == SETTINGS


def test_rollouts_come_back_in_the_order_of_the_prompts_whatever_the_order_of_writing(store):
    for number in (2, 0, 1):
        store.write(number, *shard(store, number))
    rollouts = load_rollouts(store.folder)
    assert rollouts.column_names == SCHEMA.names
    assert rollouts["prompt_id"][:] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert rollouts["sample"][:] == [0, 1] * 5
    assert [len(ids) for ids in rollouts["completion_ids"]] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert rollouts[7]["prompt_ids"] == [13] and rollouts[7]["finish_reason"] == "length"


def test_rollouts_are_mapped_from_disk_and_not_read_into_memory(full):
    rollouts = load_rollouts(full.folder)
    assert [file["filename"] for file in rollouts.cache_files] == [str(full.folder / "rollouts.arrow")]


def test_the_copy_to_read_from_is_made_once_and_again_when_a_shard_changes(full):
    load_rollouts(full.folder)
    made = (full.folder / "rollouts.arrow").stat().st_ino
    load_rollouts(full.folder)
    assert (full.folder / "rollouts.arrow").stat().st_ino == made
    full.path(1).unlink()
    assert load_rollouts(full.folder, partial=True)["prompt_id"][:] == [0, 0, 1, 1, 4, 4]
    full.write(1, *shard(full, 1))
    assert len(load_rollouts(full.folder)) == 10
    (full.folder / "rollouts.arrow").write_bytes(b"nonsense")
    assert len(load_rollouts(full.folder)) == 10


def test_rollouts_of_a_read_only_folder_are_read_all_the_same(full, tmp_path, monkeypatch):
    expected = load_rollouts(full.folder).to_list()
    (full.folder / "rollouts.arrow").unlink()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def refuse(*args):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(storage, "write_stream", refuse)
    rollouts = load_rollouts(full.folder)
    assert rollouts.to_list() == expected and not (full.folder / "rollouts.arrow").exists()


@pytest.mark.parametrize(
    "other, message",
    [
        ({"sampling": {"temperature": 1.0}}, "asked for temperature 1.0 instead of 0.5. Rollouts drawn in two ways"),
        ({"sampling": {"top_p": 1.0, "max_new_tokens": 9}}, "max_new_tokens 9 instead of 8, top_p 1.0 instead of 0.9"),
        ({"seed": 1}, "seed 1 instead of 0"),
        ({"generator": "somebody"}, "generator 'somebody' instead of 'nobody'"),
        ({"backend": "vllm"}, "backend 'vllm' instead of 'scripted'"),
        ({"completions_per_prompt": 3}, "completions_per_prompt 3 instead of 2"),
        ({"prompts": 6, "prompts_sha256": "ef" * 32}, "asked for prompts 6 instead of 5. Roll"),
        ({"prompts_sha256": "ef" * 32}, "prompts_sha256 efefefefefef... instead of cdcdcdcdcdcd..."),
        ({"tokenizer_fingerprint": "ab" * 32 + ":2"}, "tokenizer_fingerprint"),
    ],
)
def test_a_folder_never_mixes_two_ways_to_sample(full, other, message):
    before = names(full.folder)
    with pytest.raises(ValueError, match=message):
        RolloutFolder.open(full.folder, change(**other))
    assert names(full.folder) == before


def test_a_folder_that_is_continued_keeps_the_size_of_its_shards(full):
    again = RolloutFolder.open(full.folder, change(prompts_per_shard=5))
    assert again.settings.prompts_per_shard == 2 and again.missing() == []


def test_settings_survive_the_way_to_disk_and_back():
    assert RolloutSettings.from_json(SETTINGS.to_json()) == SETTINGS
    assert json.loads(SETTINGS.to_json())["sampling"] == {"max_new_tokens": 8, "temperature": 0.5, "top_p": 0.9}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1}', '{"format": 2}'])
def test_settings_that_cannot_be_read_are_named(store, text):
    (store.folder / "settings.json").write_text(text)
    with pytest.raises(ValueError, match=r"settings.json cannot be read \(.*Restore it from a copy, or sample into"):
        RolloutFolder.open(store.folder, SETTINGS)


def test_shards_without_settings_are_refused(full):
    (full.folder / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"holds rollouts but no settings.json, so nobody knows how they were sampled"):
        RolloutFolder.open(full.folder, SETTINGS)


def test_a_folder_of_something_else_is_no_folder_of_rollouts(tmp_path):
    with pytest.raises(ValueError, match=r"is no folder of rollouts: it has no settings.json"):
        load_rollouts(tmp_path)


def test_missing_shards_are_an_error_unless_a_part_is_asked_for(store):
    with pytest.raises(ValueError, match="3 of 3 shards are missing"):
        load_rollouts(store.folder)
    with pytest.raises(ValueError, match="holds no rollouts yet"):
        load_rollouts(store.folder, partial=True)
    store.write(1, *shard(store, 1))
    with pytest.raises(ValueError, match=r"2 of 3 shards are missing. Run the sampling command again to continue it"):
        load_rollouts(store.folder)
    assert load_rollouts(store.folder, partial=True)["prompt_id"][:] == [2, 2, 3, 3]


@pytest.mark.parametrize("left", [0, 3, 0.5, 0.99])
def test_a_truncated_shard_is_found_and_named_with_what_to_do(full, left):
    whole = full.path(1).read_bytes()
    full.path(1).write_bytes(whole[: left if isinstance(left, int) else int(left * len(whole))])
    message = (
        r"rollouts-00001.parquet is damaged \(.*\). Delete it and run the sampling command again: only its prompts, "
        "2 to 3, are sampled anew"
    )
    with pytest.raises(ValueError, match=message):
        full.skipped()
    with pytest.raises(ValueError, match=message):
        load_rollouts(full.folder)
    full.path(1).unlink()
    full.write(1, *shard(full, 1))
    assert len(load_rollouts(full.folder)) == 10


def test_a_flipped_bit_inside_a_shard_is_found(full):
    metadata = pq.read_metadata(full.path(1))
    column = metadata.row_group(0).column(3)  # the token ids
    damaged = bytearray(full.path(1).read_bytes())
    damaged[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    full.path(1).write_bytes(damaged)
    with pytest.raises(ValueError, match=r"rollouts-00001.parquet is damaged"):
        load_rollouts(full.folder)
    assert not (full.folder / "rollouts.arrow").exists()


def test_a_shard_that_lacks_rows_is_damaged(full):
    table, _ = shard(full, 1)
    full.write(1, table.slice(1), [])
    with pytest.raises(ValueError, match=r"rollouts-00001.parquet is damaged \(3 rows instead of 4\)"):
        full.skipped()


def test_skipped_completions_are_remembered_and_counted(store):
    completions = [Completion([7], True), Skipped("no answer"), Skipped("garbage"), Skipped("no answer")]
    store.write(0, *rollout_table(0, [[10], [11]], completions, SAMPLING))
    store.write(1, *shard(store, 1))
    assert store.skipped() == {"no answer": 2, "garbage": 1} and store.skipped([1]) == {}
    assert store.missing() == [2]
    assert load_rollouts(store.folder, partial=True)["prompt_id"][:] == [0, 2, 2, 3, 3]


def test_a_full_disk_leaves_nothing_of_the_shard_and_all_of_those_before_it(store):
    store.write(0, *shard(store, 0))
    # the kernel's own "No space left on device" for everything written under the temporary name
    temporary_path(store.path(1)).symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"00001.parquet could not be written and was removed. The shards before") as e:
        store.write(1, *shard(store, 1))
    assert e.value.errno == errno.ENOSPC and "No space left on device" in str(e.value)
    assert names(store.folder) == ["rollouts-00000.parquet", "settings.json"]
    store.write(1, *shard(store, 1))
    assert load_rollouts(store.folder, partial=True)["prompt_id"][:] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_disk_that_fills_up_while_syncing_leaves_nothing_either(store, monkeypatch):
    def full_disk(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="make room, and run the same command again to continue after them"):
        store.write(0, *shard(store, 0))
    assert names(store.folder) == ["settings.json"]


def test_no_room_for_the_copy_to_read_from_is_said(full):
    temporary_path(full.folder / "rollouts.arrow").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"the copy to read from, .*rollouts.arrow, could not be written \(No space"):
        load_rollouts(full.folder)


def test_what_a_killed_run_left_half_written_is_cleared_away_by_the_process_whose_shard_it_is(store):
    for number in range(3):
        (store.folder / f".rollouts-{number:05d}.parquet.host-1.tmp").write_bytes(b"PAR1 half")
    with store.locked(0, 2):
        pass
    assert [name for name in names(store.folder) if name.endswith(".tmp")] == [".rollouts-00001.parquet.host-1.tmp"]


def test_a_copy_that_was_half_written_is_cleared_away_unless_its_writer_may_live(store):
    own = temporary_path(store.folder / "rollouts.arrow")
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    dead = own.with_name(own.name.replace(f"-{os.getpid()}-", f"-{child}-"))
    elsewhere = own.with_name(".rollouts.arrow.another-host-1-1.tmp")
    for file in (own, dead, elsewhere):
        file.write_bytes(b"half")
    with store.locked(0, 1):
        assert own.exists() and elsewhere.exists() and not dead.exists()


def test_a_second_run_in_the_same_folder_is_kept_out(store):
    with (
        store.locked(0, 1),
        pytest.raises(ValueError, match="Another run is sampling into"),
        store.locked(0, 1),
    ):
        pass
    with store.locked(0, 1), store.locked(1, 2):  # the processes of one run do not disturb each other
        pass


def test_rollouts_in_memory_and_on_disk_have_the_same_columns(full):
    table, _ = shard(full, 0)
    in_memory = Dataset(table)
    assert in_memory.features == load_rollouts(full.folder).features
    assert in_memory.to_list() == load_rollouts(full.folder).select(range(4)).to_list()
