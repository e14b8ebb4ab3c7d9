import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import wandb
from transformers import TrainerState, TrainingArguments

from lenvm_rl.trainers.wandb_offline import WandbOrOffline

SCRIPT = """
import sys
import wandb
from transformers import TrainerState, TrainingArguments
from lenvm_rl.trainers.wandb_offline import WandbOrOffline

wandb.setup(wandb.Settings(init_timeout=2))
callback = WandbOrOffline()
args = TrainingArguments(sys.argv[1], report_to="none", use_cpu=True)
callback.setup(args, TrainerState(is_world_process_zero=True), None)
wandb.log({"reward": 1.0})
print("mode", wandb.run.settings.mode)
"""


@pytest.mark.slow
def test_an_unreachable_wandb_is_logged_offline(tmp_path):
    unreachable = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40}
    environment = {**os.environ, **unreachable, "WANDB_DIR": str(tmp_path), "PYTHONPATH": os.getcwd()}
    environment.pop("WANDB_MODE", None)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "mode offline" in done.stdout
    assert "wandb cannot be reached" in done.stderr and "wandb sync" in done.stderr
    assert list(tmp_path.rglob("offline-run-*/*.wandb"))


def test_a_wandb_without_a_user_says_what_to_set(monkeypatch, tmp_path):
    def init(**_):
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", init)
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match=r"Use `wandb login` to log in. Or set WANDB_MODE=offline"):
        WandbOrOffline().setup(args, TrainerState(is_world_process_zero=True), SimpleNamespace(config=None))
