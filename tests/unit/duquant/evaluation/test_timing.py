"""Timing: contenders take turns, and what is reported is what the clock said."""

import time
from itertools import pairwise

import pytest
import torch

from duquant.evaluation.timing import ceilings, interleaved, poisoned_memory, spread_of


def test_contenders_take_turns_and_none_always_follows_the_same_one() -> None:
    seen: list[str] = []
    cases = {name: (lambda name=name: seen.append(name)) for name in "abc"}
    interleaved(cases, rounds=3, least_s=0.0)
    assert seen == [*"abc", *"bca", *"cab"]
    assert ("a", "c") not in set(pairwise(seen[:3]))


def test_a_sample_is_as_many_calls_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of its own: a busy machine makes a short call as long as a long one."""
    now = 0.0
    calls = {"short": 0, "long": 0}

    def work(name: str, seconds: float) -> None:
        nonlocal now
        calls[name] += 1
        now += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    cases = {"short": lambda: work("short", 0.001), "long": lambda: work("long", 0.02)}
    times = interleaved(cases, rounds=2, least_s=0.0105)
    # Two before the samples; then as many calls as fit, and one at least.
    assert calls == {"short": 2 + 2 * 10, "long": 2 + 2}
    assert times["short"]["median_ms"] == pytest.approx(1.0)
    assert times["long"]["median_ms"] == pytest.approx(20.0)


def test_what_comes_before_a_sample_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def prepare() -> None:
        nonlocal now
        now += 0.05

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    times = interleaved({"a": lambda: None}, rounds=2, least_s=0.0, before={"a": prepare})
    assert now == pytest.approx(0.1)
    assert times["a"]["p80_ms"] < 50


def test_a_spread_is_the_median_and_two_percentiles() -> None:
    assert spread_of([5.0, 1.0, 4.0, 2.0, 3.0]) == {"median_ms": 3.0, "p20_ms": 2.0, "p80_ms": 5.0}
    assert spread_of([7.0]) == {"median_ms": 7.0, "p20_ms": 7.0, "p80_ms": 7.0}


def test_ceilings_are_work_over_time() -> None:
    found = ceilings(torch.device("cpu"), rounds=3, copy_bytes=1 << 20, side=64)
    for name, work in (("copy", 2 << 20), ("read", 1 << 20), ("bfloat16 product", 2 * 64**3)):
        rate = work / found["times"][name]["median_ms"] / 1e6
        # Both are rounded.
        assert found["giga_per_second"][name] == pytest.approx(rate, abs=0.01)


def test_poisoned_memory_shows_what_is_not_written() -> None:
    with poisoned_memory():
        assert torch.empty(1000).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
