import json

import pytest

from lenvm_rl.trainers.checkpoint import (
    INCOMPLETE_FOLDER,
    MANIFEST_FILE,
    about,
    fault,
    last_checkpoint,
    publish,
    settle,
)


@pytest.fixture
def written(tmp_path):
    """Writes the files of a checkpoint, beside its place; returns the folder."""

    def _written(step, content="weights"):
        folder = tmp_path / INCOMPLETE_FOLDER / f"checkpoint-{step}"
        (folder / "global_step").mkdir(parents=True)
        (folder / "model.safetensors").write_text(content)
        (folder / "global_step" / "shard_0.pt").write_text("optimizer")
        return folder

    return _written


@pytest.fixture
def saved(written, tmp_path):
    """Saves a checkpoint; returns its path."""

    def _saved(step, content="weights"):
        publish(written(step, content), tmp_path / f"checkpoint-{step}", {"processes": 1})
        return tmp_path / f"checkpoint-{step}"

    return _saved


def test_a_checkpoint_is_in_its_place_with_all_files_and_nothing_is_beside_it(saved, tmp_path):
    checkpoint = saved(3)
    assert fault(checkpoint) is None and about(checkpoint) == {"processes": 1}
    entries = json.loads((checkpoint / MANIFEST_FILE).read_text())["files"]
    assert list(entries) == ["global_step/shard_0.pt", "model.safetensors"]
    # printf weights | sha256sum
    assert entries["model.safetensors"]["sha256"].startswith("9a129038d9a00aed")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_a_checkpoint_of_the_same_step_is_replaced(saved, tmp_path):
    saved(3, "old")
    assert (saved(3, "new") / "model.safetensors").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def damage_missing(checkpoint):
    (checkpoint / "global_step" / "shard_0.pt").unlink()


def damage_cut(checkpoint):
    (checkpoint / "model.safetensors").write_text("wei")


def damage_changed(checkpoint):
    (checkpoint / "model.safetensors").write_text("Weights")


def damage_manifest(checkpoint):
    (checkpoint / MANIFEST_FILE).unlink()


DAMAGES = {
    damage_missing: "global_step/shard_0.pt is missing",
    damage_cut: "model.safetensors has 3 of 7 bytes",
    damage_changed: "the content of model.safetensors changed after it was saved",
    damage_manifest: f"{MANIFEST_FILE}, which is written last, is missing or unreadable",
}


@pytest.mark.parametrize(("damage", "said"), DAMAGES.items(), ids=[damage.__name__ for damage in DAMAGES])
def test_what_is_not_as_it_was_saved_is_named_and_passed_over(saved, tmp_path, damage, said):
    whole, damaged = saved(9), saved(10)
    damage(damaged)
    assert fault(damaged) == said
    skipped = []
    assert last_checkpoint(tmp_path, lambda *what: skipped.append(what)) == whole
    assert skipped == [(damaged, said)]


def test_a_folder_that_is_not_there_is_said_to_be_missing(tmp_path):
    assert fault(tmp_path / "checkpoint-9") == "there is no such folder"


def test_without_a_whole_checkpoint_there_is_no_last_one(written, tmp_path):
    assert last_checkpoint(tmp_path) is None
    written(1)
    assert last_checkpoint(tmp_path) is None


def test_what_a_killed_run_left_half_written_is_cleared_away(saved, written, tmp_path):
    whole = saved(1)
    written(2)
    settle(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"] and fault(whole) is None


@pytest.mark.parametrize("replaces", [False, True])
def test_a_checkpoint_that_only_lacked_its_name_gets_it(saved, written, tmp_path, monkeypatch, replaces):
    if replaces:
        saved(2, "old")
    folder = written(2, "new")
    place = tmp_path / "checkpoint-2"

    def killed(self, target):
        if self == folder:
            raise KeyboardInterrupt
        return rename(self, target)

    rename = type(folder).rename
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(type(folder), "rename", killed)
        publish(folder, place, {})
    assert not place.exists()
    settle(tmp_path)
    assert fault(place) is None and (place / "model.safetensors").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
