"""Checking an artifact against its manifest."""

from dataclasses import dataclass, field
from pathlib import Path

from duquant.artifact.layout import MANIFEST
from duquant.artifact.manifest import read_manifest
from duquant.artifact.shards import sha256_file
from duquant.errors import ArtifactError


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found."""

    ok: bool
    files: int
    """Files of the artifact: those that the manifest names, and the manifest."""
    size_bytes: int
    problems: list[str] = field(default_factory=list)


def verify(directory: Path) -> VerifyReport:
    """Compare every file with the manifest: present, of the right size and hash, and nothing unknown beside them."""
    try:
        manifest = read_manifest(directory)
    except ArtifactError as err:
        return VerifyReport(ok=False, files=0, size_bytes=0, problems=[str(err)])
    problems = []
    for entry in manifest.files:
        path = directory / entry.name
        if not path.is_file():
            problems.append(f"{entry.name} is missing")
        elif path.stat().st_size != entry.size_bytes:
            problems.append(f"{entry.name} has {path.stat().st_size} bytes, the manifest says {entry.size_bytes}")
        elif sha256_file(path) != entry.sha256:
            problems.append(f"{entry.name} does not match its sha256; it was changed or damaged")
    known = {entry.name for entry in manifest.files} | {MANIFEST}
    problems += [
        f"{path.name} is not in the manifest"
        for path in sorted(directory.iterdir())
        if path.name not in known and not path.name.startswith(".")
    ]
    size = sum(entry.size_bytes for entry in manifest.files)
    return VerifyReport(ok=not problems, files=len(known), size_bytes=size, problems=problems)


def require_intact(directory: Path) -> None:
    """Raise unless `verify` finds nothing.

    Raises:
        ArtifactError: the first problems found.
    """
    report = verify(directory)
    if not report.ok:
        more = f" (and {len(report.problems) - 3} more)" if len(report.problems) > 3 else ""
        raise ArtifactError(f"{directory}: {'; '.join(report.problems[:3])}{more}")
