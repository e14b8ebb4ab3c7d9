"""A frozen critic under ZeRO-3, in one process, which partitions as several do."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lenvm_rl.trainers.critic_placement import check_placement
from lenvm_rl.trainers.grpo import LenVMGRPOConfig


@pytest.mark.parametrize("stage", [None, 0, 2, 3])
def test_a_replica_is_possible_everywhere(stage):
    check_placement("replica", stage)


@pytest.mark.parametrize(
    "placement, stage, message",
    [
        ("shared", 3, "length_critic_placement must be one of replica, sharded, got 'shared'"),
        ("sharded", None, "by DeepSpeed ZeRO-3, but this run has no DeepSpeed: launch with --config_file"),
        ("sharded", 2, "by DeepSpeed ZeRO-3, but this run has ZeRO-2: .* or leave the critic a 'replica'"),
    ],
)
def test_a_placement_that_cannot_be_is_refused(placement, stage, message):
    with pytest.raises(ValueError, match=message):
        check_placement(placement, stage)


def test_the_configuration_refuses_it(tiny_run, tmp_path):
    with pytest.raises(ValueError, match=r"length_critic_placement='sharded' .* this run has no DeepSpeed"):
        LenVMGRPOConfig(str(tmp_path), **tiny_run, length_critic_placement="sharded")


def test_the_critic_is_no_part_of_the_policy(train, critic_folder):
    trainer = train(length_critic=critic_folder, max_steps=1)
    policy = {id(parameter) for parameter in trainer.model_wrapped.parameters()}
    critic = list(trainer.length_critic.model.parameters())
    assert critic and not policy & {id(parameter) for parameter in critic}
    assert not any(parameter.requires_grad for parameter in critic)
    assert not any(module is trainer.length_critic.model for module in trainer.model.modules())


SCRIPT = r"""
import json
import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from lenvm_rl.model import LengthValueModel
from lenvm_rl.trainers.critic_placement import ShardedCritic, is_partitioned
from lenvm_rl.trainers.grpo import LenVMGRPOConfig, LenVMGRPOTrainer

policy, critic, folder = sys.argv[1:]
reference = LengthValueModel.from_pretrained(critic, dtype=torch.float32).eval()  # before ZeRO-3 begins
ids = torch.arange(2, 26).view(2, 12)
with torch.no_grad():
    logits = reference(input_ids=ids).logits
found = {}
for name, bf16 in [("replica", False), ("replica", True), ("sharded", False), ("sharded", True), ("object", False)]:
    args = LenVMGRPOConfig(
        folder, length_critic=None if name == "object" else critic, max_completion_length=8, num_generations=2,
        length_critic_placement="replica" if name == "object" else name, per_device_train_batch_size=2,
        use_cpu=True, bf16=bf16, report_to="none", dataloader_pin_memory=False)
    given = {"length_critic": LengthValueModel.from_pretrained(critic)} if name == "object" else {}
    trainer = LenVMGRPOTrainer(
        AutoModelForCausalLM.from_pretrained(policy), lambda completions, **_: [0.0] * len(completions), args,
        Dataset.from_dict({"prompt": ["1 + 7 ="] * 4}), processing_class=AutoTokenizer.from_pretrained(policy), **given)
    model = trainer.length_critic.model
    head = model.head if isinstance(model, ShardedCritic) else model.v_head
    with torch.no_grad():
        said = model(input_ids=ids).logits
    found[f"{name} bf16" if bf16 else name] = {
        "sharded": isinstance(model, ShardedCritic), "partitioned": is_partitioned(model),
        "policy partitioned": is_partitioned(trainer.model), "dtype": str(said.dtype),
        "head is whole": all(torch.equal(own, loaded) for own, loaded in
                             zip(head.parameters(), reference.v_head.parameters(), strict=True)),
        "difference": (said - logits).abs().max().item()}
with open(f"{folder}/found.json", "w") as file:
    json.dump(found, file)
"""


@pytest.fixture(scope="module")
def under_zero_3(tmp_path_factory, policy_folder, critic_folder):
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("placement")
    (folder / "script.py").write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    process = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    deepspeed = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    deepspeed["ACCELERATE_DEEPSPEED_ZERO3_INIT"] = "true"
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.getcwd(), **process, **deepspeed}
    command = [sys.executable, str(folder / "script.py"), policy_folder, critic_folder, str(folder)]
    done = subprocess.run(command, env=os.environ | own, cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(Path(folder / "found.json").read_text())


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "case, sharded, difference",
    [
        ("replica", False, 1e-6),
        ("replica bf16", False, 1e-6),  # whatever the engine of the policy computes in
        ("sharded", True, 1e-6),
        ("sharded bf16", True, 0.1),  # the decoder is in bfloat16, the head is not
        ("object", True, 1e-6),
    ],
)
def test_a_critic_says_the_same_wherever_it_lives(under_zero_3, case, sharded, difference):
    found = under_zero_3[case]
    assert found["policy partitioned"]
    assert found["sharded"] == found["partitioned"] == sharded
    assert found["head is whole"] and found["dtype"] == "torch.float32"
    assert found["difference"] <= difference
