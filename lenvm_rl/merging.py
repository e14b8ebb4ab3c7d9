"""Update-selective merging: keep the large part of what training changed (DLER, arXiv 2510.15110, after TIES).

    merged = base + scale * mask(tuned - base)        mask: the share `keep` of largest magnitude

1. Training to shorten changes most weights a little and few a lot; the few carry the effect. DLER keeps 25 % at 0.7 and
   recovers accuracy that shortening had cost. The paper does not say whether the 25 % are of each tensor
   (`scope="tensor"`), as is usual, or of all weights together ("global").
2. Exactly `keep` of the weights are kept, also where many changed by the same amount, as they do in bfloat16.
3. One tensor of each model is in memory at a time, and one shard of the result. The global threshold is found by
   counting magnitudes in two further passes, not by sorting them.

From the command line, between folders or hub names:

    python -m lenvm_rl.merging BASE TUNED OUTPUT --keep 0.25 --scale 0.7
"""

import argparse
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lenvm_rl.assets import model_path
from lenvm_rl.launch import check_model, run

Scope = Literal["tensor", "global"]

CHUNK = 2**22
"""Weights whose magnitudes are counted at once."""
INDEX = "model.safetensors.index.json"
NOT_WEIGHTS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "*processor_config.json",
    "*.py",
)


def merge_update(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    *,
    keep: float = 0.25,
    scale: float = 0.7,
    scope: Scope = "tensor",
) -> Iterator[tuple[str, Tensor]]:
    """The base model with the largest part of the tuned model's update.

    Args:
        base, tuned: weights by name; a lazy mapping, such as `FolderWeights`, is read tensor by tensor.
        keep: share of the weights that change, the published 0.25. Ties are kept in order of position.
        scale: factor of their change, published 0.7.
        scope: whether the share is of each tensor or of all together.

    Returns:
        Names and weights, one after the other in the order and dtype of `tuned`. With keep=1 and scale=1 they are the
        tuned ones bit for bit, with keep=0 or scale=0 the base ones.

    Raises:
        ValueError: a setting outside its range; names or shapes that differ; while iterating, weights that are not
            finite, or other than floating-point ones that differ.

    Tied weights may be stored once in one model and twice in the other: a tensor that only one of them has must equal
    another of the same model, whose partner then stands in for it.
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"keep is {keep}, but must be a share between 0 and 1.")
    if not 0 <= scale <= 1:
        raise ValueError(f"scale is {scale}, but must lie between 0, the base model, and 1, the tuned one.")
    if scope not in get_args(Scope):
        raise ValueError(f"scope must be one of {', '.join(get_args(Scope))}, got {scope!r}.")
    partner = _partners(base, tuned)
    for name in tuned:
        shapes = _shape(base, partner[name]), _shape(tuned, name)
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{name} has the shape {shapes[1]} in the tuned model, but {shapes[0]} in the base: these are not two "
                "states of one model. Give the model that training started from, with the same vocabulary."
            )

    def pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
        return ((name, base[partner[name]], tuned[name]) for name in tuned)

    def magnitudes() -> Iterator[Tensor]:
        return (_magnitude(*pair) for pair in pairs() if pair[2].is_floating_point())

    def merged() -> Iterator[tuple[str, Tensor]]:
        everywhere = Selection(magnitudes, keep) if scope == "global" else None
        for name, ours, theirs in pairs():
            if not theirs.is_floating_point():
                if not torch.equal(ours, theirs):
                    raise ValueError(f"{name} has dtype {theirs.dtype} and differs: only floating-point weights merge.")
                yield name, theirs
                continue
            size = _magnitude(name, ours, theirs)
            selection = everywhere or Selection(partial(iter, [size]), keep)
            dtype = torch.promote_types(torch.float32, theirs.dtype)
            # lerp, since base + (tuned - base) rounds
            moved = torch.lerp(ours.to(dtype), theirs.to(dtype), scale).to(theirs.dtype)
            yield name, torch.where(selection.chosen(size).view(theirs.shape), moved, ours.to(theirs.dtype))

    return merged()


class Selection:
    """The share `keep` of largest magnitude, of values that are never in memory together.

    Args:
        magnitudes: gives the values, as flat float32 tensors without sign; called twice.
        keep: share, in [0, 1].

    The bits of a float without sign, read as an integer, are in the order of its value. So counting the upper and then,
    within one of their values, the lower 16 bits gives the exact threshold.
    """

    def __init__(self, magnitudes: Callable[[], Iterable[Tensor]], keep: float) -> None:
        upper = _counts(((bits >> 16) for bits in _bits(magnitudes())), 2**15)
        wanted = round(keep * int(upper.sum()))
        if wanted == 0:
            self.threshold, self.ties = 2**31, 0
            return
        high, above = _largest(upper, wanted)
        lower = _counts((bits[(bits >> 16) == high] & 0xFFFF for bits in _bits(magnitudes())), 2**16)
        low, above_low = _largest(lower, wanted - above)
        self.threshold = (high << 16) | low
        self.ties = wanted - above - above_low
        """Values equal to the threshold that are still to be chosen."""

    def chosen(self, magnitudes: Tensor) -> Tensor:
        """(n,) bool, for each tensor once and in the order in which they were given."""
        bits = magnitudes.view(torch.int32)
        if self.threshold == 2**31:
            return torch.zeros_like(bits, dtype=torch.bool)
        chosen = bits > self.threshold
        equal = (bits == self.threshold).nonzero().flatten()[: self.ties]
        self.ties -= len(equal)
        chosen[equal] = True
        return chosen


class FolderWeights(Mapping[str, Tensor]):
    """The weights in a model folder, read from its safetensors files when they are asked for.

    Raises:
        ValueError: a folder without safetensors weights.
    """

    def __init__(self, folder: Path) -> None:
        index = folder / INDEX
        if index.is_file():
            self.files: list[str] = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        elif (folder / "model.safetensors").is_file():
            self.files = ["model.safetensors"]
        else:
            adapter = (folder / "adapter_config.json").is_file()
            raise ValueError(
                f"The folder {str(folder)!r} holds no model.safetensors and no {INDEX}. "
                + (
                    "It holds an adapter: load it with its base model, call merge_and_unload(), and save that."
                    if adapter
                    else "Load the model and save it with save_pretrained()."
                )
            )
        self._files = {file: safe_open(folder / file, framework="pt") for file in self.files}
        self.file_of = {name: file for file, content in self._files.items() for name in content.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        return self._files[self.file_of[name]].get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self.file_of  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.file_of)

    def __len__(self) -> int:
        return len(self.file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor that need not be read for it."""
        return tuple(self._files[self.file_of[name]].get_slice(name).get_shape())

    def metadata(self, file: str) -> dict[str, str]:
        """What a file says of itself."""
        return self._files[file].metadata() or {"format": "pt"}


def merge_folders(
    base: Path, tuned: Path, output: Path, *, keep: float = 0.25, scale: float = 0.7, scope: Scope = "tensor"
) -> None:
    """Merge two model folders into a third one: an ordinary model folder in the files and dtypes of the tuned one.

    Raises:
        ValueError: as `merge_update`; an output folder that is not empty.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"The output folder {str(output)!r} is not empty: name another one, or remove it.")
    weights = FolderWeights(tuned)
    updates = merge_update(FolderWeights(base), weights, keep=keep, scale=scale, scope=scope)
    output.mkdir(parents=True, exist_ok=True)
    shard: dict[str, Tensor] = {}
    sizes = {file: list(weights.file_of.values()).count(file) for file in weights.files}
    for name, tensor in updates:
        shard[name] = tensor.contiguous()
        file = weights.file_of[name]
        if len(shard) == sizes[file]:
            save_file(shard, output / file, metadata=weights.metadata(file))
            shard = {}
    # the configuration last: a folder that looks like a model is one
    for pattern in (INDEX, *reversed(NOT_WEIGHTS)):
        for path in sorted(tuned.glob(pattern)):
            shutil.copyfile(path, output / path.name)


def _partners(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> dict[str, str]:
    """For each tensor of the tuned model, the name of the base's."""
    shared = [name for name in tuned if name in base]
    partner = {name: name for name in shared}
    for model, other, which, elsewhere in ((tuned, base, "tuned", "base"), (base, tuned, "base", "tuned")):
        for name in model:
            if name in other:
                continue
            shape = _shape(model, name)
            twins = (t for t in shared if _shape(model, t) == shape and torch.equal(model[t], model[name]))
            twin = next(twins, None)
            if twin is None:
                raise ValueError(
                    f"The {which} model has {name}, but the {elsewhere} model does not, and no other weight of the "
                    f"{which} model equals it, as a tied one would: these are not two states of one model."
                )
            if model is tuned:
                partner[name] = twin
    return partner


def _shape(weights: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    return weights.shape(name) if isinstance(weights, FolderWeights) else tuple(weights[name].shape)


def _magnitude(name: str, ours: Tensor, theirs: Tensor) -> Tensor:
    """(n,) float32: by how much each weight changed."""
    change = (theirs - ours if theirs.dtype == torch.float64 else theirs.float() - ours.float()).float().flatten()
    if not change.isfinite().all():
        raise ValueError(f"{name} holds weights that are not finite in one of the models: training diverged.")
    return change.abs_()


def _bits(magnitudes: Iterable[Tensor]) -> Iterator[Tensor]:
    for values in magnitudes:
        for chunk in values.split(CHUNK):
            yield chunk.view(torch.int32)


def _counts(values: Iterable[Tensor], size: int) -> Tensor:
    counts = torch.zeros(size, dtype=torch.int64)
    for chunk in values:
        counts += torch.bincount(chunk, minlength=size)
    return counts


def _largest(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The largest value that at least `wanted` reach, and how many are above it."""
    reaching = counts.flip(0).cumsum(0)
    place = int((reaching >= wanted).to(torch.uint8).argmax())
    return len(counts) - 1 - place, int(reaching[place - 1]) if place else 0


def _folder(name: str, option: str) -> Path:
    """The model folder of that name; a hub model is downloaded.

    Raises:
        ValueError: no such folder.
    """
    name = check_model(model_path(name), option)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=["*.safetensors", INDEX, *NOT_WEIGHTS]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lenvm_rl.merging", description="Keep the large part of an update.")
    parser.add_argument("base", help="the model that training started from: a folder or a hub name")
    parser.add_argument("tuned", help="the model that came out")
    parser.add_argument("output", help="folder for the merged model")
    parser.add_argument("--keep", type=float, default=0.25, help="share of the weights that change (0.25)")
    parser.add_argument("--scale", type=float, default=0.7, help="factor of their change (0.7)")
    parser.add_argument("--scope", default="tensor", choices=get_args(Scope), help="what the share is of (tensor)")
    args = parser.parse_args()
    base, tuned = _folder(args.base, "base"), _folder(args.tuned, "tuned")
    merge_folders(base, tuned, Path(args.output), keep=args.keep, scale=args.scale, scope=args.scope)


if __name__ == "__main__":
    run(main)
