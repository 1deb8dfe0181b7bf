"""The folder that an artifact is fetched into: which folders will do, and what stands in one while files come in."""

import hashlib
from pathlib import Path

from client.errors import BadInputError
from client.models import Artifact, ArtifactFile
from client.partial import part_name

MANIFEST = "manifest.json"
PARTIAL = ".duquant-partial"
"""Where unfinished files are kept; gone when the folder is whole."""
_OWNER = "artifact"


class TargetFolder:
    """A folder for one artifact, which holds nothing, or this artifact: whole, damaged or begun."""

    def __init__(self, out: Path, artifact: Artifact) -> None:
        self._out = out
        self._manifest = next((file for file in artifact.files if file.name == MANIFEST), None)
        # The manifest lists the hashes of all other files: its own hash names the artifact.
        self._identity = self._manifest.sha256 if self._manifest else artifact.fingerprint
        self.partial = out / PARTIAL

    def begin(self) -> None:
        """Make the folder, and note whose it is.

        Raises:
            BadInputError: it cannot be written, or holds something else.
        """
        owner = self.partial / _OWNER
        try:
            if self.partial.is_dir():
                if owner.is_file() and owner.read_text(encoding="utf-8").strip() != self._identity:
                    raise BadInputError(
                        f"another artifact is half fetched into {self._out}; choose another --out, or remove it"
                    )
            elif self._out.is_dir() and any(self._out.iterdir()) and not self._holds(self._manifest):
                raise BadInputError(
                    f"{self._out} is not empty, and what it holds is not this artifact; choose another --out"
                )
            self.partial.mkdir(parents=True, exist_ok=True)
            owner.write_text(self._identity, encoding="utf-8")
        except OSError as error:
            raise BadInputError(f"cannot write to {self._out}: {error.strerror}") from error

    def set_manifest_aside(self) -> None:
        """Take the manifest away before files change: a folder that has one is taken for whole."""
        path = self._out / MANIFEST
        if self._manifest is not None and self._holds(self._manifest):
            # As a part it is not fetched anew when everything else is there.
            path.replace(self.partial / part_name(self._manifest))
        else:
            path.unlink(missing_ok=True)

    def end(self) -> None:
        """Remove what only an unfinished folder has."""
        (self.partial / _OWNER).unlink()
        self.partial.rmdir()

    def _holds(self, manifest: ArtifactFile | None) -> bool:
        path = self._out / MANIFEST
        return (
            manifest is not None and path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == manifest.sha256
        )
