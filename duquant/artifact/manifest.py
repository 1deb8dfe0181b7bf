"""manifest.json: what an artifact is made of, from what, by which recipe. Written last; no manifest, no artifact."""

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from duquant.artifact.layout import FORMAT, MANIFEST, SCHEMA_VERSION
from duquant.config import ALGORITHM_VERSION, Recipe
from duquant.errors import ArtifactError, ConfigError


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact."""

    name: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Manifest:
    """The manifest of one artifact."""

    fingerprint: str
    """Of what the bytes came from; see `fingerprint`. A job of the service has another, of what was asked for."""
    source: dict[str, Any]
    """`sha256` over all source tensors, `model_type`, `layers`, and the name it was asked for by."""
    recipe: Recipe
    files: tuple[FileEntry, ...]
    versions: dict[str, str]
    summary: dict[str, Any]
    """Sizes: parameters, packed and unpacked bytes, bits per weight."""
    algorithm_version: int = ALGORITHM_VERSION
    """Of the duquant that made it, which may be older than this one."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """What was measured on it: `results`, newest first, and `quality_gate` where the job had one; empty at first.

    Each result says what was measured (`text`, `seq_len`, `windows`), where and when (`device`, `measured_at`), and the
    numbers: `perplexity`, `tasks`, `speed`, and `baseline` with those of the unquantized model.
    """

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {
            "schema_version": SCHEMA_VERSION,
            "format": FORMAT,
            "algorithm_version": self.algorithm_version,
            "fingerprint": self.fingerprint,
            "source": self.source,
            "recipe": self.recipe.to_dict(),
            "files": [
                {"name": entry.name, "sha256": entry.sha256, "size_bytes": entry.size_bytes} for entry in self.files
            ],
            "versions": self.versions,
            "summary": self.summary,
            "evaluation": self.evaluation,
        }


def fingerprint(source_sha256: str, recipe: Recipe) -> str:
    """Return the identity of an artifact: the model's bytes, the recipe, and the version of the algorithm."""
    parts = {"source": source_sha256, "recipe": recipe.digest(), "algorithm_version": ALGORITHM_VERSION}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def tool_versions() -> dict[str, str]:
    """Return the versions that can change bytes."""
    names = ("duquant", "torch", "transformers", "safetensors")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def read_manifest(directory: Path) -> Manifest:
    """Read and check an artifact's manifest.

    Raises:
        ArtifactError: it is missing, not ours, of another schema version, or malformed.
    """
    path = directory / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise ArtifactError(f"{directory} has no {MANIFEST}: it is not a finished duquant artifact") from err
    except (OSError, ValueError) as err:
        raise ArtifactError(f"{path} is not readable JSON: {err}") from err
    return parse_manifest(values, str(path))


def parse_manifest(values: object, where: str) -> Manifest:
    """Build a manifest from JSON types.

    Raises:
        ArtifactError: it is not ours, of another schema version, or malformed.
    """
    if not isinstance(values, Mapping) or values.get("format") != FORMAT:
        raise ArtifactError(f"{where} does not describe a duquant artifact")
    if values.get("schema_version") != SCHEMA_VERSION:
        raise ArtifactError(
            f"{where} has schema version {values.get('schema_version')}; this duquant reads version {SCHEMA_VERSION}"
        )
    try:
        files = tuple(_file_entry(entry) for entry in values["files"])
        return Manifest(
            fingerprint=str(values["fingerprint"]),
            source=dict(values["source"]),
            recipe=Recipe.from_dict(values["recipe"]),
            files=files,
            versions=dict(values["versions"]),
            summary=dict(values["summary"]),
            algorithm_version=int(values["algorithm_version"]),
            evaluation=dict(values.get("evaluation", {})),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as err:
        problem = str(err) if isinstance(err, ConfigError) else f"{type(err).__name__} {err}"
        raise ArtifactError(f"{where} is malformed: {problem}") from err


def _file_entry(values: Any) -> FileEntry:
    name = str(values["name"])
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(f"file name {name!r} leaves the artifact's directory")
    return FileEntry(name=name, sha256=str(values["sha256"]), size_bytes=int(values["size_bytes"]))
