"""What every recipe does around its job: defaults for this machine, and errors that a user can act on."""

import os
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from transformers.utils import logging as transformers_logging

from lenvm_rl.launch_check import avoid_compiled_collectives

USER_ERROR = 2
INTERRUPTED = 130
TERMINATED = 143
"""Exit code of a process that SIGTERM ended."""


def run(main: Callable[[], None]) -> None:
    """Run a recipe. What the user caused ends in one line and exit code 2; what we caused, in a traceback.

    Set ``LENVM_TRACEBACK=1`` to see where a one-line error came from.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)  # names that TRL still uses and transformers retires
    transformers_logging.disable_progress_bar()
    try:
        main()
        leave_group()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("LENVM_TRACEBACK") == "1":
            raise
        # an error may be met by one process alone, such as a reward that is not finite
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f" on process {rank}"
        sys.stderr.write(f"error{where}: {' '.join(str(error).split())}\n")
        sys.exit(USER_ERROR)


def leave_group() -> None:
    """Close the connections to the other processes. A process that ends with them open is aborted now and then, by a
    thread of theirs (gloo, torch 2.13), and its launcher reports a failure."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def parse(parser: ArgumentParser, default_config: Path, flags: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Flags over the YAML of ``--config``, over ``default_config`` where there is none, over this machine's defaults.

    Args:
        parser: a `trl.TrlParser`.
        default_config: what the recipe runs without arguments.
        flags: those of the command line by default.

    Raises:
        OSError: no such config file.
        ValueError: a config file that is no YAML, or a key or flag that does not exist.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type == "mps":  # Apple's GPUs lack the float64 of our statistics
        # TRL trains in bf16 on an accelerator unless told otherwise, and refuses to start without one
        parser.set_defaults(use_cpu=True, bf16=False, dataloader_pin_memory=False)
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            avoid_compiled_collectives()
    flags = sys.argv[1:] if flags is None else flags
    # TRL knows no --config=FILE (1.16)
    arguments = [part for a in flags for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    if "--config" not in arguments:
        arguments = ["--config", str(default_config), *arguments]
    elif arguments[-1] == "--config":
        raise ValueError("--config needs the path of a YAML file.")
    try:
        return parser.parse_args_and_config(arguments)  # type: ignore[attr-defined]
    except yaml.YAMLError as error:
        config = arguments[arguments.index("--config") + 1]
        raise ValueError(f"The config file {config} is no valid YAML: {error}") from error


def distributed_summary(accelerator: Accelerator) -> dict[str, Any]:
    """What a run really ran on: type of distribution, processes, and the ZeRO stage under DeepSpeed."""
    plugin = accelerator.state.deepspeed_plugin
    return {
        "type": accelerator.distributed_type.value,
        "num_processes": accelerator.num_processes,
        "zero_stage": plugin.zero_stage if plugin is not None else None,
    }


def one_process(what: str) -> None:
    """Refuse several processes, or several GPUs in one, where only one does the work.

    Raises:
        ValueError: the recipe was launched as several processes.
    """
    processes, gpus = int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.device_count()
    if processes > 1 or gpus > 1:
        raise ValueError(
            f"{what} in one process on one device, but {processes} processes were launched and {gpus} GPUs are "
            "visible: start it with CUDA_VISIBLE_DEVICES=0 python <recipe>."
        )


def check_model(name: str, option: str) -> str:
    """The name, unless it can only be a folder and there is none.

    Raises:
        ValueError: no such folder, or a folder without a model.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{option}: the folder {name!r} holds no config.json, so no model was saved there.")
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise ValueError(f"{option}: there is no folder {name!r}. Give a folder, or a hub name 'owner/name'.")
    return name
