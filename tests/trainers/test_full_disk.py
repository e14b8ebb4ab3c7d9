import errno
import resource
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import TrainerCallback

from lenvm_rl.trainers.checkpoint import INCOMPLETE_FOLDER, fault
from lenvm_rl.trainers.full_disk import says_what_to_do
from lenvm_rl.trainers.grpo import LenVMGRPOTrainer


class SmallDisk(TrainerCallback):
    """From a step on, no file can be longer than so many bytes."""

    def __init__(self, step, size):
        self.step, self.size = step, size

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, hard))


@pytest.fixture
def disk_as_before():
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# the weights have 97 kB and the state of the optimizer 195 kB; the model card comes first
@pytest.mark.parametrize("size", [20_000, 150_000], ids=["weights", "optimizer"])
def test_a_full_disk_ends_the_run_with_what_to_do_and_leaves_the_checkpoint_before(
    train, tmp_path, monkeypatch, disk_as_before, size
):
    class OnSmallDisk(LenVMGRPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(SmallDisk(2, size))

    with pytest.raises(OSError, match=r"checkpoint-2 could not be written .* GiB are free: .*Free space") as caught:
        train(OnSmallDisk, length_coef=0.0, max_steps=3, save_strategy="steps", save_steps=1)
    run = Path(tmp_path / "run")
    assert f"start with resume_from_checkpoint='{run / 'checkpoint-1'}'" in str(caught.value)
    assert fault(run / "checkpoint-1") is None
    assert not (run / "checkpoint-2").exists() and not list((run / INCOMPLETE_FOLDER).iterdir())


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:862] . PytorchStreamWriter failed writing file data/3"),
    ],
)
def test_every_way_to_say_that_the_disk_is_full_is_understood(tmp_path, error):
    with pytest.raises(OSError, match=r"free.*and start anew"), says_what_to_do(tmp_path / "a" / "b", tmp_path):
        raise error


@pytest.mark.parametrize("error", [RuntimeError("Connection closed by peer"), ValueError("state"), OSError(5, "I/O")])
def test_other_errors_pass_as_they_are(tmp_path, error):
    with pytest.raises(type(error)) as caught, says_what_to_do(tmp_path, tmp_path):
        raise error
    assert caught.value is error


def test_torch_still_says_it_so(tmp_path, disk_as_before):
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with pytest.raises(OSError, match="could not be written"), says_what_to_do(tmp_path / "x", tmp_path):
        torch.save(torch.zeros(10_000), tmp_path / "big.pt")
