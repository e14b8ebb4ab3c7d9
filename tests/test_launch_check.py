import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from lenvm_rl.launch_check import avoid_compiled_collectives, check_launch

ROOT = Path(__file__).parents[1]
SIMPLE = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
"""What accelerate's launcher of one process leaves where several were asked for."""


def running(kind="NO", processes=1):
    return SimpleNamespace(distributed_type=DistributedType(kind), num_processes=processes)


@pytest.fixture
def connected(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)


@pytest.mark.parametrize(
    "accelerator, environment",
    [
        (running(), {}),
        (running(), {"ACCELERATE_USE_CPU": "False"}),  # accelerate launch --num_processes 1
        (running(), {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}),  # a cluster sets it for every job
        (running(), {"WORLD_SIZE": "1", "RANK": "0", "ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}),
        (running("MULTI_GPU", 8), {"WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1"}),
        (running("MULTI_CPU", 2), {"WORLD_SIZE": "2"}),
        (running("MULTI_CPU", 2), {**SIMPLE, "PMI_SIZE": "2"}),  # by mpirun
        (running("DEEPSPEED", 2), {"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}),
        (running("FSDP", 2), {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}),
    ],
)
def test_a_launch_that_became_what_it_asked_for_passes(connected, accelerator, environment):
    check_launch(accelerator, environment)


@pytest.mark.parametrize(
    "accelerator, environment, message",
    [
        (running(), {"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "started 2 processes .* connected 1: .* set use_cpu=True"),
        (running(), SIMPLE, "asked for several processes and started one: .* --config_file recipes/accelerate/cpu_ddp"),
        (
            running("MULTI_CPU", 2),
            {"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "true"},
            "asked for DeepSpeed, but accelerate dropped it and runs MULTI_CPU: ACCELERATE_USE_CPU does that. Unset it",
        ),
        (
            running("MULTI_CPU", 2),
            {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"},
            "asked for FSDP, but accelerate runs MULTI_CPU: .* take recipes/accelerate/cpu_zero3.yaml",
        ),
    ],
)
def test_a_launch_that_fell_back_is_refused_with_the_fix(connected, accelerator, environment, message):
    with pytest.raises(ValueError, match=message):
        check_launch(accelerator, environment)


def test_deepspeed_without_a_launcher_is_refused():
    with pytest.raises(ValueError, match="in a process that no launcher started: start it with accelerate launch"):
        check_launch(running("DEEPSPEED"), {})


def test_files_that_a_message_names_exist():
    for name in ("cpu_ddp", "cpu_zero2", "cpu_zero3", "zero2"):
        assert (ROOT / "recipes" / "accelerate" / f"{name}.yaml").is_file()


def test_deepspeed_is_kept_from_compiling(monkeypatch):
    deepspeed = SimpleNamespace(ops=SimpleNamespace(__compatible_ops__={"deepspeed_shm_comm": True, "other": True}))
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    avoid_compiled_collectives()
    assert deepspeed.ops.__compatible_ops__ == {"deepspeed_shm_comm": False, "other": True}


SCRIPT = """
from accelerate import Accelerator
from lenvm_rl.launch_check import check_launch
check_launch(Accelerator())
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="accelerators are found without being asked for")
@pytest.mark.parametrize("flags", [["--cpu"], []], ids=["with --cpu", "without"])
def test_the_launcher_of_accelerate_still_starts_one_process_for_two(tmp_path, flags):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
    kept = {name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "WORLD_SIZE")}
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", *flags, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env={**kept, "PYTHONPATH": str(ROOT)})
    assert done.returncode != 0
    assert "accelerate launch was asked for several processes and started one" in done.stderr
