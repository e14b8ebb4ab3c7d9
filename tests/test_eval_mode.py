import pytest
from torch import nn

from lenvm_rl.eval_mode import eval_mode


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_what_it_was_also_after_an_error(training):
    model = nn.Sequential(nn.Dropout()).train(training)
    with eval_mode(model):
        assert not model.training and not model[0].training
    assert model.training is training and model[0].training is training
    with pytest.raises(KeyError), eval_mode(model):
        raise KeyError
    assert model.training is training
