"""What tells one piece of work from any other: digests of everything that decides what comes out of it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from duquant.config import ALGORITHM_VERSION, QualityGate, TextSource
from duquant.evaluation.plan import TaskConfig


def fingerprint_of(identity: Mapping[str, Any]) -> str:
    """Return the sha256 of what decides a result, as canonical JSON."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def evaluation_settings(
    text: TextSource,
    *,
    seq_len: int,
    windows: int | None,
    perplexity: bool = True,
    tasks: Sequence[Mapping[str, Any]] = (),
    speed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what is measured and how, as it stands in the spec of a job and counts in its fingerprint.

    What is not measured is left out: a plain perplexity has the same fingerprint whatever else can be measured.
    """
    settings: dict[str, Any] = {"text": asdict(text), "seq_len": seq_len, "windows": windows} if perplexity else {}
    if tasks:
        settings["tasks"] = [dict(task) for task in tasks]
    if speed is not None:
        settings["speed"] = dict(speed)
    return settings


def gate_settings(gate: QualityGate) -> dict[str, Any]:
    """Return what a quality gate measures, as `evaluation_settings` does."""
    tasks = [asdict(TaskConfig.named(name, limit=gate.task_limit)) for name in gate.tasks]
    has_perplexity = gate.max_perplexity_increase is not None
    return evaluation_settings(
        gate.text, seq_len=gate.seq_len, windows=gate.windows, perplexity=has_perplexity, tasks=tasks
    )


def evaluation_fingerprint(
    *,
    model_identity: str,
    artifact_job_id: str | None,
    text_identity: str | None,
    settings: Mapping[str, Any],
    task_identities: Mapping[str, str] | None = None,
) -> str:
    """Return what tells a measurement from any other: of what, on which text, and how.

    Args:
        model_identity: What changes when the model's bytes do.
        artifact_job_id: The job that made what is measured; none for the unquantized model.
        text_identity: What changes when the text's bytes do, for texts that can change.
        settings: What is measured and how, as `evaluation_settings` gives it.
        task_identities: What changes when the bytes of a task file do, by its name.
    """
    identity = {
        "kind": "evaluate",
        "algorithm_version": ALGORITHM_VERSION,
        "model_identity": model_identity,
        "artifact_job_id": artifact_job_id,
        "text_identity": text_identity,
        **settings,
    }
    if task_identities:
        identity["task_identities"] = dict(task_identities)
    return fingerprint_of(identity)
