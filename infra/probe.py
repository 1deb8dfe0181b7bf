"""Whether the database can be written. It may refuse that and still read: its disk is full, or it is a standby."""

import shutil
from pathlib import Path

from sqlalchemy import Engine, text, update

from infra.database import insert_if_new, now_ms, read, write
from infra.errors import DiskFull
from infra.schema import probes

_LEAST_FREE_BYTES = 16 << 20
_ROW = "readyz"
_LONGEST_MS = 3000


def check_database(engine: Engine) -> None:
    """Raise unless the database works, within seconds.

    Raises:
        DiskFull: there is no room on its disk.
        InfraError: it does not answer, or cannot be written.
    """
    if engine.dialect.name == "sqlite":
        _check_file(engine)
        return
    with write(engine) as connection:
        # A probe must not wait for anybody.
        connection.execute(text(f"SET LOCAL statement_timeout = {_LONGEST_MS}"))
        insert_if_new(connection, probes, name=_ROW, at=0)
        connection.execute(update(probes).where(probes.c.name == _ROW).values(at=now_ms(engine.dialect)))


def _check_file(engine: Engine) -> None:
    """A write would wait for other writers, and may find room in the journal when there is none for the next."""
    with read(engine) as connection:
        connection.execute(text("SELECT count(*) FROM probes"))
    assert engine.url.database is not None
    folder = Path(engine.url.database).parent
    free = shutil.disk_usage(folder).free
    if free < _LEAST_FREE_BYTES:
        raise DiskFull(f"the disk of {folder} is full: {free >> 20} MiB are free", path=str(folder))
