import subprocess
import sys

import lenvm_rl

HEAVY = ("trl", "deepspeed", "wandb", "triton", "vllm", "matplotlib", "torch")


def test_importing_the_package_imports_nothing_heavy():
    code = f"import sys, lenvm_rl, reward_fns; print([name for name in {HEAVY!r} if name in sys.modules])"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert seen.strip() == "[]"


def test_every_public_name_is_found_where_it_lives():
    assert set(lenvm_rl.__all__) == set(lenvm_rl._HOME)
    for name in lenvm_rl.__all__:
        assert getattr(lenvm_rl, name).__name__ == name
