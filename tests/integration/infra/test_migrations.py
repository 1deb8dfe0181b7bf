"""Migrations lead to exactly the tables that the code declares."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine, select, text, update

from infra import migrate
from infra.database import make_engine, read, write
from infra.errors import DatabaseUnusable
from infra.jobs import JobState, JobStore
from infra.migrate import is_current, upgrade, upgrade_engine
from infra.schema import DEFAULT_TENANT, metadata, tenants


def test_the_migrated_schema_is_the_declared_one(engine: Engine) -> None:
    with read(engine) as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []


DEFINITIONS = {
    "sqlite": "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name <> 'alembic_version'",
    "postgresql": """
        SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' AND tablename <> 'alembic_version'
        UNION ALL SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint
        WHERE connamespace = 'public'::regnamespace AND conrelid <> 'alembic_version'::regclass""",
}


def _definitions(engine: Engine) -> dict[str, list[str]]:
    with read(engine) as connection:
        rows = connection.execute(text(DEFINITIONS[engine.dialect.name])).all()
    # Columns and constraints of a CREATE TABLE may stand in any order, and a column added later on the last one's line;
    # SQLite writes the name of a table that was renamed in quotes.
    return {name: sorted(_parts(sql.replace('"', ""))) for name, sql in rows}


def _parts(sql: str) -> Iterator[str]:
    """Split a definition at the commas and parentheses of its outermost pair."""
    part, depth = "", 0
    for character in sql:
        depth += (character == "(") - (character == ")")
        if (character == "," and depth == 1) or (character == "(" and depth == 1) or (character == ")" and depth == 0):
            yield " ".join(part.split())
            part = ""
        else:
            part += character
    yield " ".join(part.split())


def test_checks_and_partial_indexes_are_the_declared_ones_too(engine: Engine) -> None:
    """What alembic's comparison does not look at."""
    migrated = _definitions(engine)
    with write(engine) as connection:
        metadata.drop_all(connection)
        metadata.create_all(connection)
    declared = _definitions(engine)
    assert migrated == declared
    assert any("WHERE" in " ".join(lines) for lines in declared.values())


def test_upgrading_again_changes_nothing(database_url: str, engine: Engine) -> None:
    with write(engine) as connection:
        connection.execute(update(tenants).values(name="Renamed"))
    upgrade(database_url)
    upgrade_engine(engine)
    assert is_current(engine)
    with read(engine) as connection:
        assert connection.execute(select(tenants.c.id, tenants.c.name)).all() == [(DEFAULT_TENANT, "Renamed")]


def test_an_empty_database_is_not_current(tmp_path: Path, postgres_url: str) -> None:
    for url in (f"sqlite:///{tmp_path / 'new.db'}", postgres_url):
        engine = make_engine(url)
        try:
            assert not is_current(engine)
            upgrade_engine(engine)
            assert is_current(engine)
        finally:
            engine.dispose()


def test_a_database_of_a_newer_version_is_left_alone(engine: Engine) -> None:
    with write(engine) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(DatabaseUnusable, match="newer duquant"):
        upgrade_engine(engine)


def test_open_jobs_survive_an_upgrade(desk, store: JobStore, engine: Engine) -> None:
    job = desk.add()
    upgrade_engine(engine)
    assert store.get(job.id).state is JobState.QUEUED


def test_migrations_work_from_an_installed_copy(tmp_path: Path) -> None:
    """No file outside the packages is needed, and the current folder does not matter."""
    packages = Path(migrate.__file__).parent.parent
    for name in ("infra", "duquant"):
        shutil.copytree(packages / name, tmp_path / "site" / name)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path / "site")!r})
import infra.migrate
assert infra.migrate.__file__.startswith({str(tmp_path)!r})
infra.migrate.upgrade("sqlite:///{tmp_path / "db" / "x.db"}")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert (tmp_path / "db" / "x.db").exists()
