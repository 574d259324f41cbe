"""One step, and what is measured of it: time, memory, operations; the machine's own rates, which set the limit."""

import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer

from benchmarks.speed import contestants

Step = Callable[[], Any]


def silence_compiler() -> None:
    """Naive breaks its graph, and torch tells about it at length."""
    warnings.filterwarnings("ignore", module="torch")
    torch._logging.set_logs(all=logging.ERROR)


@contextmanager
def noted(*rows: Any) -> Iterator[None]:
    """One contestant's error goes to the status of its rows, and the others go on."""
    try:
        yield
    except contestants.MissingError as error:
        status = f"missing: {error}"
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text
        status = "out of memory" if out_of_memory else text
    else:
        return
    for row in rows:
        row.status = status


def embeddings(row: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A student, which requires a gradient, and a teacher."""
    student, teacher = torch.randn(2, row.rows, row.features, device=device).to(getattr(torch, row.dtype))
    return student.requires_grad_(), teacher


def make_step(row: Any, student: torch.Tensor, teacher: torch.Tensor) -> Step:
    """What is timed: the contestant's value, or its value and gradient; with "+graph", replayed from a CUDA graph."""
    contestant = row.contestant.removesuffix("+graph")
    loss = contestants.build(contestant, student.device, row.compiled)
    if row.autocast:
        loss = torch.autocast(student.device.type, getattr(torch, row.autocast))(loss)

    def value_and_grad() -> tuple[torch.Tensor, ...]:
        value = loss(student, teacher)
        return value, *torch.autograd.grad(value, student)

    def value() -> torch.Tensor:
        with torch.no_grad():
            return loss(student, teacher)

    step = value_and_grad if row.mode == "value_and_grad" else value
    return step if contestant == row.contestant else captured(step, student.device)


def captured(step: Step, device: torch.device) -> Step:
    """Replays what the step launches, after the warm-up on a side stream that capturing asks for."""
    if device.type != "cuda":
        raise contestants.MissingError("CUDA graphs need a CUDA device")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def cuda_clock() -> Callable[[], float]:
    """Seconds on the device's own clock, by CUDA events."""
    start = torch.cuda.Event(enable_timing=True)
    start.record()

    def now() -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        return start.elapsed_time(event) / 1e3

    return now


def timer(step: Step, device: torch.device) -> Timer:
    # Timer's own default is a single thread, and torch.compile starts over whenever the number of threads changes.
    clock = {"timer": cuda_clock()} if device.type == "cuda" else {}
    return Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads(), **clock)


def peak_bytes(step: Step, device: torch.device) -> int:
    """Most bytes held at a time during the step: what it returns included, its inputs not.

    On a CPU it is the running sum of the allocations that torch.profiler records, without a library's scratch space.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    changes = [(event["ts"], event["args"]["Bytes"]) for event in _trace(step, device) if event["name"] == "[memory]"]
    return max(accumulate(change for _, change in sorted(changes)), default=0)


def operations(step: Step, device: torch.device, compiled: bool) -> int | None:
    """Kernels launched on CUDA; elsewhere operations dispatched, which compiled code does not do (None)."""
    if device.type == "cuda":
        return sum(event.get("cat") == "kernel" for event in _trace(step, device))
    if compiled:
        return None
    with _CountOperations() as mode:
        step()
    return mode.count


class _CountOperations(TorchDispatchMode):
    """Leaves out views, allocations without a fill and questions about dtypes: they launch nothing."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        launches_nothing = ("empty", "_unsafe_view", "promote_types")
        self.count += not func.is_view and not any(name in func.name() for name in launches_nothing)
        return func(*args, **(kwargs or {}))


def _trace(step: Step, device: torch.device) -> list[dict[str, Any]]:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities, profile_memory=True) as profiler:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


@dataclass(frozen=True)
class Rates:
    """What the machine does at its best."""

    matmul: float = 0.0  # floating-point operations per second
    copy: float = 0.0  # bytes per second, those read plus those written

    def best(self, other: "Rates") -> "Rates":
        return Rates(max(self.matmul, other.matmul), max(self.copy, other.copy))

    def limit(self, rows: int, features: int, mode: str, itemsize: int) -> float:
        """Seconds that the arithmetic or the memory traffic takes at these rates, whichever is longer."""
        if mode == "value_and_grad":  # both inputs are read and the gradient is written
            work, passes = 4 * rows * features * min(rows, features), 3
        else:
            work, passes = min(2 * rows * features**2, 4 * rows**2 * features), 2
        return max(work / self.matmul, passes * rows * features * itemsize / self.copy)


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The best rates of a product in `dtype`, and of a copy too large for any cache."""

    def fastest(step: Step) -> float:
        return min(timer(step, device).timeit(2).mean for _ in range(3))

    matmul = 0.0
    for size in (256, 512, 1024, 2048, 4096, 8192):
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        # Half precision on a CPU without instructions for it depends on which operand is transposed.
        seconds = min(fastest(partial(torch.mm, *pair)) for pair in ((a, b), (a.T, b), (a, b.T)))
        matmul = max(matmul, 2 * size**3 / seconds)
        if seconds > 0.01:
            break
    source = torch.zeros(2**28 if device.type == "cuda" else 2**25, device=device)
    return Rates(matmul, 2 * source.nbytes / fastest(partial(torch.empty_like(source).copy_, source)))
