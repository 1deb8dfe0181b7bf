"""What travels between the dispatcher and its executors: small, plain, picklable."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from duquant.pipeline.plan import StepId


@dataclass(frozen=True)
class RunSpec:
    """What is the same for all tasks of one claim of a job."""

    job_id: str
    model: str
    """A reference that duquant.models.references understands."""
    recipe: dict[str, Any]
    work_dir: Path
    model_cache: Path
    allow_hub: bool
    device: str
    text_key: str | None = None
    """Object that holds the calibration text, for recipes whose source is an object."""
    text_file: Path | None = None
    """Local file that holds it, for recipes whose source is a file."""


@dataclass(frozen=True)
class Task:
    """One step of a run; `key` is where the shard of a quantize or extra step goes in object storage."""

    run: RunSpec
    step: StepId
    key: str | None = None
    attempt: int = 1


@dataclass(frozen=True)
class Completion:
    """How a task ended: with `result`, or with `error` in words."""

    task: Task
    result: dict[str, Any] | None = None
    error: str | None = None
    kind: str = "ok"
    """ok, bad_input (never retried), transient (retried), or error (retried, then the job fails)."""


class Executor(Protocol):
    """Runs tasks. It outlives jobs; one job at a time uses it, from one thread."""

    @property
    def slots(self) -> int:
        """Tasks that run at the same time."""
        ...

    def has_room(self) -> bool:
        """Tell whether another task may be submitted (at most two in flight for each slot)."""
        ...

    def submit(self, task: Task) -> None:
        """Start a task, or queue it behind the one that its slot runs."""
        ...

    def collect(self, timeout_s: float) -> list[Completion]:
        """Return tasks that ended, waiting up to `timeout_s` for the first."""
        ...

    def abandon(self) -> None:
        """Drop what is queued and wait until nothing runs any more; completions are lost."""
        ...

    def close(self) -> None:
        """Abandon everything and free the slots."""
        ...
