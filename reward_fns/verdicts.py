"""Correctness is judged once per batch, however many reward functions ask.

`[accuracy_reward, TruncationReward(...), HistoryAwareLengthReward(...)]` needs the same verdicts three times, and math
is expensive to verify. So a reward function that takes part keeps the verdicts of its last batches, and

1. gives them out again only for the very list of completions that it scored, with unchanged contents, and equal values
   of all else that it was called with: TRL hands one list to all reward functions of a batch and builds the next one
   anew, so a new batch is always scored, even one that repeats the texts of the last;
2. repeats what it logged, so that the trainer's own call logs the same whether it came first or last;
3. remembers `_BATCHES` batches and no more, and lets threads take turns.

Contents are compared through lists and dicts down to text and numbers. Anything else, an image or an environment,
counts as unchanged while it is the same object.
"""

import functools
import inspect
import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

Verdict = TypeVar("Verdict", float, float | None)
Verdicts = list[float | None]
LogExtra = Callable[[str, list], None]
LogMetric = Callable[[str, float], None]

_BATCHES = 4
_ATOMS = frozenset({str, bytes, int, float, bool, type(None)})


class _Batch(NamedTuple):
    completions: Sequence[object]
    inputs: object
    verdicts: list[Any]
    extras: list[tuple[str, list]]
    metrics: list[tuple[str, float]]


class BatchMemory:
    """The verdicts of the last few batches of one reward function; safe to use from any thread."""

    def __init__(self) -> None:
        self._reset()

    def recall(
        self,
        completions: Sequence[object],
        inputs: Mapping[str, object],
        score: Callable[[LogExtra, LogMetric], list[Verdict]],
        log_extra: LogExtra | None = None,
        log_metric: LogMetric | None = None,
    ) -> list[Verdict]:
        """The verdicts of the batch, computed if this is not one of the last batches.

        Args:
            completions: the list that the reward function was called with.
            inputs: all else that the verdicts depend on.
            score: computes the verdicts; gets hooks to log through.
            log_extra, log_metric: the caller's hooks, which get what was logged, now or when the batch was scored.
        """
        if self._process_id != os.getpid():
            self._reset()  # after a fork the lock may be held by a thread of the parent
        with self._lock:
            frozen = _frozen({"completions": completions, **inputs})
            batch = next((b for b in self._batches if b.completions is completions and b.inputs == frozen), None)
            if batch is None:
                extras: list[tuple[str, list]] = []
                metrics: list[tuple[str, float]] = []
                verdicts = score(
                    lambda column, values: extras.append((column, list(values))),
                    lambda name, value: metrics.append((name, value)),
                )
                batch = _Batch(completions, frozen, list(verdicts), extras, metrics)
                self._batches.append(batch)
        if log_extra is not None:
            for column, values in batch.extras:
                log_extra(column, list(values))
        if log_metric is not None:
            for name, value in batch.metrics:
                log_metric(name, value)
        return list(batch.verdicts)

    def _reset(self) -> None:
        self._process_id = os.getpid()
        # re-entrant: the reward function of a memory may ask for verdicts itself
        self._lock = threading.RLock()
        self._batches: deque[_Batch] = deque(maxlen=_BATCHES)


class SharedReward:
    """A reward function that scores a batch once, for the trainer and for all length rewards together.

    Made by `share`. Calls pass through, with whatever the trainer gives.
    """

    __name__: str

    def __init__(self, reward_func: Callable[..., Any]) -> None:
        self.reward_func = reward_func
        self.__name__ = function_name(reward_func)
        self._memory = BatchMemory()

    def __call__(
        self,
        completions: Sequence[object],
        log_extra: LogExtra | None = None,
        log_metric: LogMetric | None = None,
        **inputs: Any,
    ) -> Verdicts:
        """Rewards of a batch: those of the reward function."""

        def score(extra: LogExtra, metric: LogMetric) -> Verdicts:
            scored = self.reward_func(completions=completions, log_extra=extra, log_metric=metric, **inputs)
            if inspect.isawaitable(scored):
                scored.close() if inspect.iscoroutine(scored) else None
                raise ValueError(_ASYNC.format(name=self.__name__))
            return scored

        # the step of a schedule is part of the question, the rest of the trainer's state changes all the time
        state = inputs.get("trainer_state")
        asked = {**inputs, "trainer_state": getattr(state, "global_step", None)}
        return self._memory.recall(completions, asked, score, log_extra, log_metric)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Callable[..., Any]]]:
        return share, (self.reward_func,)

    def __repr__(self) -> str:
        return f"share({self.reward_func!r})"


_ASYNC = (
    "the correctness function '{name}' is asynchronous, but a length reward needs its verdicts before it can return: "
    "pass a synchronous function, which may run its own event loop with asyncio.run."
)
_SHARED: "weakref.WeakValueDictionary[int, SharedReward]" = weakref.WeakValueDictionary()
_SHARED_LOCK = threading.Lock()


def share(reward_func: Any) -> Any:
    """The reward function, scoring a batch once for all who ask: `share(f)` is the same object wherever it is written.

    Args:
        reward_func: any synchronous TRL reward function that is not a model. Those that share already (such as
            `accuracy_reward`) come back as they are.

    Returns:
        A reward function for `reward_funcs` and for the `correctness` of length rewards.

    Raises:
        ValueError: a reward model, an asynchronous function, or nothing that can be called.

    Length rewards do this to their `correctness`. To spare the trainer's own call as well, pass `share(f)` in
    `reward_funcs`.
    """
    if isinstance(getattr(reward_func, "_memory", None), BatchMemory):
        return reward_func
    if not callable(reward_func) or isinstance(reward_func, type) or hasattr(reward_func, "forward"):
        raise ValueError(
            f"correctness is {reward_func!r:.200}, but must be a reward function that says what is correct, such as "
            "accuracy_reward: reward models and their names are not supported here."
        )
    if _is_async(reward_func):
        raise ValueError(_ASYNC.format(name=function_name(reward_func)))
    with _SHARED_LOCK:
        shared = _SHARED.get(id(reward_func))
        if shared is None:
            shared = _SHARED[id(reward_func)] = SharedReward(reward_func)
        return shared


def verdicts_of(correctness: Any, completions: Sequence[object], inputs: Mapping[str, Any]) -> Verdicts:
    """The verdicts of a shared correctness function, None for what it cannot score.

    Args:
        correctness: made by `share`.
        completions: B completions.
        inputs: everything else that the trainer passed, without its logging hooks: the verdicts are asked for here a
            second time, and must not be logged twice.

    Raises:
        ValueError: not one verdict per completion, or an infinite one.
    """
    verdicts = correctness(completions=completions, **inputs)
    name = function_name(correctness)
    if len(verdicts) != len(completions):
        raise ValueError(
            f"the correctness function '{name}' returned {len(verdicts)} verdicts for {len(completions)} completions: "
            "it must return one per completion."
        )
    checked: Verdicts = []
    for row, verdict in enumerate(verdicts):
        value = math.nan if verdict is None else float(verdict)
        if math.isinf(value):
            raise ValueError(f"the correctness function '{name}' returned {value} for row {row}: it must be finite.")
        # TRL turns None into NaN, so either means "cannot be scored"
        checked.append(None if math.isnan(value) else value)
    return checked


def function_name(function: Any) -> str:
    """The name under which TRL logs a reward function."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _is_async(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


class _Same:
    """Equal to itself alone."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def _frozen(value: object) -> object:
    """A copy that later changes of lists and dicts do not reach."""
    if type(value) in _ATOMS:
        return value
    if isinstance(value, Mapping):
        return {key: _frozen(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        # token ids come by the million
        if set(map(type, value)) <= _ATOMS:
            return tuple(value)
        return tuple(map(_frozen, value))
    return _Same(value)
