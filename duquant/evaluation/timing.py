"""Timing that can be compared: contenders take turns, warm-ups, medians with spread; ceilings of the same run.

`interleaved` takes wall times, on any device. `Harness` is for GPUs: cold caches, CUDA graphs, events. Torch is all
that this module imports, so that a benchmark may run it under a Python with little else.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")
Call = Callable[[], object]
Spread = dict[str, float]
"""median_ms, p20_ms and p80_ms of one call."""
ROUNDS = 11
RUNS = 2
_WARM_UP = 3
COLD_BYTES_PER_L2 = 3


def interleaved(
    cases: Mapping[str, Call],
    *,
    rounds: int,
    least_s: float = 0.004,
    before: Mapping[str, Call] | None = None,
    synchronize: Call = lambda: None,
) -> dict[str, Spread]:
    """Return wall times of one call of each case. Every case runs once in each round, in turn.

    What slows the machine down for a while then slows all of them, and no case always follows the same other one.

    Args:
        cases: what to time, by name.
        rounds: samples of each case.
        least_s: a sample is as many calls as take this long, by a first one; 0 is one call, and no first one is made.
        before: called before a case's sample, untimed.
        synchronize: waits until the device has done what was launched.
    """
    prepare = before or {}
    calls = dict.fromkeys(cases, 1)
    for name, run in cases.items() if least_s else ():
        prepare.get(name, _nothing)()
        _wall_s(run, 1, synchronize)
        calls[name] = max(1, int(least_s / max(_wall_s(run, 1, synchronize), 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds):
        for name in _rotated(list(cases), turn):
            prepare.get(name, _nothing)()
            samples[name].append(_wall_s(cases[name], calls[name], synchronize) * 1e3)
    return {name: spread_of(values) for name, values in samples.items()}


def ceilings(
    device: torch.device, *, rounds: int, copy_bytes: int | None = None, side: int | None = None
) -> dict[str, dict[str, Any]]:
    """Measure what a device can do at best, so that each time is also a share of a limit.

    Args:
        device: where.
        rounds: samples of each.
        copy_bytes: what is read and copied; by default more than any cache holds.
        side: of the square matrices that are multiplied.

    Returns:
        times, a spread of each, and giga_per_second: gigabytes (a copy reads and writes), or giga-operations of
        bfloat16 and int8 products.
    """
    is_gpu = device.type == "cuda"
    copy_bytes, side = copy_bytes or (2**31 if is_gpu else 256_000_000), side or (8192 if is_gpu else 2048)
    source = torch.randint(0, 1 << 30, (copy_bytes // 8,), device=device)
    target = torch.empty_like(source)
    A, B = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    a, b = (torch.randint(-128, 128, (side, side), dtype=torch.int8, device=device) for _ in range(2))
    work: dict[str, tuple[int, Call]] = {
        "copy": (2 * copy_bytes, lambda: target.copy_(source)),
        "read": (copy_bytes, source.sum),
        "bfloat16 product": (2 * side**3, lambda: torch.nn.functional.linear(A, B)),
        "int8 product": (2 * side**3, lambda: torch._int_mm(a, b.T)),
    }
    synchronize = torch.cuda.synchronize if is_gpu else _nothing
    times = interleaved({name: call for name, (_, call) in work.items()}, rounds=rounds, synchronize=synchronize)
    rates = {name: round(size / times[name]["median_ms"] / 1e6, 2) for name, (size, _) in work.items()}
    return {"times": times, "giga_per_second": rates}


def spread_of(values: Sequence[float]) -> Spread:
    """Return the median of some milliseconds, and their 20th and 80th percentile."""
    ordered = sorted(values)
    low, high = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.2, 0.8))
    return {"median_ms": round(median(ordered), 4), "p20_ms": round(low, 4), "p80_ms": round(high, 4)}


def _wall_s(run: Call, calls: int, synchronize: Call) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize()
    return (time.perf_counter() - started) / calls


def _nothing() -> None:
    """Stand in where nothing is to be done first."""


@dataclass(frozen=True)
class Case:
    """One candidate: the same work on several copies of its operands, so that no copy is in the cache when read."""

    name: str
    calls: Sequence[Call]


@dataclass
class Timing:
    """Microseconds of one call: what every round saw, for each of the independent runs."""

    runs: list[list[float]] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Return median, p20 and p80 over all rounds, and how far the runs' medians are apart."""
        flat = [value for run in self.runs for value in run]
        fifths = quantiles(flat, n=5) if len(flat) > 1 else flat * 4
        medians = [median(run) for run in self.runs]
        middle = median(flat)
        return {
            "us": round(middle, 3),
            "p20_us": round(fifths[0], 3),
            "p80_us": round(fifths[3], 3),
            "spread_of_runs": round((max(medians) - min(medians)) / middle, 4) if middle else 0.0,
        }


class Harness:
    """Measures cases on a GPU. On a CPU every step runs once, to see that it does: those times mean nothing."""

    def __init__(self, device: torch.device, *, rounds: int = ROUNDS) -> None:
        self.device = device
        self.is_gpu = device.type == "cuda"
        self.rounds, self.runs, self.warm_up = (rounds, RUNS, _WARM_UP) if self.is_gpu else (1, 1, 0)
        self.l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size if self.is_gpu else 1 << 10
        # Written before every timed step: whatever was in the cache is gone.
        self._flush = torch.empty(max(1, COLD_BYTES_PER_L2 * self.l2_bytes // 4), dtype=torch.int32, device=device)

    def copies(self, bytes_each: int, *, most: int = 16) -> int:
        """Return how many copies of operands make one pass over them overflow the L2 cache several times."""
        if not self.is_gpu:
            return 1
        return max(1, min(most, -(-COLD_BYTES_PER_L2 * self.l2_bytes // bytes_each)))

    def from_graph(self, cases: Sequence[Case]) -> dict[str, dict[str, float]]:
        """Return timings of one call of each case, replayed from a CUDA graph over all its copies, interleaved."""
        replays = {case.name: self._capture(case) for case in cases}
        timings = {case.name: Timing() for case in cases}
        for _ in range(self.runs):
            for case in cases:
                timings[case.name].runs.append([])
            for turn in range(self.rounds):
                for case in _rotated(cases, turn):
                    elapsed = self._time(replays[case.name])
                    timings[case.name].runs[-1].append(elapsed / len(case.calls))
        return {name: timing.summary() for name, timing in timings.items()}

    def eager(self, cases: Sequence[Case]) -> dict[str, dict[str, float]]:
        """Return wall times of one call with its launches and a synchronisation: how the papers' tables were made."""
        timings = {case.name: Timing() for case in cases}
        for case in cases:
            for call in case.calls[: self.warm_up]:
                call()
        for _ in range(self.runs):
            for case in cases:
                timings[case.name].runs.append([])
            for turn in range(self.rounds):
                for case in _rotated(cases, turn):
                    self.synchronize()
                    start = time.perf_counter()
                    case.calls[turn % len(case.calls)]()
                    self.synchronize()
                    timings[case.name].runs[-1].append((time.perf_counter() - start) * 1e6)
        return {name: timing.summary() for name, timing in timings.items()}

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def _capture(self, case: Case) -> Call:
        if not self.is_gpu:
            return lambda: [call() for call in case.calls]
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]  # torch's
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for call in case.calls[:_WARM_UP]:
                call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in case.calls:
                call()
        for _ in range(_WARM_UP):
            graph.replay()
        self.synchronize()
        return graph.replay

    def _time(self, step: Call) -> float:
        self._flush.fill_(1)
        if not self.is_gpu:
            start = time.perf_counter()
            step()
            return (time.perf_counter() - start) * 1e6
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's
        begin.record()
        step()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3


def _rotated(cases: Sequence[_T], turn: int) -> list[_T]:
    """Return the cases, each turn beginning with another: none is always the one after the flush."""
    start = turn % len(cases)
    return [*cases[start:], *cases[:start]]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill all memory that torch.empty hands out (NaN, or the largest integer): what is not written shows."""
    was = torch.are_deterministic_algorithms_enabled()
    settings: Any = torch.utils.deterministic  # a module that torch puts properties on
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was)
        settings.fill_uninitialized_memory = filled


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of what was expected; inf where anything is not finite."""
    if not bool(torch.isfinite(found).all()):
        return float("inf")
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))
