"""How a Length Value Model is fitted: transformers' TrainingArguments, and what is our own."""

from dataclasses import dataclass

from transformers import TrainingArguments

LOSSES = ("mse", "bce")
PARAMETERIZATIONS = ("value", "length", "log_length")
CENSORING = ("bootstrap", "bound", "drop", "official")


@dataclass
class LengthValueTrainingArguments(TrainingArguments):
    """Arguments of `LengthValueTrainer`. A batch size counts rollouts, whether they are packed or not.

    Raises:
        ValueError: a setting that does not exist, or two that contradict each other.
    """

    loss: str = "mse"
    """"mse" on the value (LenVM eq. 9), or "bce" of the logit against 1 - gamma^l."""

    td_lambda: float = 1.0
    """Lambda of the targets. 1 is the length itself; below it, targets lean on the model's own values further on, which
    trades noise for bias."""

    parameterization: str = "value"
    """What the error is measured on: "value"; or, for the paper's ablation, the remaining "length" in units of
    1 / -log(gamma) tokens, or "log_length", log(1 + l). The head stays what it is: z stands for the length
    softplus(z) / -log(gamma) and for the value -sigmoid(z), so all three are compared, saved and used alike."""

    censoring: str = "bootstrap"
    """What a cut completion teaches. "bootstrap": the model itself values the tail that was not seen. "bound": it was
    at least so long, and only shorter predictions are errors. "drop": nothing. "official": it ended there, as in the
    released code, which is wrong."""

    packing: bool = True
    """Put several rollouts into one row, each with positions of its own and blind to the others. The batch and its
    gradient stay the same, without the padding. Where the backbone cannot, the micro-batches of an optimizer step are
    made of similar lengths instead."""

    lora_rank: int = 0
    """Rank of LoRA adapters on the backbone; 0 trains all of it. The head is always trained in full. `save_model`
    merges the adapters; a checkpoint keeps them apart, to resume from."""

    lora_alpha: int | None = None
    """Adapters are scaled by alpha / rank; by default alpha is twice the rank."""

    lora_dropout: float = 0.0

    lora_target_modules: list[str] | None = None
    """Names of the layers that get adapters; by default all linear layers of the backbone."""

    frozen_backbone: bool = False
    """Train the head alone, on hidden states that stay what they are: a critic at no cost beside its policy."""

    def __post_init__(self) -> None:
        _choose("loss", self.loss, LOSSES)
        _choose("parameterization", self.parameterization, PARAMETERIZATIONS)
        _choose("censoring", self.censoring, CENSORING)
        if not 0 <= self.td_lambda <= 1:
            raise ValueError(f"td_lambda is {self.td_lambda}: it must lie in [0, 1].")
        if self.loss == "bce" and self.parameterization != "value":
            raise ValueError(
                f"loss 'bce' compares the logit with 1 - gamma^l, so it has no {self.parameterization!r} form: leave "
                "parameterization at 'value', or take loss 'mse'."
            )
        if self.td_lambda < 1 and self.censoring in ("bound", "official"):
            raise ValueError(
                f"td_lambda {self.td_lambda} values what follows a state by the model, but censoring "
                f"{self.censoring!r} does not: take 'bootstrap' or 'drop', or td_lambda 1."
            )
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank must be a positive rank, or 0 for no adapters, got {self.lora_rank}.")
        if self.lora_rank and self.frozen_backbone:
            raise ValueError("frozen_backbone leaves nothing for LoRA to adapt: set lora_rank 0.")
        # what the trainer's seams rest on
        self.remove_unused_columns = False
        self.label_names = ["labels"]
        self.batch_eval_metrics = True  # metrics are summed batch by batch: no (rollouts, tokens) array is kept
        self.average_tokens_across_devices = True  # a token mean over all processes, not a mean of their means
        super().__post_init__()


def _choose(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} {value!r} does not exist: take {', '.join(map(repr, choices))}.")
