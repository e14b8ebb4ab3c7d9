"""Whether a reward function is called for training or for evaluation.

TRL 1.16 does not say: the same arguments come in both. But the hook `log_metric` that it passes is a method of the
trainer, whose model is in training mode or not, and that is how TRL itself tells the two apart.
"""


def in_training(log_metric: object) -> bool:
    """False if the trainer behind TRL's hook evaluates; True if it trains, and where there is no trainer.

    Args:
        log_metric: the hook, or None in a call by hand.
    """
    model = getattr(getattr(log_metric, "__self__", None), "model", None)
    training = getattr(model, "training", True)
    return training if isinstance(training, bool) else True
