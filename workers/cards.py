"""Model cards of what was measured: a new README and a new manifest over it, stored beside those they replace.

Objects of an artifact never change. A card gets keys of its own, and the artifact's row names its manifest; whoever
reads the artifact sees the old card or the new one, whole.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from duquant.artifact.card import model_card
from duquant.artifact.layout import MANIFEST
from duquant.artifact.manifest import parse_manifest
from duquant.artifact.shards import json_bytes
from infra.artifact_keys import ArtifactKeys
from infra.job_measures import WithBaseline
from infra.jobs import Claim
from infra.storage import ObjectStore

CARD = "README.md"
_NUMBERS = ("perplexity", "tokens", "windows", "seq_len", "tokens_per_second", "model_bytes", "device")


def put_card(
    storage: ObjectStore,
    document: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    *,
    keys: ArtifactKeys,
    claim: Claim,
    attempt: int,
) -> tuple[str, dict[str, Any]]:
    """Store the card and the manifest of an artifact with what was measured on it.

    Args:
        storage: Where the artifact is.
        document: The manifest that there is, with the keys of its files.
        evaluation: What takes the place of its `evaluation`.
        keys: Of the artifact.
        claim: Of the job that measures.
        attempt: A number that this claim has not used yet.

    Returns:
        The key of the new manifest, and what is in it.
    """
    manifest = replace(parse_manifest(document, MANIFEST), evaluation=dict(evaluation))
    card = model_card(manifest).encode()
    card_key, manifest_key = (
        keys.card(name, job_id=claim.job.id, fence=claim.fence, attempt=attempt) for name in (CARD, MANIFEST)
    )
    storage.put_bytes(card_key, card)
    entry = {"name": CARD, "key": card_key, "size_bytes": len(card), "sha256": hashlib.sha256(card).hexdigest()}
    files = [entry if each["name"] == CARD else each for each in document["files"]]
    revised = {**document, "files": files, "evaluation": dict(evaluation)}
    storage.put_bytes(manifest_key, json_bytes(revised))
    return manifest_key, revised


def results_of(measured: Sequence[WithBaseline], *, whole: str | None = None) -> list[dict[str, Any]]:
    """Return what a manifest says of evaluations: of each fingerprint the newest that is whole, else the newest.

    Args:
        measured: Newest first.
        whole: The job whose evaluation is about to be complete.
    """
    best: dict[str, WithBaseline] = {}
    for each in measured:
        known = best.setdefault(each.evaluation.fingerprint, each)
        if not _is_whole(known, whole) and _is_whole(each, whole):
            best[each.evaluation.fingerprint] = each
    return [_result(each) for each in best.values()]


def _is_whole(measured: WithBaseline, whole: str | None) -> bool:
    return bool(measured.evaluation.is_complete) or measured.evaluation.job_id == whole


def _result(measured: WithBaseline) -> dict[str, Any]:
    evaluation, baseline = measured.evaluation, measured.baseline
    metrics, settings = evaluation.metrics, evaluation.settings or {}
    result = {
        "id": evaluation.id,
        "measured_at": datetime.fromtimestamp(evaluation.created_at / 1000, UTC).isoformat(timespec="seconds"),
        **({"text": settings["text"]} if "text" in settings else {}),
        **{name: metrics[name] for name in _NUMBERS if name in metrics},
    }
    if "tasks" in metrics:
        result["tasks"] = metrics["tasks"]
    if "speed" in metrics:
        result["speed"] = list(_speeds(metrics["speed"]))
    if baseline is not None:
        known = {name: baseline.metrics[name] for name in ("perplexity", "tasks") if name in baseline.metrics}
        result["baseline"] = {"id": baseline.id, **known}
    return result


def _speeds(speed: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a kernel benchmark that are of the artifact itself."""
    own = speed["artifact"]
    for scope in ("layer", "model"):
        for row in speed[scope]:
            if own in row["tokens_per_second"]:
                yield {
                    "scope": scope,
                    **{name: row[name] for name in ("phase", "batch", "tokens", "context")},
                    "tokens_per_second": row["tokens_per_second"][own],
                    "speedup": row.get("speedup", {}).get(own),
                }
