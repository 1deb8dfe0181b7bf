"""What an evaluation does in a worker: fetch the artifact, load it, measure it on the text."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from duquant.artifact.layout import MANIFEST
from duquant.artifact.manifest import parse_manifest
from duquant.config import TextSource
from duquant.errors import DuQuantError
from duquant.evaluation.perplexity import evaluate
from duquant.models.devices import resolve_device
from duquant.models.references import resolve_model
from infra.artifact_keys import require_inside
from infra.errors import ChecksumMismatch
from infra.storage import ObjectStore, file_sha256
from workers.tasks import EvaluationSpec

PROGRESS = "progress.json"
"""File in the work directory: windows done and to do."""
STOP = "stop"
"""File in the work directory that asks the worker to stop at the next window."""
_ARTIFACT = "artifact"


class EvaluationStopped(DuQuantError):  # noqa: N818
    """The dispatcher asked to stop."""


def measure(storage: ObjectStore, spec: EvaluationSpec) -> dict[str, Any]:
    """Return the metrics of an evaluation.

    The dispatcher and its workers talk through the work directory meanwhile: it is the one place that both can write,
    and a dispatcher that lost its lease takes it away, which ends the work.

    Raises:
        DuQuantError: the model or the text cannot be used.
        InfraError: the object store failed, or the artifact is damaged.
        OSError: the work directory is full, or gone.
    """
    model = _model(storage, spec)
    text = _text(storage, spec)
    (spec.work_dir / PROGRESS).unlink(missing_ok=True)

    def report(done: int, total: int) -> None:
        if (spec.work_dir / STOP).exists():
            raise EvaluationStopped
        part = spec.work_dir / f"{PROGRESS}.part"
        part.write_text(json.dumps([done, total]), encoding="utf-8")
        part.replace(spec.work_dir / PROGRESS)

    result = evaluate(
        str(model), text, seq_len=spec.seq_len, windows=spec.windows, device=spec.device, on_progress=report
    )
    return {
        "perplexity": result.perplexity,
        "tokens": result.tokens,
        "windows": result.windows,
        "seq_len": result.seq_len,
        "seconds": result.seconds,
        "tokens_per_second": result.tokens / result.seconds,
        "model_bytes": result.model_bytes,
        "device": resolve_device(spec.device).type,
    }


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


def _text(storage: ObjectStore, spec: EvaluationSpec) -> TextSource:
    """Return the source of the text, on this machine."""
    source = TextSource(**spec.text)
    file = spec.text_file
    if spec.text_key is not None:
        # The suffix tells JSONL from plain text.
        file = spec.work_dir / f"evaluation-text{Path(spec.text_key).suffix}"
        if not file.exists():
            storage.get_file(spec.text_key, file)
    return source if file is None else replace(source, kind="file", name=str(file))
