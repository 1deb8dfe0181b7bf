"""Engines and transactions. Everything that differs between SQLite and PostgreSQL is in this file."""

import fcntl
import functools
import json
import math
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    BigInteger,
    ColumnElement,
    Connection,
    Dialect,
    Engine,
    Table,
    create_engine,
    event,
    literal_column,
    make_url,
    text,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    InterfaceError,
    InvalidatePoolError,
    NoSuchModuleError,
    OperationalError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import ConnectionPoolEntry

from infra.errors import DatabaseUnusable, DiskFull, InfraError, SettingsError, TransientError
from infra.metrics import DATABASE_ERRORS

_BUSY_TIMEOUT_S = 30
_CONNECT_TIMEOUT_S = 5
_LOCK_TIMEOUT_MS = 20_000
"""Less than the 30 s after which clients give up, so that they are told why."""
_MIGRATION_LOCK = 7_308_900_461  # any constant that no other program on the server uses as an advisory lock
_WRITES = "duquant_writes"
_USED_AT = "duquant_used_at"
_PING_AFTER_S = 1.0
_BUSY_PAUSE_S = 0.0001
_MOST_THREADS = 40
"""Of one process that work on the database at the same time: as many as the API answers in."""
_LINE = "duquant_line"
_TURN = "duquant_turn"
_HAS_TURN = "duquant_has_turn"
_PRIMARY_CODE = 0xFF
"""The part of a SQLite error code that says what kind of error it is."""
_joined: ContextVar[Connection | None] = ContextVar("duquant_transaction", default=None)


def make_engine(url: str, *, plan_once: bool = False) -> Engine:
    """Return an engine for a SQLite file or a PostgreSQL server. Connects lazily, so it never fails on a dead server.

    Args:
        url: The database.
        plan_once: PostgreSQL keeps one plan for each statement, whatever its parameters. For processes that run few
            statements often, such as the claim, whose planning costs more than its run; not for lists with filters.

    Raises:
        SettingsError: the URL is malformed or names another database.
        DatabaseUnusable: the folder of the SQLite file cannot be made.
    """
    try:
        parsed = make_url(url)
        backend = parsed.get_backend_name()
    except (ArgumentError, NoSuchModuleError):
        # The URL itself may hold a password.
        raise SettingsError("DUQUANT_DATABASE_URL is not a database URL such as sqlite:///file.db") from None
    if backend == "sqlite":
        return _make_sqlite_engine(parsed)
    if backend == "postgresql":
        engine = create_engine(
            parsed.set(drivername="postgresql+psycopg"),
            hide_parameters=True,
            json_serializer=_to_json,
            connect_args={
                "connect_timeout": _CONNECT_TIMEOUT_S,
                "application_name": "duquant",
                # A writer that stops in mid-transaction must not hold its row locks for ever.
                # And whoever waits for them must not hold a thread and a connection for as long as that lasts.
                "options": f"-c idle_in_transaction_session_timeout=60000 -c lock_timeout={_LOCK_TIMEOUT_MS}"
                + (" -c plan_cache_mode=force_generic_plan" if plan_once else ""),
            },
        )
        event.listen(engine, "checkin", _note_use)
        event.listen(engine, "checkout", functools.partial(_ping_if_idle, engine.dialect))
        return engine
    raise SettingsError(f"DUQUANT_DATABASE_URL names a {backend} database; only sqlite and postgresql are supported")


def _note_use(_connection: Any, record: ConnectionPoolEntry) -> None:
    record.info[_USED_AT] = time.monotonic()


def _ping_if_idle(dialect: Dialect, connection: Any, record: ConnectionPoolEntry, _proxy: object) -> None:
    """Ask a connection that has lain idle whether it still lives; one that was just in use needs no round trip."""
    if time.monotonic() - record.info.get(_USED_AT, math.inf) < _PING_AFTER_S:
        return
    try:
        dialect.do_ping(connection)
    except dialect.loaded_dbapi.Error as error:
        # The pool then drops all of them and tries with a fresh one.
        raise InvalidatePoolError from error


# PostgreSQL refuses NaN in JSON and SQLite keeps it: refuse it here, so that both behave the same.
_to_json = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


def _make_sqlite_engine(url: URL) -> Engine:
    if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        raise SettingsError("DUQUANT_DATABASE_URL needs a plain file path: in-memory databases have only one user")
    folder = Path(url.database).expanduser().resolve().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatabaseUnusable(f"cannot make the database's folder {folder}: {error.strerror}") from error
    engine = create_engine(
        url.set(database=str(folder / Path(url.database).name)),
        hide_parameters=True,
        json_serializer=_to_json,
        connect_args={"timeout": _BUSY_TIMEOUT_S, "check_same_thread": False},
        # Writers that stand in line hold a connection each, and readers must not wait behind them.
        max_overflow=_MOST_THREADS,
        # What a connection has read of the file is good until another one writes: use the one that wrote last.
        pool_use_lifo=True,
    )
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "connect", functools.partial(_open_line, f"{engine.url.database}-line", threading.Lock()))
    event.listen(engine, "close", _close_line)
    event.listen(engine, "checkin", _end_turn)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: object) -> None:
    # The driver must not begin transactions by itself: it would begin them DEFERRED.
    connection.isolation_level = None
    cursor = connection.cursor()
    try:
        cursor.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_S * 1000}")
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = NORMAL")
        cursor.execute("PRAGMA foreign_keys = ON")
    finally:
        cursor.close()


def _open_line(path: str, turn: threading.Lock, _connection: Any, record: ConnectionPoolEntry) -> None:
    record.info[_TURN] = turn
    # A file of its own: closing any handle of the database's file would give up SQLite's own locks on it.
    try:
        record.info[_LINE] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DatabaseUnusable(f"cannot open {path} beside the database: {error.strerror}") from error


def _close_line(_connection: Any, record: ConnectionPoolEntry) -> None:
    if (line := record.info.pop(_LINE, None)) is not None:
        os.close(line)


def _end_turn(_connection: Any, record: ConnectionPoolEntry) -> None:
    # Also of a connection that broke. By now its transaction has ended, one way or the other.
    if record.info.pop(_HAS_TURN, False):
        record.info[_TURN].release()


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and writes later fails at once when another writer came between, whatever the
    # time-out; one that takes the write lock at its start only waits.
    if connection.get_execution_options().get(_WRITES, False):
        _take_write_lock(connection)
    else:
        connection.exec_driver_sql("BEGIN")


def _take_write_lock(connection: Connection) -> None:
    """Begin a writing transaction when nobody else writes.

    SQLite's own wait sleeps longer and longer, up to 100 ms, while whoever asks often is served: under load one process
    starves, and the file lies idle between two sleeps. So the writers of a process take turns, and the first of each
    process stands in line at a lock file, for which the kernel wakes it; only the first of all asks SQLite, often. It
    leaves the line when it has the transaction: a crash cannot block it, and programs that do not stand in line only
    make it wait a little.
    """
    raw = connection.connection.dbapi_connection
    assert raw is not None
    info = connection.connection.info
    deadline = time.monotonic() + _BUSY_TIMEOUT_S
    if not info[_TURN].acquire(timeout=_BUSY_TIMEOUT_S):
        raise OperationalError("BEGIN IMMEDIATE", None, sqlite3.OperationalError("database is locked"))
    info[_HAS_TURN] = True
    line = info[_LINE]
    fcntl.flock(line, fcntl.LOCK_EX)
    try:
        raw.execute("PRAGMA busy_timeout = 0")
        while True:
            try:
                raw.execute("BEGIN IMMEDIATE")
                break
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & _PRIMARY_CODE != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise OperationalError("BEGIN IMMEDIATE", None, error) from error
            time.sleep(_BUSY_PAUSE_S)
    finally:
        fcntl.flock(line, fcntl.LOCK_UN)
        raw.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_S * 1000}")


@contextmanager
def read(engine: Engine) -> Iterator[Connection]:
    """A read-only transaction; errors of the database come out as ours."""
    if (outer := _outer(engine)) is not None:
        yield outer
        return
    with _translated(engine), engine.connect() as connection, connection.begin():
        yield connection


@contextmanager
def write(engine: Engine, *, savepoint: bool = True) -> Iterator[Connection]:
    """A transaction that may write; it commits at the end of the block and rolls back on any exception.

    Args:
        engine: The database.
        savepoint: Inside `transaction`, undo what the block did if it raises, so that the caller may go on. Two
            statements more; a block that raises before it has written anything, or never, does without.
    """
    if (outer := _outer(engine)) is not None:
        with _translated(engine), outer.begin_nested() if savepoint else nullcontext():
            yield outer
        return
    with _translated(engine), engine.connect() as connection:
        connection.execution_options(**{_WRITES: True})
        with connection.begin():
            yield connection


@contextmanager
def alone(engine: Engine) -> Iterator[Connection]:
    """A connection on which each statement is a transaction of its own, unless this thread is in one already."""
    if (outer := _outer(engine)) is not None:
        with _translated(engine):
            yield outer
        return
    with _translated(engine), engine.connect() as connection:
        yield connection.execution_options(isolation_level="AUTOCOMMIT")


@contextmanager
def transaction(engine: Engine) -> Iterator[None]:
    """One transaction around several calls of the stores: what they do inside, in this thread, commits as a whole.

    Their own `write` blocks become savepoints unless they do without: a store that catches an error may go on.
    """
    with write(engine) as connection:
        token = _joined.set(connection)
        try:
            yield
        finally:
            _joined.reset(token)


def _outer(engine: Engine) -> Connection | None:
    connection = _joined.get()
    # The engine of a connection may be a copy with other options; the pool is what both share.
    return connection if connection is not None and connection.engine.pool is engine.pool else None


@contextmanager
def migration_lock(engine: Engine) -> Iterator[Connection]:
    """A writing transaction that only one process at a time can hold, for schema changes."""
    with write(engine) as connection:
        if engine.dialect.name == "postgresql":
            # SQLite's BEGIN IMMEDIATE is such a lock already. A migration takes as long as it takes.
            connection.execute(text("SET LOCAL lock_timeout = 0"))
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
        yield connection


def writes_at_once(dialect: Dialect) -> bool:
    """Whether one statement can change several tables (data-modifying WITH), which saves round trips."""
    return dialect.name == "postgresql"


def take_turns(connection: Connection, name: str) -> None:
    """Wait for the other transactions that take turns under this name, and hold them up until this one ends.

    A lock on the row that the name is of would also stop those that only write to it.
    """
    if connection.dialect.name == "postgresql":
        # SQLite has only one writing transaction at a time.
        connection.execute(text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))"), {"name": name})


def insert_if_new(connection: Connection, table: Table, **values: Any) -> bool:
    """Insert a row unless one with the same unique columns is there; return whether it was inserted."""
    # Not by the row count: with RETURNING, which SQLAlchemy adds for numbered rows, PostgreSQL's says nothing.
    statement = insert_new(connection.dialect, table).values(**values).returning(*table.primary_key)
    return connection.execute(statement).first() is not None


def insert_new(dialect: Dialect, table: Table) -> postgresql.Insert | sqlite.Insert:
    """An insert that does nothing, and returns nothing, where a row with the same unique columns is there."""
    if dialect.name == "postgresql":
        return postgresql.insert(table).on_conflict_do_nothing()
    return sqlite.insert(table).on_conflict_do_nothing()


def now_ms(dialect: Dialect) -> ColumnElement[int]:
    """The database's clock in milliseconds, as SQL: it is read when the statement runs, not when it is built."""
    if dialect.name == "postgresql":
        # clock_timestamp moves inside a transaction, now() would not: a statement that waited for a lock must see it.
        return literal_column("CAST(floor(extract(epoch FROM clock_timestamp()) * 1000) AS BIGINT)", BigInteger)
    # unixepoch('subsec') would say it shorter, but needs SQLite 3.42.
    return literal_column("CAST(round((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER)", BigInteger)


@contextmanager
def _translated(engine: Engine) -> Iterator[None]:
    try:
        yield
    except IntegrityError:
        raise  # callers know which constraint they may hit
    except PoolTimeout as error:
        DATABASE_ERRORS.labels("unavailable").inc()
        where = engine.url.render_as_string(hide_password=True)
        raise TransientError(f"all connections to the database {where} are in use", database=where) from error
    except DBAPIError as error:
        translated = _translate(engine.url, error)
        DATABASE_ERRORS.labels("unavailable" if isinstance(translated, TransientError) else "unusable").inc()
        raise translated from error


def _translate(url: URL, error: DBAPIError) -> InfraError:
    """Say what is wrong with which database, without the password."""
    cause = str(error.orig).strip().splitlines()[0] if str(error.orig).strip() else type(error.orig).__name__
    if url.password:
        cause = cause.replace(str(url.password), "***")
    where = url.render_as_string(hide_password=True)
    if url.get_backend_name() == "sqlite":
        return _translate_sqlite(where, cause)
    if any(word in cause for word in ("authentication failed", "does not exist", "permission denied")):
        return DatabaseUnusable(f"the database {where} refuses us: {cause}", database=where)
    if "No space left on device" in cause:
        return DiskFull(f"the disk of the database {where} is full: {cause}", database=where)
    if isinstance(error, OperationalError | InterfaceError) or error.connection_invalidated:
        return TransientError(f"the database {where} does not answer: {cause}", database=where)
    return DatabaseUnusable(f"the database {where} failed: {cause}", database=where)


def _translate_sqlite(where: str, cause: str) -> InfraError:
    if "locked" in cause or "busy" in cause:
        return TransientError(f"the database {where} is busy: {cause}", database=where)
    if "full" in cause:
        return DiskFull(f"the disk of the database {where} is full: {cause}", database=where)
    if "disk I/O error" in cause:
        return TransientError(f"the disk of the database {where} is failing: {cause}", database=where)
    if "readonly" in cause or "unable to open" in cause:
        return DatabaseUnusable(f"the database {where} cannot be written: {cause}", database=where)
    return DatabaseUnusable(f"the database {where} failed: {cause}", database=where)
