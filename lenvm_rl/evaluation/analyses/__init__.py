"""The analyses of `recipes/evaluate.py`, one module each: its arguments, what it does, and what it shows.

An analysis is a function from a `Bench`, which holds policy, critic, problems and rollouts, to `Findings`.
"""

from .findings import Findings, Sheet
from .length_control import ControlArguments, control
from .prediction import PredictArguments, predict
from .schedule import ScheduleArguments, schedule
from .setting import Bench, BenchArguments
from .tokens import TokenArguments, tokens
from .tradeoff import TradeoffArguments, tradeoff

__all__ = [
    "Bench",
    "BenchArguments",
    "ControlArguments",
    "Findings",
    "PredictArguments",
    "ScheduleArguments",
    "Sheet",
    "TokenArguments",
    "TradeoffArguments",
    "control",
    "predict",
    "schedule",
    "tokens",
    "tradeoff",
]
