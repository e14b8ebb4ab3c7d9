import lenvm_rl.progress as progress
from lenvm_rl.progress import progress_bar


def test_without_a_terminal_lines_say_how_far_it_is(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with progress_bar("rollouts", total=1_200, done=200) as advance:
        advance(500, 7_000)
        advance(0, 0)
    lines = [line for line in capsys.readouterr().err.splitlines() if " left" in line]
    assert len(lines) == 2 and lines[0].startswith("rollouts: 700 of 1,200, ") and "tokens/s" in lines[0]


def test_lines_are_rare_and_other_processes_say_nothing(capsys, monkeypatch):
    with progress_bar("rollouts", total=10) as advance:
        advance(1, 1)
    assert " left" not in capsys.readouterr().err
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with progress_bar("rollouts", total=10, visible=False) as advance:
        advance(1, 1)
    assert not capsys.readouterr().err
