"""Logging to wandb that does not end a run which nothing else is wrong with."""

import os
import warnings
from typing import Any

from transformers import TrainerState, TrainingArguments
from transformers.integrations import WandbCallback


class WandbOrOffline(WandbCallback):
    """As transformers' callback; where wandb cannot be reached, the run is logged to a local folder.

    Raises:
        ValueError: wandb is reached, but knows no user.

    A connection that is lost later is wandb's own matter: it keeps what it could not send, and training goes on.
    """

    def setup(self, args: TrainingArguments, state: TrainerState, model: Any, **kwargs: Any) -> None:
        from wandb.errors import CommError, UsageError

        try:
            super().setup(args, state, model, **kwargs)
        except CommError as error:
            warnings.warn(
                f"wandb cannot be reached ({str(error).partition(chr(10))[0]}): this run is logged to the folder wandb "
                "here, and `wandb sync` uploads it later.",
                stacklevel=2,
            )
            # not WANDB_MODE, which wandb read before (0.31)
            self._wandb.init(mode="offline", project=os.getenv("WANDB_PROJECT", "huggingface"), name=args.run_name)
            super().setup(args, state, model, **kwargs)
        except UsageError as error:
            raise ValueError(f"report_to names wandb, which says: {error} Or set WANDB_MODE=offline.") from error
