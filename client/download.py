"""Fetches an artifact's files: in parallel, continued after a break, each verified before it gets its name."""

import errno
import hashlib
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import httpx

from client.errors import BadInputError, ClientError, DownloadError, UnavailableError
from client.models import Artifact, ArtifactFile

MANIFEST = "manifest.json"
PARTIAL = ".duquant-partial"
_CHUNK = 1 << 20
_TRIES = 4
_RANGE_NOT_SATISFIABLE = 416


@dataclass(frozen=True, kw_only=True)
class PullSummary:
    """What a pull did."""

    out: Path
    files: int
    size_bytes: int
    fetched_bytes: int
    """Less than size_bytes when files, or parts of them, were there already."""


def pull(
    read_artifact: Callable[[], Artifact],
    out: Path,
    *,
    parallel: int,
    on_bytes: Callable[[int, int], None] | None = None,
) -> PullSummary:
    """Fetch what `read_artifact` lists; it is called again when the links have expired.

    The manifest comes last, so a folder that has one is whole.
    """
    artifact = read_artifact()
    targets = {file.name: safe_target(out, file.name) for file in artifact.files}
    try:
        (out / PARTIAL).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInputError(f"cannot write to {out}: {error.strerror}") from error
    transfer = _Transfer(read_artifact, artifact, on_bytes)
    try:
        with httpx.Client(timeout=httpx.Timeout(60.0, connect=10.0), follow_redirects=False) as http:
            rest = [file for file in artifact.files if file.name != MANIFEST]
            _in_parallel(transfer, http, rest, targets, out, parallel)
            for file in artifact.files:
                if file.name == MANIFEST:
                    transfer.fetch(http, file, targets[file.name], out / PARTIAL)
        (out / PARTIAL).rmdir()
    except OSError as error:
        full = " (the disk is full)" if error.errno == errno.ENOSPC else ""
        raise ClientError(f"cannot write to {out}: {error.strerror}{full}; pull again to go on") from error
    return PullSummary(
        out=out, files=len(artifact.files), size_bytes=artifact.size_bytes, fetched_bytes=transfer.fetched_bytes
    )


def safe_target(out: Path, name: str) -> Path:
    """Return where a file of the artifact goes.

    Raises:
        BadInputError: its name would lead out of `out`.
    """
    path = PurePosixPath(name)
    is_plain = (
        name
        and not path.is_absolute()
        and not {"..", ".", PARTIAL} & set(path.parts)
        and not any(char in name for char in '\\:\0"')
        and str(path) == name
    )
    target = out / path
    # A link inside the folder could still lead out of it.
    if not is_plain or not target.parent.resolve().is_relative_to(out.resolve()) or target.is_symlink():
        raise BadInputError(f"the artifact names a file {name!r}, which would be written outside {out}; nothing was")
    return target


def part_name(file: ArtifactFile) -> str:
    """Return what an unfinished file is called.

    By content, so that a part of another version is never continued; and by name, since two files may be equal.
    """
    return f"{file.sha256[:32]}-{hashlib.sha256(file.name.encode()).hexdigest()[:16]}.part"


def _in_parallel(
    transfer: "_Transfer",
    http: httpx.Client,
    files: Iterable[ArtifactFile],
    targets: dict[str, Path],
    out: Path,
    parallel: int,
) -> None:
    with ThreadPoolExecutor(max_workers=parallel) as pool:
        futures = [pool.submit(transfer.fetch, http, file, targets[file.name], out / PARTIAL) for file in files]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        finally:
            # After an error or Ctrl-C: what runs stops at its next chunk, what waits never starts.
            transfer.is_stopped.set()
            for future in futures:
                future.cancel()
    transfer.is_stopped.clear()


class _Transfer:
    """The state that parallel downloads share."""

    def __init__(
        self, read_artifact: Callable[[], Artifact], artifact: Artifact, on_bytes: Callable[[int, int], None] | None
    ) -> None:
        self._read_artifact = read_artifact
        self._urls = {file.name: file.url for file in artifact.files}
        self._total = artifact.size_bytes
        self._on_bytes = on_bytes
        self._lock = threading.Lock()
        self._present = 0
        self.fetched_bytes = 0
        self.is_stopped = threading.Event()

    def fetch(self, http: httpx.Client, file: ArtifactFile, target: Path, folder: Path) -> None:
        """Bring one file into place, unless it is there."""
        if target.is_file() and target.stat().st_size == file.size_bytes and _sha256(target) == file.sha256:
            self._count(file.size_bytes, is_fetched=False)
            return
        part = folder / part_name(file)
        for attempt in range(1, _TRIES + 1):
            if self.is_stopped.is_set():
                return
            try:
                self._continue(http, file, part)
            except httpx.HTTPError as error:
                if attempt == _TRIES:
                    reason = str(error) or type(error).__name__
                    raise UnavailableError(f"the object store does not answer for {file.name}: {reason}") from error
                self.is_stopped.wait(0.5 * attempt)
            else:
                if self.is_stopped.is_set():
                    return
                if part.stat().st_size == file.size_bytes and _sha256(part) == file.sha256:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    part.replace(target)
                    return
                self._count(-part.stat().st_size, is_fetched=False)
                part.unlink()
        raise DownloadError(f"{file.name} does not match its sha256 after {_TRIES} downloads; nothing was kept of it")

    def _continue(self, http: httpx.Client, file: ArtifactFile, part: Path) -> None:
        """Append what is missing to the part, once."""
        start = part.stat().st_size if part.exists() else 0
        if start >= file.size_bytes:
            start = _restart(part) if start > file.size_bytes else start
            if start == file.size_bytes:
                part.touch()
                return
        headers = {"Range": f"bytes={start}-"} if start else {}
        with http.stream("GET", self._urls[file.name], headers=headers) as answer:
            if answer.status_code == httpx.codes.FORBIDDEN:
                self._renew_links()
                raise httpx.HTTPStatusError("the link has expired", request=answer.request, response=answer)
            if answer.status_code == _RANGE_NOT_SATISFIABLE:
                _restart(part)
            answer.raise_for_status()
            if start and answer.status_code != httpx.codes.PARTIAL_CONTENT:
                start = _restart(part)
            self._append(answer, file, part, start)

    def _append(self, answer: httpx.Response, file: ArtifactFile, part: Path, start: int) -> None:
        self._count(start, is_fetched=False)
        size = start
        try:
            with part.open("ab") as stream:
                for chunk in answer.iter_bytes(_CHUNK):
                    size += len(chunk)
                    if size > file.size_bytes:
                        raise DownloadError(f"the server sends more of {file.name} than its {file.size_bytes} bytes")
                    stream.write(chunk)
                    self._count(len(chunk), is_fetched=True)
                    if self.is_stopped.is_set():
                        return
        except httpx.HTTPError:
            self._count(-size, is_fetched=False)
            raise

    def _renew_links(self) -> None:
        with self._lock:
            self._urls = {file.name: file.url for file in self._read_artifact().files}

    def _count(self, size: int, *, is_fetched: bool) -> None:
        with self._lock:
            self._present += size
            self.fetched_bytes += size if is_fetched else 0
            if self._on_bytes is not None:
                self._on_bytes(self._present, self._total)


def _restart(part: Path) -> int:
    part.unlink(missing_ok=True)
    return 0


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
