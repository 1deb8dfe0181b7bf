"""What a result needs beside its numbers: the machine, the commit, the versions."""

import os
import platform
import statistics
import subprocess
import tempfile
import time
import timeit
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
# What a benchmark writes changes nothing that the next one measures.
_MEASURED = (".", ":!benchmarks/results", ":!docs", ":!README.md")


def describe() -> dict[str, Any]:
    """Return the facts about this run."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _git("rev-parse", "HEAD"),
        "has_uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no", "--", *_MEASURED)),
        "machine": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "threads": int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("duquant", "torch", "transformers")},
        },
    }


def load_average() -> float:
    """Return the 1-minute load, so that a reader can see whether the machine had other work."""
    return round(os.getloadavg()[0], 2)


def loop_ms() -> float:
    """Return how long Python takes to add up a million numbers, at best: about 10 ms on a current core of its own.

    A core that is shared with other machines takes longer by the hour, and what is bound by Python does so with it.
    """
    return round(min(timeit.repeat("sum(range(1_000_000))", number=1, repeat=20)) * 1000, 1)


def flush_ms() -> dict[str, float]:
    """Return how long the temporary folder's disk takes to flush 8 KB at the end of a file, as a commit does."""
    times = []
    with tempfile.TemporaryFile() as file:
        for _ in range(300):
            start = time.perf_counter()
            file.write(b"\0" * 8192)
            file.flush()
            os.fdatasync(file.fileno())
            times.append((time.perf_counter() - start) * 1000)
    return {"mean": round(statistics.fmean(times), 2), "p90": round(statistics.quantiles(times, n=10)[-1], 2)}


def data_folder() -> Path:
    """Return the folder of texts that do not come with the project."""
    return Path(os.environ.get("DUQUANT_DATA_DIR") or REPOSITORY.parent / "shared" / "data")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"  # a benchmark may run from a plain checkout


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown: no git here"
    return done.stdout.strip()


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
