"""The folder that an artifact is fetched into: which folders will do, and what stands in one while files come in."""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from client.errors import BadInputError
from client.models import Artifact, ArtifactFile
from client.partial import part_name

MANIFEST = "manifest.json"
CARD = "README.md"
PARTIAL = ".duquant-partial"
"""Where unfinished files are kept; gone when the folder is whole."""
_OWNER = "artifact"
_LOCK = "lock"


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
        self._lock: IO[bytes] | None = None

    def begin(self) -> None:
        """Make the folder, hold it for this pull until `release`, and note whose it is.

        Raises:
            BadInputError: it cannot be written, holds something else, or another pull fills it.
        """
        try:
            self._check()
            self._lock = self._locked()
            # Whoever held it until now may have changed it.
            self._check()
            (self.partial / _OWNER).write_text(self._identity, encoding="utf-8")
        except OSError as error:
            self.release()
            raise BadInputError(f"cannot write to {self._out}: {error.strerror}") from error
        except BadInputError:
            self.release()
            raise

    def release(self) -> None:
        """Let other pulls have the folder; harmless without a `begin`. The lock also goes with the process."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _check(self) -> None:
        owner = self.partial / _OWNER
        if owner.is_file():
            if owner.read_text(encoding="utf-8").strip() != self._identity:
                raise BadInputError(
                    f"another artifact is half fetched into {self._out}; choose another --out, or remove it"
                )
        elif self._out.is_dir() and self._has_files() and not self._holds_this_artifact():
            raise BadInputError(
                f"{self._out} is not empty, and what it holds is not this artifact; choose another --out"
            )

    def _has_files(self) -> bool:
        return any(path != self.partial for path in self._out.iterdir())

    def _locked(self) -> IO[bytes]:
        path = self.partial / _LOCK
        while True:
            self.partial.mkdir(parents=True, exist_ok=True)
            try:
                lock = path.open("wb")
            except FileNotFoundError:  # a pull that ends has just removed the folder
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with contextlib.suppress(FileNotFoundError):
                    # Not one that was removed between these two lines.
                    if os.path.samestat(path.stat(), os.fstat(lock.fileno())):
                        return lock
            except BlockingIOError as error:
                lock.close()
                raise BadInputError(
                    f"another pull fills {self._out} at this moment; wait for it, or choose another --out"
                ) from error
            lock.close()

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
        for path in self.partial.iterdir():
            if path.name != _LOCK:
                path.unlink()
        (self.partial / _LOCK).unlink()
        self.release()
        # The next pull may have begun already, and has it then.
        with contextlib.suppress(OSError):
            self.partial.rmdir()

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
