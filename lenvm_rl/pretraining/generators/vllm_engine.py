"""Rollouts from a vLLM engine in this process.

Not run: no machine of ours had vLLM. The tests replace the module by a double that checks names and arguments, after
the API of vLLM 0.22 as TRL 1.16 calls it. Sample first (``--sample_only``) and train in a second process: an engine
gives its GPU memory back only when its process ends.
"""

from collections.abc import Callable, Sequence
from typing import Any

from lenvm_rl.sampling import Completion, SamplingSettings

from .interface import Skipped, row_seed


class VLLMGenerator:
    """Samples with ``vllm.LLM``, loaded when the first completion is asked for.

    Args:
        model: folder or hub name.
        completions_per_shard: prompts of one ``LLM.generate`` call: many more than run at once, or the engine idles
            while the last ones finish.
        name: how the policy is called; ``model`` by default.
        engine_options: passed to ``vllm.LLM``, such as ``tensor_parallel_size`` or ``gpu_memory_utilization``.

    Each completion has a seed of its own, so that a run that was killed goes on with the same draws. vLLM repeats a
    draw only as far as its kernels do: another batch composition may round differently.
    """

    backend = "vllm"

    def __init__(
        self, model: str, *, completions_per_shard: int = 4096, name: str | None = None, **engine_options: Any
    ) -> None:
        self.model, self.name, self.engine_options = model, name or model, engine_options
        self.completions_per_shard = completions_per_shard
        self._engine: Any = None

    def __call__(
        self,
        prompt_ids: Sequence[list[int]],
        settings: SamplingSettings,
        seed: int,
        on_batch: Callable[[int, int], None] = lambda completions, tokens: None,
    ) -> list[Completion | Skipped]:
        """See `Generator`.

        Raises:
            ImportError: vLLM is not installed.
        """
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise ImportError(
                f"The vllm backend needs vLLM, which cannot be imported here ({error}): pip install 'lenvm-rl[vllm]', "
                "or take --backend transformers, or --backend server with a running server."
            ) from error
        if self._engine is None:
            self._engine = LLM(model=self.model, **self.engine_options)
        parameters = [
            SamplingParams(
                n=1,
                max_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                # explicit: the model's own generation_config would bend the distribution unseen
                top_k=0,
                min_p=0.0,
                repetition_penalty=1.0,
                seed=row_seed(seed, row),
                detokenize=False,
            )
            for row in range(len(prompt_ids))
        ]
        prompts = [{"prompt_token_ids": ids} for ids in prompt_ids]
        outputs = self._engine.generate(prompts, sampling_params=parameters, use_tqdm=False)
        completions = [_completion(output.outputs[0]) for output in outputs]
        on_batch(len(completions), sum(len(row.ids) for row in completions if isinstance(row, Completion)))
        return completions

    def notes(self) -> list[str]:
        return []


def _completion(output: Any) -> Completion | Skipped:
    ids = list(output.token_ids)  # the end token included
    if output.finish_reason not in ("stop", "length"):
        return Skipped(f"finish_reason {output.finish_reason!r}")
    return Completion(ids, output.finish_reason == "stop") if ids else Skipped("no tokens")
