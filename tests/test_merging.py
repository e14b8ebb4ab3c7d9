import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from lenvm_rl.assets import model_path
from lenvm_rl.launch import run
from lenvm_rl.merging import FolderWeights, Selection, main, merge_folders, merge_update

POLICY = Path(model_path("embedded/policy"))


def merged(base, tuned, **settings):
    return dict(merge_update(base, tuned, **settings))


def test_the_largest_quarter_of_the_update_stays_by_hand():
    base = {"w": tensor([1.0, 1.0, 1.0, 1.0]), "b": tensor([0.0, 0.0, 0.0, 0.0])}
    tuned = {"w": tensor([1.1, 0.0, 1.2, 1.0]), "b": tensor([0.0, 0.1, 0.0, -0.2])}
    result = merged(base, tuned)  # keep 0.25, scale 0.7, of each tensor
    assert_close(result["w"], tensor([1.0, 0.3, 1.0, 1.0]))
    assert_close(result["b"], tensor([0.0, 0.0, 0.0, -0.14]))
    result = merged(base, tuned, scope="global", keep=3 / 8)
    assert_close(result["w"], tensor([1.0, 0.3, 1.14, 1.0]))
    assert_close(result["b"], tensor([0.0, 0.0, 0.0, -0.14]))


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.25, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("kind", ["random", "ties", "zeros", "tiny"])
def test_the_selection_is_that_of_sorting(keep, kind):
    torch.manual_seed(0)
    parts = [torch.randn(n).abs() for n in (1, 300, 7, 1000)]
    if kind == "ties":
        parts = [(part * 4).round() for part in parts]
    if kind == "zeros":
        parts = [torch.zeros_like(part) for part in parts]
    if kind == "tiny":
        parts = [part * 1e-40 for part in parts]  # subnormal
    selection = Selection(lambda: parts, keep)
    chosen = torch.cat([selection.chosen(part) for part in parts])
    wanted = round(keep * 1308)
    order = torch.cat(parts).sort(descending=True, stable=True).indices[:wanted]
    assert torch.equal(chosen.nonzero().flatten(), order.sort().values)


def random_state(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {f"layer.{i}": torch.randn(20, 30, generator=generator).to(dtype) for i in range(3)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_all_of_the_update_is_the_tuned_model_and_nothing_of_it_the_base(dtype, scope):
    base, tuned = random_state(dtype), {name: w * 1e-6 for name, w in random_state(dtype, seed=1).items()}
    for name, weight in merged(base, tuned, keep=1.0, scale=1.0, scope=scope).items():
        assert torch.equal(weight, tuned[name])  # base + (tuned - base) would round
    for settings in ({"keep": 0.0, "scale": 1.0}, {"keep": 1.0, "scale": 0.0}):
        for name, weight in merged(base, tuned, scope=scope, **settings).items():
            assert torch.equal(weight, base[name])


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_an_independent_merge_gives_the_same(scope):
    base, tuned = random_state(), random_state(seed=1)
    result = merged(base, tuned, keep=0.3, scale=0.6, scope=scope)
    everything = torch.cat([(tuned[n] - base[n]).abs().flatten() for n in base])
    for name in base:
        update = tuned[name] - base[name]
        magnitudes = everything if scope == "global" else update.abs().flatten()
        threshold = magnitudes.sort(descending=True).values[round(0.3 * len(magnitudes)) - 1]
        assert_close(result[name], torch.where(update.abs() >= threshold, base[name] + 0.6 * update, base[name]))
        assert ((result[name] != base[name]).float().mean() - 0.3).abs() < (1e-3 if scope == "tensor" else 0.1)


def test_the_dtype_is_that_of_the_tuned_model():
    result = merged(random_state(torch.bfloat16), random_state(seed=1))
    assert {weight.dtype for weight in result.values()} == {torch.float32}


def test_buffers_that_do_not_train_pass_and_must_agree():
    base, tuned = random_state() | {"steps": tensor([3])}, random_state(seed=1) | {"steps": tensor([3])}
    assert merged(base, tuned)["steps"].tolist() == [3]
    with pytest.raises(ValueError, match=r"steps has dtype torch.int64 and differs"):
        merged(base | {"steps": tensor([4])}, tuned)


def test_a_tied_weight_may_be_stored_once_or_twice():
    base, tuned = random_state(), random_state(seed=1)
    expected = merged(base, tuned)
    twice = merged(base, tuned | {"lm_head": tuned["layer.0"].clone()})
    assert torch.equal(twice["lm_head"], expected["layer.0"])
    assert merged(base | {"lm_head": base["layer.0"].clone()}, tuned).keys() == expected.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b, t: t.pop("layer.1"), "The base model has layer.1, but the tuned model does not"),
        (lambda b, t: b.pop("layer.1"), "The tuned model has layer.1, but the base model does not"),
        (
            lambda b, t: t.update({"layer.2": torch.zeros(21, 30)}),
            r"layer.2 has the shape \(21, 30\) in the tuned model, but \(20, 30\) in the base",
        ),
        (lambda b, t: t["layer.0"].fill_(float("nan")), "layer.0 holds weights that are not finite"),
    ],
    ids=["missing", "extra", "shape", "nan"],
)
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_models_that_do_not_fit_are_refused(change, message, scope):
    base, tuned = random_state(), random_state(seed=1)
    change(base, tuned)
    with pytest.raises(ValueError, match=message):
        merged(base, tuned, scope=scope)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 1.5}, "keep is 1.5, but must be a share between 0 and 1"),
        ({"keep": float("nan")}, "keep is nan"),
        ({"scale": -0.1}, "scale is -0.1, but must lie between 0"),
        ({"scope": "layer"}, "scope must be one of tensor, global, got 'layer'"),
    ],
    ids=str,
)
def test_settings_outside_their_range_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        merge_update({}, {}, **settings)


# Folders


@pytest.fixture
def tuned_folder(tmp_path):
    """The embedded policy after an update, in several files."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(POLICY)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 1e-3)
    folder = tmp_path / "tuned"
    model.save_pretrained(folder, max_shard_size="300KB")
    AutoTokenizer.from_pretrained(POLICY).save_pretrained(folder)
    (folder / "trainer_state.json").write_text("{}")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_a_merged_folder_is_a_model(tuned_folder, tmp_path, scope):
    output = tmp_path / "merged"
    merge_folders(POLICY, tuned_folder, output, scope=scope)
    base, tuned, result = (
        dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
        for folder in (POLICY, tuned_folder, output)
    )
    changed = kept = 0
    for name, weight in result.items():
        chosen = weight != base[name]
        assert_close(weight[chosen], torch.lerp(base[name], tuned[name], 0.7)[chosen])
        changed, kept = changed + chosen.sum().item(), kept + weight.numel()
    assert abs(changed / kept - 0.25) < 1e-3
    assert AutoTokenizer.from_pretrained(output).get_vocab() == AutoTokenizer.from_pretrained(POLICY).get_vocab()
    names = {path.name for path in output.iterdir()}
    assert names == {path.name for path in tuned_folder.iterdir()} - {"trainer_state.json"}


def test_the_whole_update_gives_the_tuned_folder_bit_for_bit(tuned_folder, tmp_path):
    merge_folders(POLICY, tuned_folder, tmp_path / "merged", keep=1.0, scale=1.0)
    for file in tuned_folder.glob("*.safetensors"):
        ours, theirs = load_file(tmp_path / "merged" / file.name), load_file(file)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_one_shard_of_each_model_is_read_at_a_time(tuned_folder, monkeypatch):
    read = []
    get = FolderWeights.__getitem__
    monkeypatch.setattr(FolderWeights, "__getitem__", lambda self, name: read.append(name) or get(self, name))
    weights = FolderWeights(tuned_folder)
    updates = merge_update(FolderWeights(POLICY), weights)
    assert not read  # names and shapes are known from the headers
    next(updates)
    assert len(read) == 2
    assert list(weights) == [name for file in weights.files for name in load_file(tuned_folder / file)]


def test_folders_that_cannot_be_merged_are_refused(tuned_folder, tmp_path):
    with pytest.raises(ValueError, match=r"tuned' is not empty: name another one"):
        merge_folders(POLICY, tuned_folder, tuned_folder)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds no model.safetensors .* It holds an adapter: .* merge_and_unload"):
        merge_folders(POLICY, tmp_path / "adapter", tmp_path / "merged")


def test_an_interrupted_merge_leaves_no_model(tuned_folder, tmp_path):
    index = json.loads((tuned_folder / "model.safetensors.index.json").read_text())
    last = sorted(set(index["weight_map"].values()))[-1]
    shard = load_file(tuned_folder / last)
    save_file({name: w * float("nan") for name, w in shard.items()}, tuned_folder / last, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="not finite"):
        merge_folders(POLICY, tuned_folder, tmp_path / "merged")
    assert not (tmp_path / "merged" / "config.json").exists()


def test_the_command_line(tuned_folder, tmp_path):
    output = tmp_path / "merged"
    arguments = ["embedded/policy", tuned_folder, output, "--keep", "0.5", "--scale", "1", "--scope", "global"]
    command = [sys.executable, "-m", "lenvm_rl.merging", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (output / "config.json").is_file()


@pytest.mark.parametrize(
    ("tuned", "message"),
    [
        ("embedded/policy", "output' is not empty: name another one"),
        ("./nowhere", "tuned: there is no folder './nowhere'"),
    ],
)
def test_the_command_line_says_in_one_line_what_is_wrong(tmp_path, monkeypatch, capsys, tuned, message):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "mine").write_text("")
    monkeypatch.setattr(sys, "argv", ["merging", "embedded/policy", tuned, str(tmp_path / "output")])
    with pytest.raises(SystemExit) as ended:
        run(main)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and error.count("\n") == 1
