"""The launch files: what accelerate makes of them, without starting anything."""

import re
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "accelerate"
# launcher, processes, ZeRO stage
EXPECTED = {
    "cpu": (None, 1, None),
    "cpu_ddp": ("multi_gpu", 2, None),
    "cpu_zero2": ("use_deepspeed", 2, 2),
    "cpu_zero3": ("use_deepspeed", 2, 3),
    "ddp": ("multi_gpu", 8, None),
    "zero1": ("use_deepspeed", 8, 1),
    "zero2": ("use_deepspeed", 8, 2),
    "zero3": ("use_deepspeed", 8, 3),
    "zero3_offload": ("use_deepspeed", 8, 3),
    "zero3_multinode": ("use_deepspeed", 16, 3),
    "fsdp2": ("use_fsdp", 8, None),
}


def launch_of(name, *flags):
    command = ["--config_file", str(FOLDER / f"{name}.yaml"), *flags, "recipe.py"]
    return _validate_launch_command(launch_command_parser().parse_args(command))[0]


def test_every_file_is_expected():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_file_asks_for_what_its_name_says(name):
    launcher, processes, stage = EXPECTED[name]
    launch = launch_of(name)
    used = [kind for kind in ("multi_gpu", "use_deepspeed", "use_fsdp") if getattr(launch, kind)]
    assert used == ([launcher] if launcher else [])
    assert launch.num_processes == processes
    assert (launch.zero_stage if launcher == "use_deepspeed" else None) == stage
    assert not launch.cpu  # the flag that drops every launcher but that of one process


@pytest.mark.parametrize("name", EXPECTED)
def test_a_file_says_what_it_was_tested_on_and_how_to_launch_it(name):
    head = (FOLDER / f"{name}.yaml").read_text().split("compute_environment")[0]
    assert re.search(r"^# (Tested on: \S|Not run: \S)", head, re.MULTILINE)
    command = re.search(r"^# Launch:    (.*)$", head, re.MULTILINE)
    assert command and f"--config_file recipes/accelerate/{name}.yaml" in command[1]
    for path in re.findall(r"recipes/\S+", command[1]):
        assert (ROOT / path).is_file()


def test_only_the_file_that_says_so_offloads():
    for name, (launcher, *_) in EXPECTED.items():
        if launcher == "use_deepspeed":
            device = "cpu" if name == "zero3_offload" else "none"
            launch = launch_of(name)
            assert launch.offload_optimizer_device == launch.offload_param_device == device


def test_sharded_policies_are_saved_whole():
    for name, (_, _, stage) in EXPECTED.items():
        if stage == 3:
            assert str(launch_of(name).zero3_save_16bit_model).lower() == "true"
    assert launch_of("fsdp2").fsdp_state_dict_type == "FULL_STATE_DICT"


def test_several_machines_are_told_apart_by_flags():
    launch = launch_of("zero3_multinode", "--machine_rank", "1", "--main_process_ip", "node1")
    assert (launch.machine_rank, launch.main_process_ip, launch.num_machines) == (1, "node1", 2)
