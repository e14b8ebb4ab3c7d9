import subprocess
import sys

from reward_fns.processes import gather_rows


def test_one_process_has_its_own_rows():
    assert gather_rows(["a", "b"]) == (["a", "b"], slice(0, 2))
    assert gather_rows([]) == ([], slice(0, 0))


def test_nothing_is_imported_to_find_that_out():
    code = "import sys; from reward_fns.processes import gather_rows; gather_rows([1]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_world_of_one_is_one_process(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert gather_rows([1, 2]) == ([1, 2], slice(0, 2))
    finally:
        dist.destroy_process_group()
