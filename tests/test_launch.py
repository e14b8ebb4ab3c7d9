import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from trl import TrlParser

from lenvm_rl.launch import check_model, distributed_summary, one_process, parse, run


@dataclass
class Arguments:
    """The machine's three defaults, and settings of every kind."""

    use_cpu: bool = False
    bf16: bool | None = None
    dataloader_pin_memory: bool = True
    steps: int = 1
    rate: float = 0.1
    name: str = "field"


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("LENVM_TRACEBACK", "RANK", "WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def command_line(monkeypatch, tmp_path):
    """Parses these flags over a default config that sets steps to 10 and name to "default"."""
    default = tmp_path / "default.yaml"
    default.write_text("steps: 10\nname: default\n")

    def parse_flags(*flags):
        monkeypatch.setattr(sys, "argv", ["recipe.py", *map(str, flags)])
        return parse(TrlParser(Arguments), default)[0]

    return parse_flags


@pytest.fixture
def without_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)


@pytest.fixture
def config(tmp_path):
    """Writes a config file."""

    def write(text):
        (tmp_path / "own.yaml").write_text(text)
        return tmp_path / "own.yaml"

    return write


def test_without_arguments_the_default_config_rules_over_the_fields(command_line):
    arguments = command_line()
    assert (arguments.steps, arguments.name, arguments.rate) == (10, "default", 0.1)


def test_a_config_takes_the_place_of_the_default_one(command_line, config):
    arguments = command_line("--config", config("steps: 20\nrate: 1e-3\n"))
    assert (arguments.steps, arguments.name, arguments.rate) == (20, "field", 0.001)


def test_a_config_may_be_given_with_an_equals_sign(command_line, config):
    assert command_line(f"--config={config('steps: 20')}").steps == 20


def test_a_flag_wins_over_every_file(command_line, config):
    assert command_line("--steps", 3).steps == 3
    assert command_line("--steps", 3).name == "default"
    assert command_line("--steps", 3, "--config", config("steps: 20")).steps == 3
    assert command_line("--config", config("steps: 20"), "--steps=3").steps == 3


def test_files_and_flags_win_over_what_the_machine_suggests(command_line, config, without_accelerator):
    arguments = command_line()
    assert (arguments.use_cpu, arguments.bf16, arguments.dataloader_pin_memory) == (True, False, False)
    arguments = command_line("--config", config("bf16: true\ndataloader_pin_memory: true\n"))
    assert (arguments.use_cpu, arguments.bf16, arguments.dataloader_pin_memory) == (True, True, True)
    assert command_line("--bf16", "true").bf16
    assert not command_line("--config", config("bf16: true"), "--bf16", "false").bf16


def test_a_machine_with_an_accelerator_keeps_the_fields(command_line, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    arguments = command_line()
    assert (arguments.use_cpu, arguments.bf16, arguments.dataloader_pin_memory) == (False, None, True)


def test_under_deepspeed_a_cpu_needs_no_compiler(command_line, monkeypatch, without_accelerator):
    deepspeed = SimpleNamespace(ops=SimpleNamespace(__compatible_ops__={"deepspeed_shm_comm": True}))
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    command_line()
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"]  # plain runs do not ask for it
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    command_line()
    assert not deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"]


@pytest.mark.parametrize(
    "text, flags, message",
    [
        ("stesp: 3", [], "Unknown arguments from config file: ['--stesp', '3']"),
        ("steps: 3", ["--stesp", "3"], "Some specified arguments are not used by the HfArgumentParser"),
        ("steps: [3", [], "own.yaml is no valid YAML: while parsing a flow sequence"),
        ("- steps", [], "own.yaml must contain a YAML mapping"),
        (None, [], "No such file or directory: "),
        ("steps: 3", ["--config"], "--config needs the path of a YAML file."),
    ],
)
def test_what_a_user_gets_wrong_ends_in_one_line_and_exit_code_2(command_line, config, capsys, text, flags, message):
    path = config(text) if text is not None else "nowhere.yaml"
    with pytest.raises(SystemExit) as caught:
        run(lambda: command_line(*flags) if flags == ["--config"] else command_line("--config", path, *flags))
    assert caught.value.code == 2
    written = capsys.readouterr().err
    assert written.startswith("error: ") and message in written
    assert written.count("\n") == 1 and "Traceback" not in written


def failing(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize("error", [ValueError("a\n  b"), OSError("a b"), ImportError("a b")])
def test_an_error_of_several_lines_is_told_in_one(capsys, error):
    with pytest.raises(SystemExit) as caught:
        run(failing(error))
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: a b\n"


def test_every_process_tells_its_error_and_which_one_it_is(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit):
        run(failing(ValueError("reward inf")))
    assert capsys.readouterr().err == "error on process 3: reward inf\n"


def test_an_error_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run(failing(ZeroDivisionError()))


def test_ctrl_c_ends_with_130(capsys):
    with pytest.raises(SystemExit) as caught:
        run(failing(KeyboardInterrupt()))
    assert caught.value.code == 130
    assert capsys.readouterr().err == ""


def test_a_recipe_that_succeeds_returns():
    ran = []
    run(lambda: ran.append(True))
    assert ran == [True]


def test_a_recipe_leaves_without_open_connections(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    run(lambda: None)
    assert not torch.distributed.is_initialized()


def test_a_shell_sees_one_line_and_exit_code_2():
    script = "from lenvm_rl.launch import run\ndef main(): raise ValueError('no such task')\nrun(main)\n"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.endswith("error: no such task\n") and "Traceback" not in result.stderr


def test_the_traceback_of_a_one_line_error_can_be_asked_for(monkeypatch, capsys):
    monkeypatch.setenv("LENVM_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no such task"):
        run(failing(ValueError("no such task")))
    monkeypatch.setenv("LENVM_TRACEBACK", "0")
    with pytest.raises(SystemExit):
        run(failing(ValueError("no such task")))
    assert capsys.readouterr().err == "error: no such task\n"


def test_one_process_refuses_more(monkeypatch):
    one_process("the recipe samples")
    monkeypatch.setenv("WORLD_SIZE", "1")
    one_process("the recipe samples")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="the recipe samples in one process on one device, but 4 processes were"):
        one_process("the recipe samples")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"2 GPUs are visible: start it with CUDA_VISIBLE_DEVICES=0"):
        one_process("the recipe samples")


def test_the_folder_of_a_saved_model_and_a_hub_name_pass(policy_folder, monkeypatch):
    assert check_model(policy_folder, "lenvm") == policy_folder
    assert check_model("Qwen/Qwen2.5-0.5B", "lenvm") == "Qwen/Qwen2.5-0.5B"
    monkeypatch.setenv("HOME", str(Path(policy_folder).parent))
    assert check_model(f"~/{Path(policy_folder).name}", "lenvm") == policy_folder
    monkeypatch.chdir(Path(policy_folder).parent)
    assert check_model(Path(policy_folder).name, "lenvm") == Path(policy_folder).name


@pytest.mark.parametrize("name", ["/no/such/folder", "./folder", "~/folder", "folder", "outputs/run/folder"])
def test_what_can_only_be_a_folder_must_be_one(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"length_critic: there is no folder '{name}'. Give a folder"):
        check_model(name, "length_critic")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"lenvm: the folder '.*' holds no config.json, so no model was saved there"):
        check_model(str(tmp_path), "lenvm")


def test_the_summary_says_what_a_run_ran_on():
    assert distributed_summary(Accelerator()) == {"type": "NO", "num_processes": 1, "zero_stage": None}
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=2))
    sharded = SimpleNamespace(state=state, distributed_type=SimpleNamespace(value="DEEPSPEED"), num_processes=8)
    assert distributed_summary(sharded) == {"type": "DEEPSPEED", "num_processes": 8, "zero_stage": 2}
