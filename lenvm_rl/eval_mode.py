"""A model in evaluation mode for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside, no dropout; afterwards the model is in the mode it was in, also after an error."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
