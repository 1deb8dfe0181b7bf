"""Timing on a GPU that can be compared: interleaved, cold caches, medians with spread, eager and from a graph.

Without a GPU (`--dry-run`) the same code runs on the CPU: wall clocks, no graphs. Its times mean nothing.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], object]
ROUNDS = 11
RUNS = 2
_WARM_UP = 3
COLD_BYTES_PER_L2 = 3


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
    """Measures cases on one device."""

    def __init__(self, device: torch.device, *, rounds: int = ROUNDS) -> None:
        self.device = device
        self.is_gpu = device.type == "cuda"
        # Once each on the CPU: enough to see that every step runs.
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
        stream = torch.cuda.Stream(self.device)
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
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3


def _rotated(cases: Sequence[Case], turn: int) -> list[Case]:
    """Return the cases, each turn beginning with another: none is always the one after the flush."""
    start = turn % len(cases)
    return [*cases[start:], *cases[:start]]


@contextmanager
def poisoned_memory() -> Any:
    """Fill all memory that torch.empty hands out (NaN, or the largest integer): what is not written shows."""
    was = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of what was expected; inf where anything is not finite."""
    if not bool(torch.isfinite(found).all()):
        return float("inf")
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))
