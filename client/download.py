"""Fetches an artifact's files: in pieces and in parallel, continued after a break, each verified before it is named."""

import errno
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TypeVar

import httpx

from client.errors import BadInputError, ClientError, DownloadError, UnavailableError
from client.models import Artifact, ArtifactFile
from client.partial import PIECE_BYTES, PartialFile, Piece, sha256_of
from client.target import MANIFEST, PARTIAL, TargetFolder

_CHUNK = 1 << 20
_TRIES = 4

_T = TypeVar("_T")


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
    piece_bytes: int = PIECE_BYTES,
) -> PullSummary:
    """Fetch what `read_artifact` lists; it is called again when the links have expired.

    The manifest comes last, and goes first when files must change, so a folder that has one is whole.

    Raises:
        BadInputError: the folder cannot be written, holds something else, or is being filled by another pull.
        DownloadError: a file does not arrive as the service describes it.
        UnavailableError: the object store does not answer.
    """
    for _ in range(_TRIES):
        try:
            return _pull(read_artifact, read_artifact(), out, parallel, on_bytes, piece_bytes)
        except _ArtifactChanged:
            # It was measured meanwhile: another card, and the links of the old one end some day.
            continue
    raise DownloadError("the artifact's model card changes faster than it can be fetched; pull again later")


def _pull(
    read_artifact: Callable[[], Artifact],
    artifact: Artifact,
    out: Path,
    parallel: int,
    on_bytes: Callable[[int, int], None] | None,
    piece_bytes: int,
) -> PullSummary:
    targets = {file.name: safe_target(out, file.name) for file in artifact.files}
    folder = TargetFolder(out, artifact)
    folder.begin()
    try:
        with httpx.Client(timeout=httpx.Timeout(60.0, connect=10.0), follow_redirects=False) as http:
            transfer = _Transfer(http, read_artifact, artifact, on_bytes)
            files = [
                _File(file, targets[file.name], PartialFile(folder.partial, file, piece_bytes), transfer)
                for file in artifact.files
            ]
            others = [file for file in files if file.facts.name != MANIFEST]
            _fetch_all(others, transfer, parallel, before=folder.set_manifest_aside)
            _fetch_all([file for file in files if file.facts.name == MANIFEST], transfer, 1)
        folder.end()
    except OSError as error:
        full = " (the disk is full)" if error.errno == errno.ENOSPC else ""
        raise ClientError(f"cannot write to {out}: {error.strerror}{full}; pull again to go on") from error
    finally:
        folder.release()
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


def _fetch_all(
    files: Iterable["_File"], transfer: "_Transfer", parallel: int, before: Callable[[], None] | None = None
) -> None:
    """Look which pieces are missing, then fetch them, with `parallel` connections; call `before` if any are."""
    with ThreadPoolExecutor(max_workers=parallel) as pool:
        found = _all(transfer, [pool.submit(file.look) for file in files])
        if before is not None and any(found):
            before()
        _all(transfer, [pool.submit(work) for missing in found for work in missing])


def _all(transfer: "_Transfer", futures: list[Future[_T]]) -> list[_T]:
    try:
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    except BaseException:
        # After an error or Ctrl-C: what runs stops at its next chunk, what waits never starts.
        transfer.is_stopped.set()
        for future in futures:
            future.cancel()
        raise
    return [future.result() for future in futures]


class _ArtifactChanged(Exception):  # noqa: N818  # no error: it is fetched as it is now
    """The artifact has another model card than when its files were listed."""


class _Transfer:
    """What all downloads share: the connections, the links and the count of bytes."""

    def __init__(
        self,
        http: httpx.Client,
        read_artifact: Callable[[], Artifact],
        artifact: Artifact,
        on_bytes: Callable[[int, int], None] | None,
    ) -> None:
        self.http = http
        self._read_artifact = read_artifact
        self._urls = {file.name: file.url for file in artifact.files}
        self._hashes = {file.name: file.sha256 for file in artifact.files}
        self._total = artifact.size_bytes
        self._on_bytes = on_bytes
        self._lock = threading.Lock()
        self._present = 0
        self.fetched_bytes = 0
        self.is_stopped = threading.Event()

    def url(self, name: str) -> str:
        """Return the link to a file."""
        with self._lock:
            return self._urls[name]

    def renew_links(self, stale: str, name: str) -> None:
        """Ask for new links, unless another thread has done so since `stale` was read.

        Raises:
            _ArtifactChanged: the links lead to other files than those that are being fetched.
        """
        with self._lock:
            if self._urls[name] == stale:
                files = self._read_artifact().files
                if {file.name: file.sha256 for file in files} != self._hashes:
                    raise _ArtifactChanged
                self._urls = {file.name: file.url for file in files}

    def count(self, size: int, *, is_fetched: bool) -> None:
        """Add to the bytes that are here."""
        with self._lock:
            self._present += size
            self.fetched_bytes += size if is_fetched else 0
            if self._on_bytes is not None:
                self._on_bytes(self._present, self._total)


class _File:
    """One file of the artifact."""

    def __init__(self, facts: ArtifactFile, target: Path, part: PartialFile, transfer: _Transfer) -> None:
        self.facts = facts
        self._target = target
        self._part = part
        self._transfer = transfer

    def look(self) -> list[Callable[[], None]]:
        """Return the work that is left: nothing when the file is there and right."""
        target, facts = self._target, self.facts
        if target.is_file() and target.stat().st_size == facts.size_bytes and sha256_of(target) == facts.sha256:
            self._transfer.count(facts.size_bytes, is_fetched=False)
            return []
        missing = self._part.missing()
        for piece in self._part.pieces:
            if piece not in missing:
                self._transfer.count(piece.end - piece.start, is_fetched=False)
        if not missing:
            return [self._conclude]
        return [partial(self._bring, piece) for piece in missing]

    def _bring(self, piece: Piece) -> None:
        if self._fetch(piece) and self._part.finish(piece):
            self._conclude()

    def _conclude(self) -> None:
        """Name the file if its bytes are right, else fetch it anew."""
        for _ in range(_TRIES - 1):
            if self._part.is_intact():
                self._part.move_to(self._target)
                return
            self._transfer.count(-self.facts.size_bytes, is_fetched=False)
            self._part.start_again()
            for piece in self._part.missing():
                if not self._fetch(piece):
                    return
                self._part.finish(piece)
        if self._part.is_intact():
            self._part.move_to(self._target)
            return
        self._part.start_again()
        name = self.facts.name
        raise DownloadError(f"{name} does not match its sha256 after {_TRIES} downloads; nothing was kept of it")

    def _fetch(self, piece: Piece) -> bool:
        """Bring one piece, however often the connection breaks; return False when told to stop."""
        have = self._part.present(piece)
        self._transfer.count(have, is_fetched=False)
        position = piece.start + have
        for attempt in range(1, _TRIES + 1):
            try:
                for data in self._stream(position, piece.end):
                    self._part.write(position, data)
                    position += len(data)
                    self._transfer.count(len(data), is_fetched=True)
                    if self._transfer.is_stopped.is_set():
                        return False
            except httpx.HTTPError as error:
                if attempt == _TRIES:
                    reason = str(error) or type(error).__name__
                    raise UnavailableError(
                        f"the object store does not answer for {self.facts.name}: {reason}"
                    ) from error
            else:
                if position == piece.end:
                    return True
            if self._transfer.is_stopped.wait(0.5 * attempt):
                return False
        raise DownloadError(f"{self.facts.name} ends before its {self.facts.size_bytes} bytes; pull again to go on")

    def _stream(self, start: int, end: int) -> Iterable[bytes]:
        """Yield the bytes from `start` to `end`."""
        if start == end:
            return
        url = self._transfer.url(self.facts.name)
        headers = {} if (start, end) == (0, self.facts.size_bytes) else {"Range": f"bytes={start}-{end - 1}"}
        with self._transfer.http.stream("GET", url, headers=headers) as answer:
            if answer.status_code in (httpx.codes.FORBIDDEN, httpx.codes.NOT_FOUND):
                self._transfer.renew_links(url, self.facts.name)
                raise httpx.HTTPStatusError("the link leads nowhere any more", request=answer.request, response=answer)
            answer.raise_for_status()
            # A server, or a proxy before it, that knows no ranges sends the whole file.
            skip = start if headers and answer.status_code != httpx.codes.PARTIAL_CONTENT else 0
            left = end - start
            for chunk in answer.iter_bytes(_CHUNK):
                data = chunk[skip:]
                skip = max(0, skip - len(chunk))
                if len(data) > left and not (headers and answer.status_code == httpx.codes.OK):
                    name, size = self.facts.name, self.facts.size_bytes
                    raise DownloadError(f"the server sends more of {name} than its {size} bytes")
                yield data[:left]
                left -= len(data[:left])
                if left == 0 and headers:
                    return
