"""What travels between the dispatcher and its executors: small, plain, picklable."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from duquant.pipeline.steps import StepId
from workers.retries import ErrorClass


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
    """One step of a run.

    `key` is where the shard of a quantize or extra step goes in object storage, and where that of the layer that a
    propagate step runs is: drafts are only in the work directory.
    """

    run: RunSpec
    step: StepId
    key: str | None = None
    attempt: int = 1

    @property
    def label(self) -> str:
        """What logs call it."""
        kind, layer, shard, pass_index = self.step
        parts = [kind, *(str(part) for part in (layer, shard) if part != -1)]
        return "-".join(parts + ([f"pass-{pass_index}"] if pass_index else []))


@dataclass(frozen=True)
class EvaluationSpec:
    """What an evaluation loads, and what it measures."""

    job_id: str
    work_dir: Path
    """Holds the parts that are done, in metrics.json; what is in there before the task starts is not done again."""
    model_cache: Path
    allow_hub: bool
    device: str
    plan: dict[str, Any]
    """A duquant.evaluation.plan.EvaluationPlan. Its texts and task files are files on this machine."""
    task_roots: tuple[Path, ...] = ()
    """Folders that task files and their data must be in."""
    model: str | None = None
    """A reference that duquant.models.references understands, for an unquantized model."""
    manifest_key: str | None = None
    """Object that describes the artifact, for a quantized one."""


@dataclass(frozen=True)
class EvaluationTask:
    """A whole evaluation; it is one task, since its parts share a loaded model."""

    run: EvaluationSpec
    attempt: int = 1

    @property
    def label(self) -> str:
        """What logs call it."""
        return "evaluate"


TaskT = TypeVar("TaskT", Task, EvaluationTask)


@dataclass(frozen=True)
class Completion(Generic[TaskT]):
    """How a task ended: with `result`, or with `error` in words."""

    task: TaskT
    result: dict[str, Any] | None = None
    error: str | None = None
    kind: str = "ok"
    """ok, bad_input (never retried), transient or scarce (retried), or error (retried, then the job fails)."""

    device: str = "unknown"
    """What it ran on, for the bill."""

    seconds: float = 0.0
    """How long it took, for the bill."""

    @property
    def retry_as(self) -> ErrorClass | None:
        """How the job may be tried again when this try's attempts are used up."""
        return {"transient": ErrorClass.OUTAGE, "scarce": ErrorClass.SCARCITY}.get(self.kind)


class Executor(Protocol):
    """Runs tasks. It outlives jobs; one job at a time uses it, from one thread."""

    @property
    def slots(self) -> int:
        """Tasks that run at the same time."""
        ...

    def has_room(self) -> bool:
        """Tell whether another task may be submitted (at most two in flight for each slot)."""
        ...

    def submit(self, task: Task | EvaluationTask) -> None:
        """Start a task, or queue it behind the one that its slot runs."""
        ...

    def collect(self, timeout_s: float) -> list[Completion[Any]]:
        """Return tasks that ended, waiting up to `timeout_s` for the first."""
        ...

    def abandon(self) -> None:
        """Drop what is queued and wait until nothing runs any more; completions are lost."""
        ...

    def close(self) -> None:
        """Abandon everything and free the slots."""
        ...
