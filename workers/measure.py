"""What an evaluation does in a worker: fetch the artifact, load it, measure part after part."""

import json
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from duquant.artifact.layout import MANIFEST
from duquant.artifact.manifest import parse_manifest
from duquant.errors import DuQuantError
from duquant.evaluation.plan import EvaluationPlan
from duquant.evaluation.run import evaluate_plan
from duquant.models.references import resolve_model
from infra.artifact_keys import require_inside
from infra.errors import ChecksumMismatch
from infra.storage import ObjectStore, file_sha256
from workers.tasks import EvaluationSpec

PROGRESS = "progress.json"
"""File in the work directory: the phase, what is done and what there is to do in it."""
METRICS = "metrics.json"
"""File in the work directory: the record of what is measured."""
STOP = "stop"
"""File in the work directory that asks the worker to stop at the next window."""
_ARTIFACT = "artifact"


class EvaluationStopped(DuQuantError):  # noqa: N818
    """The dispatcher asked to stop."""


@dataclass
class Record:
    """What is measured by now, as it lies in the work directory: the dispatcher reads it, and a later try goes on."""

    metrics: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, list[str]] = field(default_factory=dict)
    """The parts that are done, by their ids, with the names that a task's scores have in `metrics`."""

    @classmethod
    def read(cls, work_dir: Path) -> "Record":
        """Return the record of a work directory; an empty one where there is none."""
        try:
            return cls(**json.loads((work_dir / METRICS).read_bytes()))
        except FileNotFoundError:
            return cls()

    def write(self, work_dir: Path) -> None:
        """Replace the record of a work directory."""
        _write(work_dir / METRICS, asdict(self))

    def with_part(self, part: str, metrics: Mapping[str, Any]) -> "Record":
        """Return the record with one more part done, and with metrics that take the place of those before."""
        names = metrics.get("tasks", {}).keys() - self.metrics.get("tasks", {}).keys()
        return Record(dict(metrics), {**self.parts, part: sorted(names)})


def merged(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics of two tries that have measured different parts.

    >>> merged({"perplexity": 9.0, "seconds": 2.0}, {"tasks": {"piqa": {"acc": 0.5}}, "seconds": 1.0})
    {'perplexity': 9.0, 'seconds': 3.0, 'tasks': {'piqa': {'acc': 0.5}}}
    """
    both = {**earlier, **later, "seconds": earlier.get("seconds", 0.0) + later["seconds"]}
    if "tasks" in both:
        both["tasks"] = {**earlier.get("tasks", {}), **later.get("tasks", {})}
    return both


def part_ids(plan: EvaluationPlan) -> list[str]:
    """Return what the parts of a plan are called, in the order in which they are measured.

    >>> from duquant.evaluation.plan import TaskConfig
    >>> part_ids(EvaluationPlan(tasks=(TaskConfig(name="piqa"), TaskConfig(kind="file", name="/texts/my.jsonl"))))
    ['perplexity', 'task piqa', 'task my.jsonl']
    """
    return [
        *(["perplexity"] if plan.perplexity is not None else []),
        *(task_part(task.name) for task in plan.tasks),
        *(["speed"] if plan.speed is not None else []),
    ]


def task_part(name: str) -> str:
    """Return what the part of a task is called."""
    return f"task {Path(name).name}"


def what_is_left(plan: EvaluationPlan, done: Container[str]) -> EvaluationPlan | None:
    """Return the plan without the parts that are done; none when nothing is left."""
    if all(part in done for part in part_ids(plan)):
        return None
    return EvaluationPlan(
        perplexity=None if "perplexity" in done else plan.perplexity,
        tasks=tuple(task for task in plan.tasks if task_part(task.name) not in done),
        speed=None if "speed" in done else plan.speed,
    )


def measure(storage: ObjectStore, spec: EvaluationSpec) -> dict[str, Any]:
    """Measure what is not done yet, part by part; return nothing: the record in the work directory says it all.

    The dispatcher and its workers talk through the work directory meanwhile: it is the one place that both can write,
    and a dispatcher that lost its lease takes it away, which ends the work.

    Raises:
        DuQuantError: the model, a text or a task cannot be used.
        InfraError: the object store failed, or the artifact is damaged.
        OSError: the work directory is full, or gone.
    """
    earlier = record = Record.read(spec.work_dir)
    plan = what_is_left(EvaluationPlan.from_dict(spec.plan), record.parts)
    if plan is None:
        return {}
    model = _model(storage, spec)
    (spec.work_dir / PROGRESS).unlink(missing_ok=True)
    pending = iter(part_ids(plan))

    def show(phase: str, done: int, total: int) -> None:
        if (spec.work_dir / STOP).exists():
            raise EvaluationStopped
        _write(spec.work_dir / PROGRESS, [phase, done, total])

    def keep(_kind: str, metrics: Mapping[str, Any]) -> None:
        nonlocal record
        record = record.with_part(next(pending), merged(earlier.metrics, metrics))
        record.write(spec.work_dir)

    evaluate_plan(
        str(model),
        plan,
        device=spec.device,
        allow_hub=spec.allow_hub,
        task_roots=spec.task_roots,
        on_progress=show,
        on_part=keep,
    )
    return {}


def _write(path: Path, values: object) -> None:
    """Replace a file of JSON: whoever reads it sees the old one or the new one."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(values), encoding="utf-8")
    part.replace(path)


def _model(storage: ObjectStore, spec: EvaluationSpec) -> Path:
    if spec.manifest_key is not None:
        return fetch_artifact(storage, spec.manifest_key, spec.work_dir / _ARTIFACT)
    assert spec.model is not None
    return resolve_model(spec.model, cache=spec.model_cache, allow_hub=spec.allow_hub)


def fetch_artifact(storage: ObjectStore, manifest_key: str, folder: Path) -> Path:
    """Bring an artifact into `folder`, every file checked; what an earlier try brought is kept.

    Raises:
        ObjectNotFound: a part of the artifact is gone.
        ChecksumMismatch: a file is not what the manifest says.
    """
    document = storage.get_bytes(manifest_key)
    values = json.loads(document)
    # Also refuses names that would leave the folder.
    manifest = parse_manifest(values, manifest_key)
    keys = {entry["name"]: entry["key"] for entry in values["files"]}
    prefix = manifest_key.removesuffix(MANIFEST)
    folder.mkdir(exist_ok=True)
    (folder / MANIFEST).write_bytes(document)
    for entry in manifest.files:
        path, key = folder / entry.name, keys[entry.name]
        require_inside(key, prefix)
        if path.exists() and file_sha256(path) == (entry.sha256, entry.size_bytes):
            continue
        if storage.get_file(key, path) != (entry.sha256, entry.size_bytes):
            path.unlink()
            raise ChecksumMismatch(f"object {key} is not what the manifest of its artifact says", key=key)
    return folder
