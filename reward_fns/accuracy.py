r"""The accuracy reward: 1.0 for the right answer, 0.0 for any other and for none.

1. The answer is the last `\boxed{...}` after the reasoning, or the line after `####` (`answers.py`).
2. By default it must be in simplest form (`simplest_form.py`): a length objective makes the restated question,
   `\boxed{4+3}`, the shortest policy that computer algebra pays for.
3. Strings, words and numbers are compared here, in microseconds. Only what is left goes to math-verify, in processes
   that are killed when they take too long (`verify_pool.py`): no completion can hang the training.
4. A batch is judged once, for the trainer and for all length rewards together (`verdicts.py`).
"""

import math
import os
from collections.abc import Sequence

from reward_fns.answers import answer_of, check_gold, final_text
from reward_fns.completions import completion_text
from reward_fns.simplest_form import equality_verdict, simplest_form_verdict
from reward_fns.verdicts import BatchMemory, LogExtra, LogMetric
from reward_fns.verify_pool import Question, VerifierPool

_EXTRACTED_CHARACTERS = 2000  # of a text without a box; the regular expressions of math-verify grow with it
_MOST_WORKERS = 4  # by default; a worker takes 60 MB
_NO_COLUMNS = frozenset({"prompts", "completions", "completion_ids", "trainer_state", "environments"})


class AccuracyReward:
    r"""Reward function for `GRPOTrainer` and its like: whether the answer of each completion is the gold.

    Args:
        simplest_form: accept an answer in simplest form only: for a number a literal of the same value (`7`, `1,234`,
            `0.75`, `\frac{3}{4}` but not `4+3`, `14/2`, `\sqrt{49}`), for another gold an equivalent expression with at
            most twice its symbols. False gives math-verify's own judgement: on the box or the line after `####`, and
            in a text without either on whatever math-verify extracts from its last 2,000 characters.
        seconds_per_answer: wall-clock limit of one comparison; past it, the answer scores 0 and counts as a timeout.
        seconds_per_batch: wall-clock limit of the comparisons of one call, at least `seconds_per_answer`.
        workers: processes for comparisons, started when needed; None takes the usable CPUs, at most 4.

    Raises:
        ValueError: a parameter outside its range.

    `reward.__name__` names the metrics: set it to tell two instances in one trainer apart. Instances are picklable;
    the processes stay behind and are started anew where they are needed.
    """

    __name__: str

    def __init__(
        self,
        simplest_form: bool = True,
        seconds_per_answer: float = 3.0,
        seconds_per_batch: float = 60.0,
        workers: int | None = None,
    ) -> None:
        if not isinstance(simplest_form, bool):
            raise ValueError(f"simplest_form is {simplest_form!r}, but must be True or False.")
        for name, seconds in (("seconds_per_answer", seconds_per_answer), ("seconds_per_batch", seconds_per_batch)):
            if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
                raise ValueError(f"{name} is {seconds!r}, but must be a positive, finite number of seconds.")
        if seconds_per_batch < seconds_per_answer:
            raise ValueError(
                f"seconds_per_batch ({seconds_per_batch}) is shorter than seconds_per_answer ({seconds_per_answer}), "
                "which could never be reached: raise the one or lower the other."
            )
        if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
            raise ValueError(f"workers is {workers!r}, but must be a positive number of processes, or None.")
        self.simplest_form = simplest_form
        self.seconds_per_answer = float(seconds_per_answer)
        self.seconds_per_batch = float(seconds_per_batch)
        self.workers = workers
        self.__name__ = "accuracy_reward"
        self._memory = BatchMemory()
        self._pool = VerifierPool(workers or _usable_cpus(), self.seconds_per_answer, self.seconds_per_batch)

    def __call__(
        self,
        completions: Sequence[object],
        solution: Sequence[object] | None = None,
        answer: Sequence[object] | None = None,
        log_extra: LogExtra | None = None,
        log_metric: LogMetric | None = None,
        **columns: object,
    ) -> list[float]:
        r"""Rewards of a batch.

        Args:
            completions: B strings, or B lists of messages.
            solution: B golds, each a string: its last `\boxed{...}`, or the line after `####`, or all of it is the
                expected answer.
            answer: B golds, where the dataset has no column `solution`.
            log_extra: TRL's hook for columns of the completions table; gets the gold and the answer that were compared.
            log_metric: TRL's hook for metrics; gets, on every call, how many answers ran into a time limit
                (`accuracy_reward/timeouts`), how many brought two processes down (`accuracy_reward/crashes`), and the
                share of completions without an answer (`accuracy_reward/no_answer`).
            **columns: whatever else the trainer passes; unused.

        Returns:
            B floats, 1.0 or 0.0.

        Raises:
            ValueError: there are no golds, or not one per completion, or one that is no usable string.
            RuntimeError: an answer needs math-verify and its process cannot be started.
        """
        golds = _golds(len(completions), solution, answer, columns)
        asked = {"golds": golds, "settings": repr(self), "name": self.__name__}

        def score(extra: LogExtra, metric: LogMetric) -> list[float]:
            return self._score(completions, golds, extra, metric)

        return self._memory.recall(completions, asked, score, log_extra, log_metric)

    def close(self) -> None:
        """Stop the processes before the interpreter exits, which stops them anyway; a later call starts new ones."""
        self._pool.close()

    def _score(
        self, completions: Sequence[object], golds: list[str], log_extra: LogExtra, log_metric: LogMetric
    ) -> list[float]:
        texts = [completion_text(completion) for completion in completions]
        answers = [answer_of(text) for text in texts]
        rewards = [0.0] * len(completions)
        # completions of a group often agree, so a question may stand for several of them
        questions: dict[Question, list[int]] = {}
        for index, (gold, text, given) in enumerate(zip(golds, texts, answers, strict=True)):
            verdict, question = self._judge(gold, text, given)
            if question is not None:
                questions.setdefault(question, []).append(index)
            else:
                rewards[index] = float(verdict)
        timeouts = crashes = 0
        if questions:
            verdicts = self._pool.verify(list(questions))
            for indices, outcome in zip(questions.values(), verdicts, strict=True):
                timeouts += len(indices) * (outcome == "timeout")
                crashes += len(indices) * (outcome == "crash")
                for index in indices:
                    rewards[index] = float(outcome == "equal")
        log_extra(f"{self.__name__}/gold", golds)
        log_extra(f"{self.__name__}/answer", [given or "" for given in answers])
        log_metric(f"{self.__name__}/timeouts", float(timeouts))
        log_metric(f"{self.__name__}/crashes", float(crashes))
        log_metric(f"{self.__name__}/no_answer", answers.count(None) / len(answers) if answers else 0.0)
        return rewards

    def _judge(self, gold: str, text: str, given: str | None) -> tuple[bool, Question | None]:
        """The verdict, or the question that only computer algebra can answer."""
        if given is None:
            ending = final_text(text).strip()[-_EXTRACTED_CHARACTERS:]
            if self.simplest_form or not ending:
                return False, None
            return False, Question(gold, ending, extract=True)
        verdict = (simplest_form_verdict if self.simplest_form else equality_verdict)(gold, given)
        return bool(verdict), Question(gold, given) if verdict is None else None

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_pool", "_memory")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._memory = BatchMemory()
        self._pool = VerifierPool(self.workers or _usable_cpus(), self.seconds_per_answer, self.seconds_per_batch)

    def __repr__(self) -> str:
        return (
            f"AccuracyReward(simplest_form={self.simplest_form}, seconds_per_answer={self.seconds_per_answer}, "
            f"seconds_per_batch={self.seconds_per_batch}, workers={self.workers})"
        )


def _golds(
    count: int, solution: Sequence[object] | None, answer: Sequence[object] | None, columns: dict[str, object]
) -> list[str]:
    column, golds = ("solution", solution) if solution is not None else ("answer", answer)
    if golds is None:
        available = sorted(name for name in columns if name not in _NO_COLUMNS)
        raise ValueError(
            "accuracy_reward needs the golds in a dataset column 'solution' or 'answer', but the columns here are "
            f"{available}: rename the one that holds them, e.g. dataset.rename_column({(available or ['...'])[0]!r}, "
            "'solution')."
        )
    if isinstance(golds, str) or len(golds) != count:
        seen = "one string" if isinstance(golds, str) else f"{len(golds)} golds"
        raise ValueError(f"column {column!r} has {seen} for {count} completions: pass a list with one gold for each.")
    return [check_gold(gold, row, column) for row, gold in enumerate(golds)]


def _usable_cpus() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return min(_MOST_WORKERS, len(affinity(0)) if affinity else os.cpu_count() or 1)


accuracy_reward = AccuracyReward()
