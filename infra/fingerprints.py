"""What tells one piece of work from any other: digests of everything that decides what comes out of it."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from duquant.config import ALGORITHM_VERSION


def fingerprint_of(identity: Mapping[str, Any]) -> str:
    """Return the sha256 of what decides a result, as canonical JSON."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def evaluation_fingerprint(
    *,
    model_identity: str,
    artifact_job_id: str | None,
    text_identity: str | None,
    settings: Mapping[str, Any],
) -> str:
    """Return what tells a measurement from any other: of what, on which text, and how.

    Args:
        model_identity: What changes when the model's bytes do.
        artifact_job_id: The job that made what is measured; none for the unquantized model.
        text_identity: What changes when the text's bytes do, for texts that can change.
        settings: What is measured and how, as it stands in the spec of the job.
    """
    return fingerprint_of(
        {
            "kind": "evaluate",
            "algorithm_version": ALGORITHM_VERSION,
            "model_identity": model_identity,
            "artifact_job_id": artifact_job_id,
            "text_identity": text_identity,
            **settings,
        }
    )
