"""The advantage computation beside the loops that others write, and beside a copy of the same bytes, in one run.

    python benchmarks/advantages.py --json docs/data/advantages.json --figure docs/figures/advantages.png

Two jobs, at four shapes (completions x tokens), float32, every token the policy's, gamma 0.9998, lambda 0.95:

1. gae: rewards and values -> advantages and returns (16 bytes per token);
2. fused: the length critic's values -> length and total advantages, targets, row statistics (16 bytes per token).

The loops are written from their formulas, in the form of the projects they are named after. One thread; implementations
take turns, since machines are noisy; what counts are the ratios within a run, of medians of process CPU time. The copy
goes first in a round and reads and writes as many bytes. torchrl's vectorised GAE takes part if it is installed. On a
machine with CUDA the same jobs are timed there with events, and the byte floor is that of a copy on the device.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import HfArgumentParser

from lenvm_rl.advantages import compute_advantages, gae, length_advantages, torch_scan
from lenvm_rl.advantages.types import empty_advantages
from lenvm_rl.evaluation.report import write_json
from lenvm_rl.launch import run

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SHAPES = ((64, 1024), (64, 4096), (256, 4096), (16, 32_768))
GAMMA, LAMBDA = 0.9998, 0.95
COEF = 0.7
BYTES_PER_TOKEN = 16
GAE_LOOP, UNFUSED = "textbook loop", "unfused composition"
VIEWS = {"view", "slice", "select", "unsqueeze", "expand", "t", "transpose", "as_strided", "detach", "_unsafe_view"}


@dataclass
class BenchmarkArguments:
    rounds: int = 15
    slow_rounds: int = 3
    """Rounds of what takes more than 20 ms."""
    json: str | None = None
    """Where to write the numbers."""
    figure: str | None = None
    """Where to draw the ratios."""


Job = Callable[[], object]


# --- the loops, from their formulas ---------------------------------------------------------------------------------


def textbook_loop(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """One step in time after the other over the whole batch, as in TRL's former PPO and in OpenRLHF."""
    last: Tensor | float = 0.0
    backwards = []
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        last = rewards[:, t] + GAMMA * following - values[:, t] + GAMMA * LAMBDA * last
        backwards.append(last)
    advantages = torch.stack(backwards[::-1], dim=1)
    return advantages, advantages + values


def masked_loop(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same with holes: where the mask is 0, value and sum are carried past the step, as in verl."""
    live = mask.float()
    following, last = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    backwards = []
    for t in reversed(range(rewards.shape[1])):
        step = rewards[:, t] + GAMMA * following - values[:, t] + GAMMA * LAMBDA * last
        following = values[:, t] * live[:, t] + (1 - live[:, t]) * following
        last = step * live[:, t] + (1 - live[:, t]) * last
        backwards.append(last)
    advantages = torch.stack(backwards[::-1], dim=1)
    return advantages, advantages + values


def chunk_loop(rewards: Tensor, values: Tensor, chunk: int = 128) -> tuple[Tensor, Tensor]:
    """Time reversed, a product with the powers of the decay in each chunk, a loop over chunks, as in slime."""
    B, T = rewards.shape
    residuals = (rewards + GAMMA * pad(values[:, 1:], (0, 1)) - values).flip(1)
    residuals = pad(residuals, (0, -T % chunk)).view(B, -1, chunk)
    step = torch.arange(chunk)
    powers = torch.where(step[:, None] <= step, (GAMMA * LAMBDA) ** (step - step[:, None]).clamp(min=0), 0.0)
    carried = (GAMMA * LAMBDA) ** (step + 1)
    last, chunks = torch.zeros(B, 1), []
    for index in range(residuals.shape[1]):
        sums = residuals[:, index] @ powers + last * carried
        last = sums[:, -1:]
        chunks.append(sums)
    advantages = torch.cat(chunks, 1)[:, :T].flip(1)
    return advantages, advantages + values


def unfused_composition(values: Tensor, mask: Tensor, task: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
    """What a trainer writes without a fused computation: rewards, loop, mask, gate, sum, targets and statistics."""
    live = mask.float()
    length, returns = textbook_loop(-(1 - GAMMA) * live, values * live)
    length, returns = length * live, returns * live
    total = (task[:, None] + COEF * gate[:, None] * length) * live
    tokens = live.sum(1)
    moments = []
    for x in (length, returns, total):
        mean = x.sum(1) / tokens
        moments += [mean, ((x - mean[:, None]).square() * live).sum(1)]
    return length, total, returns, tokens, *moments


# --- the run ---------------------------------------------------------------------------------------------------------


def jobs(B: int, T: int) -> dict[str, dict[str, Job]]:
    rng = torch.Generator().manual_seed(0)
    remaining = torch.arange(T, 0, -1) * torch.empty(B, T).uniform_(0.3, 2.0, generator=rng)
    values = (-(1 - GAMMA**remaining)).float()
    rewards = torch.randn(B, T, generator=rng)
    mask, zeros = torch.ones(B, T, dtype=torch.bool), torch.zeros(B)
    task, gate = torch.randn(B, generator=rng), torch.ones(B)
    source, target = torch.zeros(2, B, T), torch.zeros(2, B, T)
    written = torch.zeros(3, B, T)
    buffers = (torch.empty(B, T), torch.empty(B, T))
    out = empty_advantages(values, token_task=False)
    one: dict[str, Any] = {"gamma": GAMMA, "lam": LAMBDA, "right_padded": True}
    both: dict[str, Any] = one | {"coef": COEF, "gate": gate}

    def copy() -> None:
        target.copy_(source)

    def read_one_write_three() -> None:
        written.copy_(values)

    plain: dict[str, Job] = {
        "copy of the same bytes": copy,
        GAE_LOOP: lambda: textbook_loop(rewards, values),
        "loop with a mask": lambda: masked_loop(rewards, values, mask),
        "loop over chunks of 128": lambda: chunk_loop(rewards, values),
        "gae": lambda: gae(rewards, values, zeros, mask, **one),
        "gae, out=": lambda: gae(rewards, values, zeros, mask, **one, out=buffers),
    }
    if importlib.util.find_spec("torchrl"):
        from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

        following = pad(values[:, 1:], (0, 1))[..., None]
        done = torch.zeros(B, T, 1, dtype=torch.bool)
        done[:, -1] = True
        plain["torchrl, vectorised"] = lambda: vec_generalized_advantage_estimate(
            GAMMA, LAMBDA, values[..., None], following, rewards[..., None], done, done
        )
    fused: dict[str, Job] = {
        "copy of the same bytes": read_one_write_three,
        UNFUSED: lambda: unfused_composition(values, mask, task, gate),
        "compute_advantages": lambda: compute_advantages(values, zeros, mask, task, **both),
        "compute_advantages, out=": lambda: compute_advantages(values, zeros, mask, task, **both, out=out),
    }
    return {"gae": plain, "fused": fused}


def timed(tasks: dict[str, Job], rounds: int, slow_rounds: int) -> dict[str, dict[str, float]]:
    """Medians in ms of process CPU time and wall time; implementations take turns."""
    cpu: dict[str, list[float]] = {name: [] for name in tasks}
    wall: dict[str, list[float]] = {name: [] for name in tasks}
    for job in tasks.values():
        job()
    for turn in range(rounds):
        for name, job in tasks.items():
            if turn >= slow_rounds and cpu[name][0] > 20:
                continue
            cpu_start, wall_start = time.process_time(), time.perf_counter()
            job()
            cpu[name].append(1e3 * (time.process_time() - cpu_start))
            wall[name].append(1e3 * (time.perf_counter() - wall_start))
    return {name: {"cpu_ms": statistics.median(cpu[name]), "wall_ms": statistics.median(wall[name])} for name in tasks}


class Traffic(TorchDispatchMode):
    """Counts operations other than views, and the bytes of the tensors they take and give."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in VIEWS:
            self.operations += 1
            tensors = [x for x in (*args, *(kwargs or {}).values(), result) if isinstance(x, Tensor)]
            self.bytes += sum(x.numel() * x.element_size() for x in {id(x): x for x in tensors}.values())
        return result


def traffic(B: int = 16, T: int = 4096) -> dict[str, dict[str, float]]:
    """Operations that PyTorch dispatches (launches, on a GPU) and the bytes per token that they take and give."""
    everything = jobs(B, T)
    values, zeros, mask = -torch.rand(B, T), torch.zeros(B), torch.ones(B, T, dtype=torch.bool)
    out = empty_advantages(values, token_task=False)
    one: dict[str, Any] = {"gamma": GAMMA, "lam": LAMBDA, "right_padded": True}
    counted: dict[str, Job] = {
        GAE_LOOP: everything["gae"][GAE_LOOP],
        "loop with a mask": everything["gae"]["loop with a mask"],
        "loop over chunks of 128": everything["gae"]["loop over chunks of 128"],
        "gae, out=": lambda: torch_scan.gae(values, values, zeros, mask, **one, out=(out.length, out.returns)),
        UNFUSED: everything["fused"][UNFUSED],
        "compute_advantages, out=": lambda: torch_scan.fused(
            values, zeros, mask, zeros, **one, coef=COEF, gate=zeros, scale=1.0, out=out
        ),
    }
    result = {}
    for name, job in counted.items():
        job()
        with Traffic() as seen:
            job()
        result[name] = {"operations": seen.operations, "bytes_per_token": seen.bytes / (B * T)}
    return result


def accuracy(B: int = 4, T: int = 32_768) -> list[dict[str, float]]:
    """Largest absolute error of the float32 length advantage against the float64 loop, per gamma."""
    rows = []
    for gamma in (0.99, 0.997, 0.9998, 0.99999):
        rng = torch.Generator().manual_seed(1)
        remaining = torch.arange(T, 0, -1) * torch.empty(B, T).uniform_(0.3, 2.0, generator=rng)
        values = (-(1 - gamma**remaining)).float()
        zeros, mask = torch.zeros(B), torch.ones(B, T, dtype=torch.bool)
        given: dict[str, Any] = {"gamma": gamma, "lam": 1.0}
        exact = length_advantages(values, zeros, mask, **given, backend="reference")
        ours = length_advantages(values, zeros, mask, **given, backend="torch")
        last: Tensor | float = 0.0
        loop = torch.empty(B, T)
        for t in reversed(range(T)):
            following = values[:, t + 1] if t + 1 < T else 0.0
            last = -(1 - gamma) + gamma * following - values[:, t] + gamma * last
            loop[:, t] = last
        rows.append({"gamma": gamma, "ours": _worst(ours, exact), "loop": _worst(loop, exact)})
    return rows


def _worst(x: Tensor, exact: Tensor) -> float:
    return (x.double() - exact.double()).abs().max().item()


def on_cuda(B: int, T: int) -> dict[str, float]:
    """Milliseconds of the fused kernel and of a device copy of the same bytes, by events."""
    values, mask = -torch.rand(B, T, device="cuda"), torch.ones(B, T, dtype=torch.bool, device="cuda")
    row = torch.zeros(B, device="cuda")
    out = empty_advantages(values, token_task=False)
    source, target = (torch.zeros(2, B, T, device="cuda") for _ in range(2))

    def fused() -> None:
        compute_advantages(
            values, row, mask, row, gamma=GAMMA, lam=LAMBDA, coef=COEF, right_padded=True, out=out, backend="triton"
        )

    result = {}
    for name, job in (("copy of the same bytes", lambda: target.copy_(source)), ("kernel", fused)):
        for _ in range(10):
            job()
        times = []
        for _ in range(50):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            job()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        result[name] = statistics.median(times)
    return result


def main() -> None:
    (args,) = HfArgumentParser([BenchmarkArguments]).parse_args_into_dataclasses()  # type: ignore[list-item]
    torch.set_num_threads(1)
    result: dict[str, Any] = {"gamma": GAMMA, "lambda": LAMBDA, "threads": 1, "torch": torch.__version__, "times": {}}
    for B, T in SHAPES:
        for job, tasks in jobs(B, T).items():
            result["times"].setdefault(job, {})[f"{B}x{T}"] = timed(tasks, args.rounds, args.slow_rounds)
        print(f"measured {B} x {T}", flush=True)
    result["traffic"] = traffic()
    result["accuracy"] = accuracy()
    if torch.cuda.is_available():
        result["cuda"] = {f"{B}x{T}": on_cuda(B, T) for B, T in SHAPES}
        result["cuda_device"] = torch.cuda.get_device_name()
    print(markdown(result))
    if args.json:
        write_json(Path(args.json), result)
    if args.figure:
        draw(result, Path(args.figure))


def markdown(result: dict[str, Any]) -> str:
    lines = []
    for job, baseline in (("gae", GAE_LOOP), ("fused", UNFUSED)):
        times = result["times"][job]
        lines += ["", f"| {job} | " + " | ".join(times) + " |", "|---|" + "---|" * len(times)]
        names = list(next(iter(times.values())))
        for name in names:
            cells = []
            for shape in times.values():
                ms, loop, copy = (shape[n]["cpu_ms"] for n in (name, baseline, names[0]))
                cells.append(f"{ms:.3g} ms ({_short(loop / ms)}, {_short(ms / copy)})")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| 16 x 4096 | operations | bytes per token |", "|---|---|---|"]
    for name, row in result["traffic"].items():
        lines.append(f"| {name} | {row['operations']:,} | {row['bytes_per_token']:.0f} |")
    lines += ["", "| gamma, T = 32,768, lambda 1 | float32 loop | this package |", "|---|---|---|"]
    lines += [f"| {row['gamma']} | {row['loop']:.1e} | {row['ours']:.1e} |" for row in result["accuracy"]]
    for shape, row in result.get("cuda", {}).items():
        lines.append(f"{shape}: " + ", ".join(f"{name} {ms:.4f} ms" for name, ms in row.items()))
    return "\n".join(lines)


def _short(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"


def draw(result: dict[str, Any], path: Path) -> None:
    """Times as multiples of the copy, one panel for each job."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), sharey=True)
    for axis, (job, times) in zip(axes, result["times"].items(), strict=True):
        names = list(next(iter(times.values())))
        for name in names[1:]:
            ratios = [shape[name]["cpu_ms"] / shape[names[0]]["cpu_ms"] for shape in times.values()]
            ours = "out=" in name or name in ("gae", "compute_advantages")
            axis.plot(list(times), ratios, marker="o", label=name, linewidth=2.5 if ours else 1.2)
        axis.axhline(1, color="grey", linewidth=0.8, linestyle=":")
        axis.set_yscale("log")
        axis.set_title(job)
        axis.set_xlabel("completions x tokens")
        axis.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    axes[0].set_ylabel("CPU time / copy of the same bytes")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    run(main)
