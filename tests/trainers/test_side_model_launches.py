"""A model beside the policy: one process, DDP and ZeRO-1/2/3 make the same updates, and resume them exactly."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from lenvm_rl.model import LengthValueModel

SCRIPT = r"""
import os
import sys
import traceback
from pathlib import Path

import deepspeed
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin

from lenvm_rl.launch_check import avoid_compiled_collectives
from lenvm_rl.model import LengthValueModel
from lenvm_rl.trainers.side_model import SideModel

critic, folder, port = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
avoid_compiled_collectives()
torch.set_num_threads(1)
torch.manual_seed(0)
UPDATES, ROWS, WIDTH = 5, 8, 10
ids = torch.randint(2, 100, (UPDATES, ROWS, WIDTH))
targets = -torch.rand(UPDATES, ROWS, WIDTH)
lengths = torch.arange(ROWS) % WIDTH + 1  # processes and micro-batches hold unlike numbers of tokens
mask = torch.arange(WIDTH) < lengths[:, None]


def build(accelerator):
    model = LengthValueModel.from_pretrained(critic)
    if accelerator.process_index:  # a head drawn from another random state
        torch.nn.init.normal_(model.v_head.summary.weight)
    return SideModel(model, accelerator, learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.02, eps=1e-5,
                     schedule="linear", warmup_steps=2, total_steps=UPDATES, gradient_checkpointing=True, name="critic")


def update(side, number):
    share = ROWS // side.accelerator.num_processes
    own = range(share * side.accelerator.process_index, share * (side.accelerator.process_index + 1))
    side.train()
    losses = torch.zeros(())
    for part, last in ((list(own)[:share // 2], False), (list(own)[share // 2:], True)):
        values = -torch.sigmoid(side(input_ids=ids[number, part]).logits)
        loss = ((values - targets[number, part]).square() * mask[part]).sum() / mask.sum()
        side.backward(loss, last=last)
        losses += loss.detach()
    norm = side.step()
    side.eval()
    return side.accelerator.reduce(losses).item(), norm


def train(launch):
    plugin = None
    if launch.startswith("zero"):
        plugin = DeepSpeedPlugin(zero_stage=int(launch[-1]), gradient_accumulation_steps=2)
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 2
    PartialState(cpu=True)  # as transformers does with use_cpu; otherwise accelerate sees one process
    accelerator = Accelerator(cpu=plugin is None, deepspeed_plugin=plugin)
    kind = {"cpu": "NO", "ddp": "MULTI_CPU"}.get(launch, "DEEPSPEED")
    running = (accelerator.distributed_type.value, accelerator.num_processes)
    assert running == (kind, 1 if launch == "cpu" else 2), running
    side = build(accelerator)
    log = []
    for number in range(UPDATES):
        log.append(update(side, number))
        if number == 1:
            side.save(folder / launch / "state", writes=accelerator.is_main_process)
            accelerator.wait_for_everyone()
    side.save_pretrained(folder / launch / "model")
    whole = side.whole_weights()
    resumed = build(accelerator)
    resumed.load(folder / launch / "state")
    assert resumed.steps == 2
    again = [update(resumed, number) for number in range(2, UPDATES)]
    weights = resumed.whole_weights()
    if accelerator.is_main_process:
        torch.save({"log": log, "again": again, "weights": whole, "resumed": weights},
                   folder / f"{launch}.pt")


def fork(launch, rank, processes):
    if child := os.fork():
        return child
    code = 1
    try:
        if processes > 1 or launch != "cpu":
            os.environ |= {"WORLD_SIZE": str(processes), "RANK": str(rank), "LOCAL_RANK": str(rank),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if launch.startswith("zero"):
            os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        train(launch)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


for launch in ("cpu", "ddp", "zero1", "zero2", "zero3"):
    children = {fork(launch, rank, 1 if launch == "cpu" else 2) for rank in range(1 if launch == "cpu" else 2)}
    while children:
        child, status = os.wait()
        children.discard(child)
        if status:
            for other in children:
                os.kill(other, 9)
            sys.exit(f"{launch} failed")
"""

LAUNCHES = ("ddp", "zero1", "zero2", "zero3")

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, critic_folder):
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("side_model")
    (folder / "script.py").write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(folder / "script.py"), critic_folder, str(folder), str(port)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found = {launch: torch.load(folder / f"{launch}.pt") for launch in ("cpu", *LAUNCHES)}
    return found | {"folder": folder}


def test_the_updates_are_clipped_and_differ(runs):
    # otherwise the comparisons below would not see a gradient of the wrong size
    assert all(norm > 0.02 for _, norm in runs["cpu"]["log"])
    assert len({loss for loss, _ in runs["cpu"]["log"]}) == 5


@pytest.mark.parametrize("launch", LAUNCHES)
def test_every_launch_makes_the_updates_of_one_process(runs, launch):
    assert_close(torch.tensor(runs[launch]["log"]), torch.tensor(runs["cpu"]["log"]), rtol=1e-4, atol=1e-6)
    assert runs[launch]["weights"].keys() == runs["cpu"]["weights"].keys()
    for name, weight in runs["cpu"]["weights"].items():
        assert_close(runs[launch]["weights"][name], weight, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("launch", ("cpu", *LAUNCHES))
def test_a_resumed_one_is_the_one_that_was_not_interrupted(runs, launch):
    assert runs[launch]["again"] == runs[launch]["log"][2:]
    for name, weight in runs[launch]["weights"].items():
        assert torch.equal(runs[launch]["resumed"][name], weight), name


@pytest.mark.parametrize("launch", ("cpu", *LAUNCHES))
def test_its_folder_is_one_that_transformers_loads(runs, launch):
    folder = runs["folder"] / launch / "model"
    assert json.loads((folder / "config.json").read_text())["gamma"] == 0.9
    model = LengthValueModel.from_pretrained(folder)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, runs[launch]["weights"][name]), name
