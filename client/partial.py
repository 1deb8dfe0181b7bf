"""A file on its way: its pieces arrive in any order, and what has arrived outlives the process."""

import hashlib
import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from client.models import ArtifactFile

PIECE_BYTES = 32 << 20


@dataclass(frozen=True)
class Piece:
    """The bytes `start` to `end`, without the last, of one file."""

    index: int
    start: int
    end: int


def part_name(file: ArtifactFile) -> str:
    """Return what an unfinished file is called.

    By content, so that a part of another version is never continued; and by name, since two files may be equal.
    """
    return f"{file.sha256[:32]}-{hashlib.sha256(file.name.encode()).hexdigest()[:16]}.part"


class PartialFile:
    """An unfinished file and a journal of its finished pieces. Threads may write different pieces at once.

    Without a journal the file is a prefix: a small file, which is one piece, or one that was fetched in one go.
    """

    def __init__(self, folder: Path, file: ArtifactFile, piece_bytes: int) -> None:
        self.path = folder / part_name(file)
        self._journal = self.path.with_suffix(".pieces")
        self._size = file.size_bytes
        self._sha256 = file.sha256
        self._lock = threading.Lock()
        starts = range(0, max(file.size_bytes, 1), piece_bytes)
        self.pieces = [
            Piece(index, start, min(start + piece_bytes, file.size_bytes)) for index, start in enumerate(starts)
        ]
        self._done = self._read(piece_bytes)
        self._piece_bytes = piece_bytes

    def _read(self, piece_bytes: int) -> set[int]:
        present = self.path.stat().st_size if self.path.exists() else 0
        try:
            values = json.loads(self._journal.read_text(encoding="utf-8"))
            is_good = values["piece_bytes"] == piece_bytes and present == self._size
            return {index for index in values["done"] if 0 <= index < len(self.pieces)} if is_good else set()
        except FileNotFoundError:
            return {piece.index for piece in self.pieces if present and piece.end <= present}
        except (ValueError, KeyError, TypeError):
            return set()

    @property
    def is_single(self) -> bool:
        """Whether the file is one piece; then its length says how much of it is there."""
        return len(self.pieces) == 1

    def present(self, piece: Piece) -> int:
        """Return how many bytes of a piece are there."""
        if piece.index in self._done:
            return piece.end - piece.start
        return self.path.stat().st_size if self.is_single and self.path.exists() else 0

    def missing(self) -> list[Piece]:
        """Return the pieces that are not whole; make room for them."""
        if not self.is_single:
            with self.path.open("ab") as stream:
                stream.truncate(self._size)
            self._write_journal()
        return [piece for piece in self.pieces if piece.index not in self._done]

    def write(self, offset: int, data: bytes) -> None:
        """Put bytes in their place."""
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            view = memoryview(data)
            while view:
                written = os.pwrite(descriptor, view, offset)
                view, offset = view[written:], offset + written
        finally:
            os.close(descriptor)

    def finish(self, piece: Piece) -> bool:
        """Record that a piece is there; return whether it was the last that was missing."""
        with self._lock:
            self._done.add(piece.index)
            if not self.is_single:
                self._write_journal()
            return len(self._done) == len(self.pieces)

    def is_intact(self) -> bool:
        """Tell whether the file has the size and the hash that it should have."""
        if self._size == 0:
            self.path.touch()
        return self.path.stat().st_size == self._size and sha256_of(self.path) == self._sha256

    def start_again(self) -> None:
        """Forget everything that has arrived."""
        self.path.unlink(missing_ok=True)
        self._journal.unlink(missing_ok=True)
        self._done.clear()

    def move_to(self, target: Path) -> None:
        """Give the whole file its name."""
        target.parent.mkdir(parents=True, exist_ok=True)
        self.path.replace(target)
        self._journal.unlink(missing_ok=True)

    def _write_journal(self) -> None:
        fresh = self._journal.with_suffix(".new")
        fresh.write_text(json.dumps({"piece_bytes": self._piece_bytes, "done": sorted(self._done)}), encoding="utf-8")
        fresh.replace(self._journal)


def sha256_of(path: Path) -> str:
    """Return the hex SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
