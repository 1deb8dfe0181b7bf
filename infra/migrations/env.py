"""Alembic runs this file; the connection comes from infra.migrate, which holds the lock and the transaction."""

from alembic import context

from infra.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    # Both databases can roll schema changes back; alembic assumes that SQLite cannot.
    transactional_ddl=True,
    render_as_batch=True,
)
context.run_migrations()
