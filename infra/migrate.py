"""Bring the database to the newest schema: `python -m infra.migrate`, and every process at its start."""

from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Engine

from infra.database import make_engine, migration_lock, read
from infra.errors import DatabaseUnusable, InfraError
from infra.logging import fail_with, setup_logging
from infra.settings import DatabaseSettings


def _config(**attributes: Any) -> Config:
    # No alembic.ini: the scripts are found beside this file, in a checkout and in an installed wheel alike.
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes.update(attributes)
    return config


def upgrade(url: str) -> None:
    """Upgrade the database at `url` to the newest schema; safe when several processes do it at once.

    Raises:
        TransientError: the database does not answer.
        DatabaseUnusable: it cannot be written, or a newer duquant has migrated it.
    """
    engine = make_engine(url)
    try:
        upgrade_engine(engine)
    finally:
        engine.dispose()


def upgrade_engine(engine: Engine) -> None:
    """As `upgrade`, on an engine that the caller keeps."""
    if is_current(engine):
        return
    with migration_lock(engine) as connection:
        try:
            command.upgrade(_config(connection=connection), "head")
        except CommandError as error:
            raise DatabaseUnusable(f"cannot migrate the database (made by a newer duquant?): {error}") from error


def is_current(engine: Engine) -> bool:
    """Whether the database has the schema that this code wants."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    with read(engine) as connection:
        return MigrationContext.configure(connection).get_current_revision() == head


def main() -> None:
    """Migrate the database that the environment names."""
    try:
        settings = DatabaseSettings.load()
        log = setup_logging("migrate", level=settings.log_level, fmt=settings.log_format)
        upgrade(settings.database_url)
        log.info("database_migrated")
    except InfraError as error:
        fail_with(error)


if __name__ == "__main__":
    main()
