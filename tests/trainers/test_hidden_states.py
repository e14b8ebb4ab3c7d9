"""The policy's hidden states, from forwards that are made anyway and from those that are not."""

import pytest
import torch
from torch.testing import assert_close

from lenvm_rl.trainers.grpo import LenVMGRPOTrainer

REUSED = {"num_iterations": 2, "steps_per_generation": 2, "gradient_accumulation_steps": 1, "max_steps": 2}
NAMES = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")


class Compared(LenVMGRPOTrainer):
    """Keeps, for each batch, the states as they were read and those of a forward of its own."""

    def _assign_credit(self, rollouts):
        batch, own = rollouts.batch, self.__dict__.setdefault("compared", [])
        cut = ~self._finished(batch)
        before = self.hidden_states.read_again
        found = self.hidden_states.of(batch, cut)
        again = self.hidden_states.read_again - before
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        present = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        with torch.no_grad():
            hidden = self.model.get_decoder()(input_ids=ids, attention_mask=present).last_hidden_state
        tokens = batch["completion_ids"].size(1)
        needed = torch.cat([batch["completion_mask"].bool(), torch.zeros(len(ids), 1, dtype=torch.bool)], 1)
        needed[cut, batch["completion_mask"].sum(1)[cut]] = True
        own.append((found, hidden[:, -tokens - 1 :], needed, cut, again))
        super()._assign_credit(rollouts)


@pytest.mark.parametrize(
    "options",
    [{}, REUSED, {"beta": 0.1}, {"steps_per_generation": 2, "per_device_train_batch_size": 4}],
    ids=["generation alone", "old log-probabilities", "a reference model", "chunks"],
)
def test_the_states_are_those_of_a_forward_of_its_own(train, options):
    trainer = train(Compared, length_critic="shared", **options)
    assert any(cut.any() for *_, cut, _ in trainer.compared)
    for found, expected, needed, cut, again in trainer.compared:
        assert_close(found[needed], expected[needed], atol=1e-5, rtol=1e-4)
        # only what was cut is read again, and nothing where TRL's own forward had all states
        assert again == (0 if "steps_per_generation" in options else cut.sum())


def test_refilled_groups_are_read_again(train):
    trainer = train(Compared, length_critic="shared", dynamic_sampling=True, max_resample_rounds=2, max_steps=4)
    for found, expected, needed, _, _ in trainer.compared:
        assert_close(found[needed], expected[needed], atol=1e-5, rtol=1e-4)


def test_rollouts_from_elsewhere_are_read_again(train, tokenizer):
    def rollout(prompts, trainer):
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        return {"prompt_ids": ids, "completion_ids": [[5, 6, 7 + row % 3] for row in range(len(ids))], "logprobs": None}

    trainer = train(Compared, length_critic="shared", rollout_func=rollout)
    for found, expected, needed, _, again in trainer.compared:
        assert_close(found[needed], expected[needed], atol=1e-5, rtol=1e-4)
        assert again == len(found)


def test_under_adapters_the_reference_model_is_not_taken_for_the_policy(train):
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)

    class Adapted(Compared):
        def _assign_credit(self, rollouts):
            self.model.get_decoder = self.model.get_base_model().get_decoder
            super()._assign_credit(rollouts)

    trainer = train(Adapted, length_critic="shared", peft_config=adapters, beta=0.1, max_steps=1)
    for found, expected, needed, cut, again in trainer.compared:
        assert_close(found[needed], expected[needed], atol=1e-5, rtol=1e-4)
        assert again == cut.sum()


def test_without_a_head_nobody_watches(train, critic_folder):
    trainer = train(length_critic=critic_folder)
    assert "hidden_states" not in vars(trainer)
