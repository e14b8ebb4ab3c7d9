"""The embedded task: chain arithmetic with visible, verbose reasoning.

1. A problem is a chain such as ``12 + 7 - 5 =`` of one to five additions and subtractions whose partial results stay
   within 0..99. One-step chains can be answered at once; long ones need their steps written out.
2. A solution is what a verbose reasoner writes: step after step, one in five with a slip, some checked once or twice,
   with thinking aloud in between; at times it goes through the whole chain once more before ``\\boxed{14}``. A check
   that finds a slip repairs it, a slip nobody checks spoils the answer. So checks pay, and yet most of what is written
   is redundant. Some solutions answer at once, which works for short chains only.
3. The vocabulary is one token per number and word, so that a token is a unit of reasoning and traces stay short.

A supervised model that imitates these solutions is verbose and fallible: there are tokens to save and accuracy to lose.
"""

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

MIN_STEPS, MAX_STEPS = 1, 5
LARGEST_NUMBER = 99
LARGEST_OPERAND = 9
HELD_OUT_SHARE = 10
"""One problem in this many is held out for evaluation, chosen by a checksum of its text."""

FILLERS = ("hmm", "so", "okay", "let me see", "now", "well")
_PUNCTUATION = ("+", "-", "=", ".", "\\boxed{", "}")
_WORDS = (
    "check",
    "wait",
    "hmm",
    "so",
    "okay",
    "let",
    "me",
    "see",
    "now",
    "well",
    "verify",
    "again",
    "the",
    "answer",
    "is",
)


@dataclass(frozen=True)
class Problem:
    """A chain of additions and subtractions: ``start`` followed by ``(operator, operand)`` steps."""

    start: int
    steps: tuple[tuple[str, int], ...]

    @cached_property
    def partial_results(self) -> tuple[int, ...]:
        """The running result before the first step and after each one: ``len(steps) + 1`` numbers."""
        results = [self.start]
        for operator, operand in self.steps:
            results.append(results[-1] + operand if operator == "+" else results[-1] - operand)
        return tuple(results)

    @property
    def prompt(self) -> str:
        return f"{expression(self.start, self.steps)} ="

    @property
    def solution(self) -> str:
        return str(self.partial_results[-1])

    @property
    def held_out(self) -> bool:
        """Whether the problem belongs to the evaluation set; a property of its text, so the sets never overlap."""
        return zlib.crc32(self.prompt.encode()) % HELD_OUT_SHARE == 0


def expression(start: int, steps: tuple[tuple[str, int], ...]) -> str:
    return " ".join([str(start), *(f"{operator} {operand}" for operator, operand in steps)])


def sample_problem(rng: random.Random) -> Problem:
    """A random chain whose partial results stay within 0..99.

    Its operands differ, so that a step says where in the chain it stands.
    """
    start = result = rng.randint(0, LARGEST_NUMBER)
    steps = []
    for operand in rng.sample(range(1, LARGEST_OPERAND + 1), rng.randint(MIN_STEPS, MAX_STEPS)):
        operator = rng.choice("+-")
        if operator == "-" and result < operand:
            operator = "+"
        if operator == "+" and result + operand > LARGEST_NUMBER:
            operator = "-"
        result += operand if operator == "+" else -operand
        steps.append((operator, operand))
    return Problem(start, tuple(steps))


def sample_problems(count: int, seed: int, *, held_out: bool) -> list[Problem]:
    """``count`` distinct problems of the training or of the held-out set, the same for the same seed."""
    rng = random.Random(f"{seed}-{held_out}")
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = sample_problem(rng)
        if problem.held_out == held_out:
            problems.setdefault(problem.prompt, problem)
    return list(problems.values())


def arithmetic_dataset(count: int, seed: int, *, held_out: bool) -> Dataset:
    """Columns ``prompt`` and ``solution`` of ``count`` problems."""
    problems = sample_problems(count, seed, held_out=held_out)
    return Dataset.from_dict({"prompt": [p.prompt for p in problems], "solution": [p.solution for p in problems]})


ANSWER_AT_ONCE = {1: 0.4, 2: 0.15}
"""Share of solutions that answer at once, by number of steps; `ANSWER_AT_ONCE_LONG` for longer chains."""
ANSWER_AT_ONCE_LONG = 0.06
SLIP = 0.2
"""Share of steps that are written with a wrong result."""
MOST_CHECKS = 2
"""Checks of one step."""


def sample_solution(rng: random.Random, problem: Problem) -> str:
    """One verbose solution, as a supervised model shall imitate it; right unless a slip went unchecked."""
    if rng.random() < ANSWER_AT_ONCE.get(len(problem.steps), ANSWER_AT_ONCE_LONG):
        return f"\\boxed{{{problem.solution}}}"
    # habits are drawn once for each solution, so that styles differ
    filler, check, final_check = rng.choice((0.1, 0.4, 0.6)), rng.choice((0.2, 0.5, 0.8)), rng.choice((0.0, 0.3, 0.7))
    words: list[str] = []
    result = problem.start
    for step in problem.steps:
        words += _fillers(rng, filler)
        right = _apply(result, step)
        written = _slip(rng, right) if rng.random() < SLIP else right
        words.append(f"{expression(result, (step,))} = {written} .")
        checks = 0
        while checks < MOST_CHECKS and rng.random() < check:
            words += ["wait"] if rng.random() < filler else []
            words += _checks(result, (step,))
            checks += 1
        result = right if checks else written
    if rng.random() < final_check:
        words.append("let me verify again")
        words += _checks(problem.start, problem.steps)
        result = problem.partial_results[-1]
    if rng.random() < filler:
        words.append("so the answer is")
    return " ".join([*words, f"\\boxed{{{result}}}"])


def _fillers(rng: random.Random, filler: float) -> Iterator[str]:
    while rng.random() < filler * 0.8:
        yield rng.choice(FILLERS)


def _slip(rng: random.Random, right: int) -> int:
    return _bounded(right + rng.choice((-10, -2, -1, 1, 2, 10)))


def _apply(result: int, step: tuple[str, int]) -> int:
    operator, operand = step
    return _bounded(result + operand if operator == "+" else result - operand)


def _bounded(number: int) -> int:
    """The nearest number that has a word: after a slip, a chain may leave 0..99."""
    return min(max(number, 0), LARGEST_NUMBER)


def _checks(start: int, steps: tuple[tuple[str, int], ...]) -> Iterator[str]:
    for step in steps:
        result = _apply(start, step)
        yield f"check {expression(start, (step,))} = {result} ."
        start = result


def single_steps() -> list[tuple[str, str]]:
    """Every single step as a (prompt, completion) pair, ``("check 12 + 7 =", "19 .")``: what a solver knows by heart.

    No problem starts with "check", so learning these does not change how problems are answered.
    """
    pairs = []
    for start in range(LARGEST_NUMBER + 1):
        for operand in range(1, LARGEST_OPERAND + 1):
            if start + operand <= LARGEST_NUMBER:
                pairs.append((f"check {start} + {operand} =", f"{start + operand} ."))
            if start >= operand:
                pairs.append((f"check {start} - {operand} =", f"{start - operand} ."))
    return pairs


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per number 0..99, word and sign; ``<pad>``, ``<eos>`` and ``<unk>`` besides."""
    numbers = [str(number) for number in range(LARGEST_NUMBER + 1)]
    tokens = ["<pad>", "<eos>", "<unk>", *numbers, *_PUNCTUATION, *_WORDS]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    words = Regex(r"\d+|\\boxed\{|[a-z]+|[^\s\da-z]")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(words, "isolated")]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
