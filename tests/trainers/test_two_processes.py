"""What is decided over all processes, on two of them with gloo."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from lenvm_rl.trainers.normalization import group_centred_token_std

SCRIPT = r"""
import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from lenvm_rl.trainers.drpo import DRPOConfig, DRPOTrainer
from lenvm_rl.trainers.grpo import LenVMGRPOConfig, LenVMGRPOTrainer
from reward_fns import HistoryAwareLengthReward

policy, critic, folder = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left")
# numbers of one and of two words, so that the prompts of a round differ in width between processes
data = Dataset.from_dict({"prompt": [f"{i} + 7 =" if i < 6 else f"{i} + 7 - 2 + 1 =" for i in range(12)],
                          "number": list(range(12))})
OPTIONS = dict(per_device_train_batch_size=8, num_generations=4, max_completion_length=12, learning_rate=1e-3,
               logging_steps=1, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
               disable_tqdm=True, dataloader_pin_memory=False, ddp_find_unused_parameters=False)


def two_thirds_are_hopeless(completions, number, **_):
    # of one process's prompts more than of the other's
    return [float(n % 3 == 0 and place % 2) for place, n in enumerate(number)]


class Keeping(LenVMGRPOTrainer):
    def _rolled_out(self, inputs):
        result = super()._rolled_out(inputs)
        self.__dict__.setdefault("generated", []).append(len(inputs))
        return result

    def _refilled(self, first, prompts):
        result = super()._refilled(first, prompts)
        self.__dict__.setdefault("kept", []).append((result.rewards.clone(), result.kept.clone()))
        return result

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        self.__dict__.setdefault("batches", []).append({name: value.clone() for name, value in batch.items()})
        return batch


def run(name, resume=None, max_steps=6):
    judge = two_thirds_are_hopeless
    hapo = HistoryAwareLengthReward(correctness=judge)
    args = LenVMGRPOConfig(
        f"{folder}/{name}", length_critic=critic, dynamic_sampling=True, max_resample_rounds=2, max_steps=max_steps,
        advantage_normalization="group_centred_token_std", length_coef=0.0,
        save_strategy="steps", save_steps=4, **OPTIONS)
    model = AutoModelForCausalLM.from_pretrained(policy)
    trainer = Keeping(model, [judge, hapo], args, data, processing_class=tokenizer)
    assert trainer.accelerator.num_processes == 2
    trainer.train(resume_from_checkpoint=resume)
    return trainer, hapo


whole, history = run("whole")  # three steps are an epoch
resumed, again = run("resumed", f"{folder}/whole/checkpoint-4")

drpo = DRPOTrainer(AutoModelForCausalLM.from_pretrained(policy), two_thirds_are_hopeless,
                   DRPOConfig(f"{folder}/drpo", max_steps=4, num_iterations=2, save_strategy="no", **OPTIONS),
                   data, processing_class=tokenizer)
drpo.train()

shared = LenVMGRPOTrainer(AutoModelForCausalLM.from_pretrained(policy), two_thirds_are_hopeless,
                          LenVMGRPOConfig(f"{folder}/shared", length_critic="shared", max_steps=4, save_strategy="no",
                                          length_critic_trust=0.0, **OPTIONS),
                          data, processing_class=tokenizer)
shared.train()


def run_controlled(name, resume=None):
    # a critic that is refreshed, and a coefficient that keeps accuracy, for a length of each prompt's own
    args = LenVMGRPOConfig(
        f"{folder}/{name}", length_critic=critic, length_critic_update="refresh", length_critic_refresh_below=1.0,
        length_critic_refresh_window=2, length_critic_trust=0.0, length_controller="accuracy",
        length_controller_warmup=2, length_target_column="wanted", length_gate="all",
        max_steps=6, save_strategy="steps", save_steps=3, **OPTIONS)
    prompts = data.map(lambda row: {"wanted": 3 + row["number"] % 5})
    trainer = LenVMGRPOTrainer(AutoModelForCausalLM.from_pretrained(policy), two_thirds_are_hopeless, args, prompts,
                               processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


controlled = run_controlled("controlled")
controlled_again = run_controlled("controlled_again", f"{folder}/controlled/checkpoint-3")


def weights(trainer):
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: weight.detach() for name, weight in model.named_parameters()}


torch.save(
    {
        "generated": whole.generated, "kept": whole.kept, "batches": whole.batches, "whole": weights(whole),
        "resumed": weights(resumed), "drpo": weights(drpo), "logs": whole.state.log_history,
        "positions": [whole.refill_prompts.position, resumed.refill_prompts.position],
        "histories": [history.state_dict(), again.state_dict()],
        "drpo_logs": drpo.state.log_history,
        "shared": weights(shared), "head": dict(shared.length_critic.side.model.state_dict()),
        "read_again": shared.hidden_states.read_again,
        "controlled": [weights(trainer) for trainer in (controlled, controlled_again)],
        "refreshed": [trainer.length_critic.side.model.state_dict() for trainer in (controlled, controlled_again)],
        "coefficients": [trainer.length_controller.state_dict() for trainer in (controlled, controlled_again)],
    },
    f"{folder}/rank{whole.accelerator.process_index}.pt",
)
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, policy_folder, critic_folder):
    folder = tmp_path_factory.mktemp("two_processes")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(script), policy_folder, critic_folder, str(folder)]
    shared = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), "HF_HUB_OFFLINE": "1", "WORLD_SIZE": "2"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []
    try:
        for rank in ("0", "1"):
            with (folder / f"log{rank}").open("w") as log:
                environment = os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank}
                processes.append(subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log))
        codes = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], (folder / "log0").read_text()[-3000:] + (folder / "log1").read_text()[-3000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def assert_equal_weights(first, second):
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name


def test_both_generate_equally_much_and_stay_the_same_model(ranks):
    assert ranks[0]["generated"] == ranks[1]["generated"] and len(ranks[0]["generated"]) > 6
    assert_equal_weights(ranks[0]["whole"], ranks[1]["whole"])
    assert ranks[0]["positions"][0] == ranks[1]["positions"][0] > 0


def test_both_hold_the_same_rewards_of_the_merged_batch(ranks):
    for (rewards, kept), (same, also) in zip(ranks[0]["kept"], ranks[1]["kept"], strict=True):
        assert_close(rewards, same, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(kept, also) and len(kept) == 16
    assert any(not kept.all() for _, kept in ranks[0]["kept"])  # rounds were used up, too


def test_advantages_are_those_of_the_whole_batch(ranks):
    batches = zip(*(rank["batches"] for rank in ranks), ranks[0]["kept"], strict=True)
    for first, second, (rewards, _) in batches:
        tokens = torch.cat([batch["completion_mask"].sum(1) for batch in (first, second)])
        total = rewards.nansum(1).masked_fill(rewards.isnan().all(1), float("nan"))
        expected = group_centred_token_std(total, 4, tokens)
        advantages = torch.cat([first["advantages"], second["advantages"]])
        assert_close(advantages, expected, atol=1e-6, rtol=1e-6)
        assert first["num_items_in_batch"] == second["num_items_in_batch"] == tokens.sum()
        for batch in (first, second):
            assert batch["prompt_mask"][:, -1].all() and batch["completion_mask"][:, 0].all()
            assert (batch["prompt_ids"][batch["prompt_mask"] == 0] == 0).all()


def test_counts_are_of_all_processes(ranks):
    logs = [entry for entry in ranks[0]["logs"] if "sampling/rounds" in entry]
    assert len(logs) == 6
    for entry, (_, kept) in zip(logs, ranks[0]["kept"], strict=True):
        assert entry["sampling/kept_groups"] == kept.sum() / 4
        assert entry["sampling/kept_groups"] + entry["sampling/unfilled_groups"] == 4


def test_a_run_resumed_in_its_second_epoch_is_the_run_that_was_not_interrupted(ranks):
    for rank in ranks:
        assert_equal_weights(rank["whole"], rank["resumed"])
        assert rank["positions"][0] == rank["positions"][1]
        assert rank["histories"][0] == rank["histories"][1] == ranks[0]["histories"][0]


def test_drpo_stays_the_same_model_on_both(ranks):
    assert_equal_weights(ranks[0]["drpo"], ranks[1]["drpo"])
    kl = [entry["drpo/kl"] for entry in ranks[0]["drpo_logs"] if "drpo/kl" in entry]
    assert len(kl) == 4 and kl[0] == 0 and kl[1] > 0


def test_a_head_on_the_policy_is_the_same_on_both_whatever_each_must_read_again(ranks):
    assert_equal_weights(ranks[0]["shared"], ranks[1]["shared"])
    assert_equal_weights(ranks[0]["head"], ranks[1]["head"])
    assert any(weight.abs().sum() > 0 for name, weight in ranks[0]["head"].items() if "summary" in name)  # it learned
    assert ranks[0]["read_again"] != ranks[1]["read_again"]


def test_a_refreshed_critic_and_a_controlled_coefficient_are_the_same_on_both_and_go_on_exactly(ranks):
    for rank in ranks:
        for found in ("controlled", "refreshed"):
            whole, resumed = rank[found]
            assert_equal_weights(whole, resumed)
            assert_equal_weights(whole, ranks[0][found][0])
        assert rank["coefficients"][0] == rank["coefficients"][1] == ranks[0]["coefficients"][0]
    assert ranks[0]["coefficients"][0]["batches"] == 6 and ranks[0]["coefficients"][0]["coef"] != 1.0
