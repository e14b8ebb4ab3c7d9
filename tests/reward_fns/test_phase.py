from types import SimpleNamespace

import pytest

from reward_fns.phase import in_training


class Trainer:
    def __init__(self, model: object) -> None:
        self.model = model

    def log(self, name: str, value: float) -> None: ...


@pytest.mark.parametrize("training", [True, False])
def test_model_of_the_trainer_behind_the_hook_tells(training):
    assert in_training(Trainer(SimpleNamespace(training=training)).log) is training


@pytest.mark.parametrize("hook", [None, print, lambda name, value: None, Trainer(None).log, {}.__setitem__])
def test_without_a_trainer_it_is_training(hook):
    assert in_training(hook) is True
