"""The folder that an artifact is fetched into: which folders will do, and what stands in one while files come in."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from client.errors import BadInputError
from client.models import Artifact, ArtifactFile
from client.partial import part_name

MANIFEST = "manifest.json"
CARD = "README.md"
PARTIAL = ".duquant-partial"
"""Where unfinished files are kept; gone when the folder is whole."""
_OWNER = "artifact"


def identity_of(files: Mapping[str, str]) -> str:
    """Return what names an artifact: the hashes of its files, by their names.

    Its model card and its manifest do not count: they change with every evaluation, and the artifact stays the same.
    """
    lasting = sorted((name, sha256) for name, sha256 in files.items() if name not in (MANIFEST, CARD))
    return hashlib.sha256(json.dumps(lasting).encode()).hexdigest()


class TargetFolder:
    """A folder for one artifact, which holds nothing, or this artifact: whole, damaged or begun."""

    def __init__(self, out: Path, artifact: Artifact) -> None:
        self._out = out
        self._manifest = next((file for file in artifact.files if file.name == MANIFEST), None)
        self._identity = identity_of({file.name: file.sha256 for file in artifact.files})
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
            elif self._out.is_dir() and any(self._out.iterdir()) and not self._holds_this_artifact():
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
        # Parts of a card that was replaced while it was fetched may be left.
        shutil.rmtree(self.partial)

    def _holds(self, manifest: ArtifactFile) -> bool:
        path = self._out / MANIFEST
        return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == manifest.sha256

    def _holds_this_artifact(self) -> bool:
        """Tell whether the folder's manifest is one of this artifact, with whatever numbers."""
        try:
            files = json.loads((self._out / MANIFEST).read_bytes())["files"]
            return identity_of({file["name"]: file["sha256"] for file in files}) == self._identity
        except (OSError, ValueError, KeyError, TypeError):
            return False
