"""Length guidance as a logits processor of vLLM's V1 engine.

NOT RUN END TO END: it is written against the interface `vllm.v1.sample.logits_processor.LogitsProcessor` of vLLM 0.22
to 0.31, and its mathematics is tested on batches made by hand, without an engine.

    llm = LLM(
        model,
        logits_processors=["lenvm_rl.decoding.vllm_processor:VLLMLengthProcessor"],
        additional_config={"length_guide": {"critic": "path/of/lenvm", "num_candidates": 5, "top_p": 0.95}},
        async_scheduling=False,
    )
    llm.generate(prompts, SamplingParams(max_tokens=128, extra_args={"length_tilt": -2.0, "length_at_most": 100}))

1. A request asks through `extra_args` (`vllm_xargs` of the server): `length_tilt`, `length_soft_target`,
   `length_target`, `length_at_most`, `length_at_least`; several of them combine as `&` does. One without them keeps its
   logits as they are.
2. vLLM truncates after this processor, and would cut the guided distribution a second time. The truncation of guided
   requests is therefore set once, in `additional_config`, and their own SamplingParams must be neutral: anything else
   is refused when the request arrives. temperature=0 is greedy decoding of the guided distribution.
3. The critic lives in the worker's process, on its device: leave it memory (gpu_memory_utilization). Each rank of
   tensor parallelism holds a copy and computes the same.
4. Left out: speculative decoding (vLLM refuses processors there), asynchronous scheduling, the V2 model runner.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from lenvm_rl.assets import model_path
from lenvm_rl.decoding.controls import AtLeast, AtMost, LengthControl, LengthTarget, LengthTilt, SoftTarget
from lenvm_rl.decoding.guide import scorer_and_ends
from lenvm_rl.decoding.steering import Request, Steering, truncation
from lenvm_rl.model import LengthValueModel

try:
    from vllm.v1.sample.logits_processor import LogitsProcessor as _Base
except ImportError:
    _Base = object

__all__ = ["VLLMLengthProcessor", "control_from_arguments"]

_CONTROLS: dict[str, type[LengthControl]] = {
    "length_tilt": LengthTilt,
    "length_soft_target": SoftTarget,
    "length_target": LengthTarget,
    "length_at_least": AtLeast,
    "length_at_most": AtMost,
}
_NEUTRAL: dict[str, tuple[float, ...]] = {
    "temperature": (1.0, 0.0),
    "top_p": (1.0,),
    "top_k": (0, -1),
    "min_p": (0.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "repetition_penalty": (1.0,),
}
_SETTINGS = {
    "critic",
    "gamma",
    "dtype",
    "end_token_ids",
    "num_candidates",
    "entropy_threshold",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
}


def control_from_arguments(arguments: Mapping[str, Any] | None) -> LengthControl | None:
    """The control that a request's extra arguments ask for; None if they ask for none.

    Args:
        arguments: `length_tilt`, `length_soft_target`, `length_target`, `length_at_least`, `length_at_most`; others are
            left to other processors.

    Raises:
        ValueError: an unknown `length_*` argument, a value outside its range, or a contradiction.
    """
    asked = {name: value for name, value in (arguments or {}).items() if name.startswith("length_")}
    unknown = asked.keys() - _CONTROLS.keys()
    if unknown:
        raise ValueError(f"unknown argument {sorted(unknown)[0]!r}: length guidance takes {', '.join(_CONTROLS)}.")
    controls = [_CONTROLS[name](value) for name, value in asked.items()]  # type: ignore[call-arg]
    return reduce(lambda one, other: one & other, controls) if controls else None


@dataclass
class _Followed:
    slot: int
    control: LengthControl
    output: list[int]
    """vLLM's own running list."""
    seen: int = field(default=0)


class VLLMLengthProcessor(_Base):
    """Guides the requests of a vLLM engine that ask for it.

    Args:
        vllm_config: its `additional_config["length_guide"]` holds `critic` (path or hub name) and, if they differ from
            the defaults, `gamma` and `dtype` of the critic, `end_token_ids`, and the settings of `LengthGuide`.
        device: where logits are.
        is_pin_memory: part of vLLM's interface; nothing here is copied between host and device often enough.

    Raises:
        ValueError: no critic, an unknown setting, or a critic with another tokenizer than the engine's.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        additional = vllm_config.additional_config
        settings = dict(additional.get("length_guide") or {}) if isinstance(additional, Mapping) else {}
        unknown = settings.keys() - _SETTINGS
        if "critic" not in settings or unknown:
            problem = f"unknown setting {sorted(unknown)[0]!r} in" if unknown else "no critic in"
            raise ValueError(
                f"{problem} additional_config['length_guide']: it takes {', '.join(sorted(_SETTINGS))}, and needs "
                "critic."
            )
        critic: Any = LengthValueModel.from_pretrained(
            model_path(settings["critic"]), gamma=settings.get("gamma"), dtype=settings.get("dtype", "auto")
        )
        tokenizer = AutoTokenizer.from_pretrained(vllm_config.model_config.tokenizer)
        self.scorer, ends = scorer_and_ends(critic.to(device), tokenizer, settings.get("end_token_ids"))
        self.steering = Steering(
            self.scorer,
            ends,
            num_candidates=settings.get("num_candidates", 5),
            entropy_threshold=settings.get("entropy_threshold"),
            warpers=truncation(
                settings.get("temperature", 1.0),
                settings.get("top_k"),
                settings.get("top_p", 1.0),
                settings.get("min_p", 0.0),
            ),
        )
        self._requests: dict[int, _Followed] = {}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse a guided request whose sampling would bend the guided distribution.

        Raises:
            ValueError: such sampling, or arguments that make no control.
        """
        if control_from_arguments(sampling_params.extra_args) is None:
            return
        for name, allowed in _NEUTRAL.items():
            value = getattr(sampling_params, name, None)
            if value is not None and value not in allowed:
                raise ValueError(
                    f"{name}={value} in a request with length guidance: vLLM would apply it after the guidance. Leave "
                    f"it at {allowed[0]}, and set temperature, top_k, top_p and min_p of guided requests in "
                    "additional_config['length_guide']."
                )

    def is_argmax_invariant(self) -> bool:
        """Guidance changes which token is the most probable one."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow what vLLM does to its batch: removed, added, moved, in this order."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._drop(index)
        for index, sampling_params, prompt, output in batch_update.added:
            self._drop(index)
            control = control_from_arguments(sampling_params.extra_args)
            if control is None:
                continue
            if prompt is None:
                raise ValueError("a guided request came as embeddings: a length critic reads the tokens of the prompt.")
            taken = {request.slot for request in self._requests.values()}
            slot = next(slot for slot in range(len(taken) + 1) if slot not in taken)
            self._requests[index] = _Followed(slot, control, output, len(output))
            self.scorer.open(slot, [*prompt, *_real(output)])
        for one, other, direction in batch_update.moved:
            moved, replaced = self._requests.pop(one, None), self._requests.pop(other, None)
            if moved is not None:
                self._requests[other] = moved
            if replaced is not None:
                if direction.name == "SWAP":
                    self._requests[one] = replaced
                else:
                    self.scorer.close(replaced.slot)

    @torch.no_grad()
    def apply(self, logits: Tensor) -> Tensor:
        """Guided logits in the rows of guided requests; the others are not touched."""
        if not self._requests:
            return logits
        rows = sorted(self._requests)
        requests = [self._requests[row] for row in rows]
        for request in requests:
            for token in _real(request.output[request.seen :]):
                self.scorer.append([request.slot], [token])
            request.seen = len(request.output)
        index = torch.tensor(rows, device=logits.device)
        logits[index] = self.steering(
            logits[index], [Request(request.slot, request.control, request.seen) for request in requests]
        ).to(logits.dtype)
        return logits

    def _drop(self, index: int) -> None:
        request = self._requests.pop(index, None)
        if request is not None:
            self.scorer.close(request.slot)


def _real(tokens: list[int]) -> list[int]:
    if any(token < 0 for token in tokens):
        raise ValueError(
            "vLLM has not yet said which tokens were sampled (it schedules asynchronously): length guidance needs "
            "them. Start the engine with async_scheduling=False."
        )
    return tokens
