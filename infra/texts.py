"""Calibration and evaluation texts: what tells a changed one from an unchanged one, and those that projects upload."""

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, Engine, Text, cast, delete, func, insert, select, tuple_

from infra import audit
from infra.artifact_keys import TEXTS, require_inside, text_key, text_keys_in
from infra.database import now_ms, read, take_turns, write
from infra.errors import InfraError, PathForbidden, QuotaExceeded, TextConflict, TextNotFound
from infra.ids import new_id
from infra.job_model import ACTIVE, Record
from infra.job_quotas import require_bytes
from infra.job_rows import state_is
from infra.schema import jobs, texts
from infra.storage import ObjectInfo, ObjectStore, file_sha256

_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_LONGEST_KEY = 1000

MAX_TEXTS = 200
"""Texts of one tenant."""


def file_identity(path: Path) -> str:
    """Return the identity of a text file: its size and its time of change."""
    status = path.stat()
    return f"{status.st_size}:{status.st_mtime_ns}"


def object_identity(info: ObjectInfo) -> str:
    """Return the identity of a text object: its hash, or its size for objects that others have put without one."""
    return info.sha256 or f"size:{info.size_bytes}"


def require_hub_name(name: str) -> None:
    """Raise PathForbidden unless a name is a repository of the hub: the library would also read folders and URLs."""
    if not _HUB_NAME.fullmatch(name) or ".." in name:
        raise PathForbidden("a data set of the hub is named OWNER/NAME", name=name)


def require_own_key(name: str, tenant_id: str) -> None:
    """Raise PathForbidden unless a name is the key of a text object of this tenant."""
    prefix = f"texts/{tenant_id}/"
    try:
        require_inside(name, prefix)
    except InfraError as error:
        raise PathForbidden(f"text objects of this project start with {prefix}", name=name) from error
    if len(name.encode(errors="replace")) > _LONGEST_KEY or not name.isprintable():
        raise PathForbidden("no text object has such a name", name=name[:80])


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredText(Record):
    """A text that a tenant has uploaded."""

    id: str
    tenant_id: str
    name: str
    key: str
    """The object: what a job names as its source."""
    sha256: str
    size_bytes: int
    created_at: int


class TextStore:
    """The texts of all tenants: rows here, bytes in object storage under keys that are built from ids."""

    def __init__(self, engine: Engine, storage: ObjectStore) -> None:
        self._engine = engine
        self._storage = storage

    def add(self, tenant_id: str, name: str, path: Path, *, suffix: str, actor: str) -> tuple[StoredText, bool]:
        """Store a file; return its text, and whether it is new: the same bytes under the same name are stored once.

        The object is put before its row is written, so a row never names what is not there. What a crash in between
        leaves behind is for the collector.

        Raises:
            QuotaExceeded: the tenant has as many, or as many bytes, as it may have.
            InfraError: the object store does not work.
        """
        sha256, size = file_sha256(path)
        with read(self._engine) as connection:
            if (known := self._known(connection, tenant_id, name, sha256, suffix)) is not None:
                return known, False
            _require_room(connection, tenant_id, size)
        text_id = new_id("text")
        key = text_key(tenant_id, text_id, suffix)
        self._storage.put_file(key, path)
        try:
            with write(self._engine) as connection:
                # Two uploads at once take their turns here.
                take_turns(connection, f"texts of {tenant_id}")
                known = self._known(connection, tenant_id, name, sha256, suffix)
                if known is None:
                    _require_room(connection, tenant_id, size)
                    values = {"id": text_id, "tenant_id": tenant_id, "name": name, "key": key, "sha256": sha256}
                    statement = insert(texts).values(size_bytes=size, created_at=now_ms(self._engine.dialect), **values)
                    stored = StoredText.from_row(connection.execute(statement.returning(texts)).mappings().one())
                    _audit(connection, stored, actor, "text.uploaded")
                    return stored, True
        except BaseException:
            self._storage.delete(key)
            raise
        self._storage.delete(key)
        return known, False

    def _known(self, connection: Connection, tenant_id: str, name: str, sha256: str, suffix: str) -> StoredText | None:
        query = select(texts).where(texts.c.tenant_id == tenant_id, texts.c.name == name, texts.c.sha256 == sha256)
        row = connection.execute(query.where(texts.c.key.endswith(suffix)).limit(1)).mappings().first()
        return None if row is None else StoredText.from_row(row)

    def get(self, text_id: str, tenant_id: str) -> StoredText:
        """Return one text.

        Raises:
            TextNotFound: no such text, or it is another tenant's.
        """
        with read(self._engine) as connection:
            return _one(connection, text_id, tenant_id)

    def page(self, tenant_id: str, *, limit: int, before: tuple[int, str] | None = None) -> Sequence[StoredText]:
        """Return a tenant's texts, newest first; `before` is (created_at, id) of the last one on the page before."""
        query = select(texts).where(texts.c.tenant_id == tenant_id)
        if before is not None:
            query = query.where(tuple_(texts.c.created_at, texts.c.id) < tuple_(*before))
        query = query.order_by(texts.c.created_at.desc(), texts.c.id.desc()).limit(limit)
        with read(self._engine) as connection:
            return [StoredText.from_row(row) for row in connection.execute(query).mappings()]

    def delete(self, text_id: str, tenant_id: str, *, actor: str) -> None:
        """Delete a text with its object.

        Raises:
            TextNotFound: no such text, or it is another tenant's.
            TextConflict: a job that has not ended reads it.
        """
        with write(self._engine) as connection:
            text = _one(connection, text_id, tenant_id)
            if (reader := _reader(connection, text)) is not None:
                raise TextConflict(f"{reader} reads {text.id} and has not ended", text_id=text.id)
            connection.execute(delete(texts).where(texts.c.id == text.id))
            _audit(connection, text, actor, "text.deleted")
        # After the row: what is left behind by a crash in between is an object that nothing names, for the collector.
        self._storage.delete(text.key)


def needed_texts(connection: Connection, keys: Sequence[str]) -> Container[str]:
    """Return which of these objects somebody needs: a text's row, or a job that has not ended, names them."""
    named = set(connection.execute(select(texts.c.key).where(texts.c.key.in_(keys))).scalars())
    if named.issuperset(keys):
        return named
    spec = cast(jobs.c.spec, Text)
    # finished_at says the same as the states, and is what the partial index is about.
    unfinished = select(spec).where(jobs.c.finished_at.is_(None), spec.contains(TEXTS, autoescape=True))
    return named.union(*(text_keys_in(each) for each in connection.execute(unfinished).scalars()))


def _reader(connection: Connection, text: StoredText) -> str | None:
    """Return a job that has not ended and reads the text, if there is one."""
    # Calibration, evaluation, its tasks, a quality gate: a key has an id in it, and stands nowhere by chance.
    query = (
        select(jobs.c.id)
        .where(jobs.c.tenant_id == text.tenant_id, jobs.c.finished_at.is_(None), state_is(*ACTIVE))
        .where(cast(jobs.c.spec, Text).contains(text.key, autoescape=True))
        .limit(1)
    )
    found: str | None = connection.execute(query).scalar_one_or_none()
    return found


def _require_room(connection: Connection, tenant_id: str, size: int) -> None:
    used = connection.execute(select(func.count()).where(texts.c.tenant_id == tenant_id)).scalar_one()
    if used >= MAX_TEXTS:
        raise QuotaExceeded(f"a project has at most {MAX_TEXTS} texts", quota="texts", limit=MAX_TEXTS, used=used)
    require_bytes(connection, tenant_id, size)


def _one(connection: Connection, text_id: str, tenant_id: str) -> StoredText:
    query = select(texts).where(texts.c.id == text_id, texts.c.tenant_id == tenant_id)
    row = connection.execute(query).mappings().first()
    if row is None:
        raise TextNotFound(f"no text {text_id}", text_id=text_id)
    return StoredText.from_row(row)


def _audit(connection: Connection, text: StoredText, actor: str, action: str) -> None:
    data = {"name": text.name, "sha256": text.sha256, "size_bytes": text.size_bytes}
    audit.record(connection, tenant_id=text.tenant_id, actor=actor, action=action, target=text.id, data=data)
