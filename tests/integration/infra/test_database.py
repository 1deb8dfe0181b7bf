"""What a broken database says, and what SQLite is set to."""

import os
import socket
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, make_url, select, text

from infra.database import make_engine, now_ms, read, write
from infra.errors import DatabaseUnusable, SettingsError, TransientError
from infra.jobs import JobStore

PASSWORD = "canary-password-77"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_an_unreachable_server_is_transient_and_named_without_its_password() -> None:
    port = free_port()
    engine = make_engine(f"postgresql://alice:{PASSWORD}@127.0.0.1:{port}/duquant")
    with pytest.raises(TransientError, match=f"127.0.0.1:{port}") as caught:
        JobStore(engine).counts()
    assert PASSWORD not in str(caught.value)
    assert "\n" not in str(caught.value)
    engine.dispose()


def test_an_unknown_host_is_transient() -> None:
    engine = make_engine(f"postgresql://alice:{PASSWORD}@db.invalid/duquant")
    with pytest.raises(TransientError, match=r"db\.invalid") as caught:
        JobStore(engine).counts()
    assert PASSWORD not in str(caught.value)
    engine.dispose()


@pytest.mark.integration
def test_a_missing_database_is_not_worth_a_retry(postgres_server: str) -> None:
    url = make_url(postgres_server).set(database="missing").render_as_string(hide_password=False)
    engine = make_engine(url)
    with pytest.raises(DatabaseUnusable, match='"missing" does not exist'):
        JobStore(engine).counts()
    engine.dispose()


@pytest.mark.integration
def test_a_connection_that_the_server_closed_is_replaced(migrated_postgres_url: str) -> None:
    engine = make_engine(migrated_postgres_url)
    store = JobStore(engine)
    with pytest.raises(TransientError), read(engine) as connection:
        connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
    assert sum(store.counts().values()) == 0
    engine.dispose()


@pytest.mark.parametrize(
    "url", ["nonsense", "mysql://u:canary@h/d", "sqlite://", "sqlite:///:memory:", "sqlite:///file:x"]
)
def test_urls_of_no_use_are_refused_without_being_shown(url: str) -> None:
    with pytest.raises(SettingsError, match="DUQUANT_DATABASE_URL") as caught:
        make_engine(url)
    assert "canary" not in str(caught.value)


def test_the_folder_of_a_sqlite_file_is_made(tmp_path: Path) -> None:
    engine = make_engine(f"sqlite:///{tmp_path / 'a' / 'b' / 'x.db'}")
    assert (tmp_path / "a" / "b").is_dir()
    engine.dispose()
    (tmp_path / "file").write_text("")
    with pytest.raises(DatabaseUnusable, match="cannot make the database's folder"):
        make_engine(f"sqlite:///{tmp_path / 'file' / 'x.db'}")


def test_a_sqlite_path_that_is_a_folder_is_named(tmp_path: Path) -> None:
    engine = make_engine(f"sqlite:///{tmp_path}")
    with pytest.raises(DatabaseUnusable, match=f"{tmp_path} cannot be written"):
        JobStore(engine).counts()
    engine.dispose()


def test_a_read_only_sqlite_file_is_named(migrated_sqlite_url: str, desk_job) -> None:
    engine = make_engine(migrated_sqlite_url)
    with engine.connect() as connection:
        # To root no file is read-only; this gives the same error. The pool hands the connection out again.
        connection.exec_driver_sql("PRAGMA query_only = ON")
    with pytest.raises(DatabaseUnusable, match=r"duquant\.db cannot be written: attempt to write a readonly"):
        JobStore(engine).enqueue(desk_job, actor="tester")
    engine.dispose()


def test_a_full_disk_is_told_and_loses_nothing(migrated_sqlite_url: str, desk_job) -> None:
    engine = make_engine(migrated_sqlite_url)
    store = JobStore(engine)
    kept, _ = store.enqueue(desk_job, actor="tester")
    with engine.connect() as connection:
        # SQLite's own limit on its file gives the same error as a disk without room.
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    big = replace(desk_job, fingerprint="g", spec={"big": "x" * 1_000_000})
    with pytest.raises(TransientError, match=r"duquant\.db is full"):
        store.enqueue(big, actor="tester")
    assert store.list("default") == [kept]
    engine.dispose()


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_bytes(os.urandom(4096))
    engine = make_engine(f"sqlite:///{tmp_path / 'x.db'}")
    with pytest.raises(DatabaseUnusable, match="file is not a database"):
        JobStore(engine).counts()
    engine.dispose()


def test_sqlite_is_set_for_many_processes(migrated_sqlite_url: str) -> None:
    engine = make_engine(migrated_sqlite_url)
    with read(engine) as connection:
        values = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "busy_timeout", "foreign_keys")
        }
    assert values == {"journal_mode": "wal", "synchronous": 1, "busy_timeout": 30_000, "foreign_keys": 1}
    engine.dispose()


def test_sqlite_readers_do_not_wait_for_a_writer(migrated_sqlite_url: str) -> None:
    engine = make_engine(migrated_sqlite_url)
    with write(engine) as connection:
        connection.execute(text("UPDATE tenants SET name = 'half done'"))
        with read(engine) as reader:
            assert reader.execute(text("SELECT name FROM tenants")).scalar_one() == "Default"
    engine.dispose()


def test_sqlite_writers_wait_for_each_other(migrated_sqlite_url: str) -> None:
    """A transaction that reads before it writes must not fail because another came between."""
    engine = make_engine(migrated_sqlite_url)
    entered = threading.Event()

    def second() -> None:
        entered.set()
        with write(engine) as connection:
            name = connection.execute(text("SELECT name FROM tenants")).scalar_one()
            connection.execute(text("UPDATE tenants SET name = :name"), {"name": name + "2"})

    with ThreadPoolExecutor(1) as pool:
        with write(engine) as connection:
            connection.execute(text("UPDATE tenants SET name = '1'"))
            waiting = pool.submit(second)
            entered.wait()
        waiting.result()
    with read(engine) as connection:
        assert connection.execute(text("SELECT name FROM tenants")).scalar_one() == "12"
    engine.dispose()


def test_a_lock_that_is_never_freed_is_transient(
    migrated_sqlite_url: str, desk_job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infra.database._BUSY_TIMEOUT_S", 1)
    engine = make_engine(migrated_sqlite_url)
    path = make_url(migrated_sqlite_url).database
    assert path is not None
    other = sqlite3.connect(path, isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(TransientError, match="locked"):
            JobStore(engine).enqueue(desk_job, actor="tester")
    finally:
        other.close()
        engine.dispose()


@pytest.mark.integration
def test_a_row_that_is_never_freed_is_transient(migrated_postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.database._LOCK_TIMEOUT_MS", 200)
    engine = make_engine(migrated_postgres_url)
    rename = text("UPDATE tenants SET name = 'x'")
    with write(engine) as holder:
        holder.execute(rename)
        with pytest.raises(TransientError, match="lock timeout"), write(engine) as waiter:
            waiter.execute(rename)
    engine.dispose()


def test_running_out_of_connections_is_transient(migrated_sqlite_url: str) -> None:
    # As make_engine's, with fewer connections and less patience.
    engine = make_engine(migrated_sqlite_url)
    impatient = create_engine(engine.url, pool_size=1, max_overflow=0, pool_timeout=0.1)
    with impatient.connect(), pytest.raises(TransientError, match="in use"):
        JobStore(impatient).counts()
    impatient.dispose()
    engine.dispose()


def test_the_databases_clock_is_the_time(engine: Engine) -> None:
    before = time.time_ns() // 1_000_000
    with read(engine) as connection:
        now = connection.execute(select(now_ms(engine.dialect))).scalar_one()
    assert before - 1 <= now <= time.time_ns() // 1_000_000 + 1
