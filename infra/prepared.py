"""Statements that are compiled once and then run on the driver's own cursor, for the few that every job needs.

SQLAlchemy looks up the compiled form of a statement, works out its parameters and wraps its rows on every execution.
That costs ten times what SQLite takes for a look into an index, and it happens while the write lock is held.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import BindParameter, Connection, Delete, Dialect, Insert, Select, Update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql.compiler import SQLCompiler

Statement = Select[Any] | Insert | Update | Delete
_Processor = Callable[[Any], Any] | None
Row = dict[str, Any]


class Prepared:
    """One statement of one engine. Values are bound by the names of its `bindparam`s and of the columns it sets.

    It takes plain parameters only: no expanding ones (`in_` of a list), since its text never changes.

    Args:
        statement: What to run.
        columns: Of an insert, the columns that get their values on every run.
    """

    def __init__(self, statement: Statement, columns: Sequence[str] | None = None) -> None:
        self._statement = statement
        self._columns = columns
        self._compiled: _Compiled | None = None

    def rows(self, connection: Connection, values: Mapping[str, Any]) -> list[Row]:
        """Run it; return the rows by column name.

        Raises:
            DBAPIError: as the same statement would, run by the connection.
        """
        compiled = self._for(connection.dialect)
        cursor = compiled.execute(connection, values)
        try:
            return compiled.fetch(cursor)
        finally:
            cursor.close()

    def row(self, connection: Connection, values: Mapping[str, Any]) -> Row | None:
        """Run it; return its one row, or none."""
        found = self.rows(connection, values)
        return found[0] if found else None

    def run(self, connection: Connection, values: Mapping[str, Any]) -> None:
        """Run it, for what it changes."""
        self._for(connection.dialect).execute(connection, values).close()

    def _for(self, dialect: Dialect) -> "_Compiled":
        if self._compiled is None or self._compiled.dialect is not dialect:
            self._compiled = _Compiled(self._statement, self._columns, dialect)
        return self._compiled


@contextmanager
def together(connection: Connection) -> Iterator[None]:
    """Send PostgreSQL statements without waiting for their answers, until somebody asks for rows.

    Only prepared statements belong here. What is wrong with one that is `run` comes up with the next rows, or where the
    block ends.
    """
    if connection.dialect.name != "postgresql":
        yield
        return
    raw = connection.connection.driver_connection
    assert raw is not None
    try:
        with raw.pipeline():
            yield
    except connection.dialect.loaded_dbapi.Error as error:
        raise _wrapped(connection, error, "several statements at once") from error


def _wrapped(connection: Connection, error: Exception, statement: str) -> Exception:
    """Return a driver's error as SQLAlchemy would raise it."""
    dialect = connection.dialect
    is_gone = dialect.is_disconnect(error, connection.connection.dbapi_connection, None)  # type: ignore[arg-type]
    if is_gone:
        connection.invalidate(error)
    return DBAPIError.instance(
        statement,
        None,
        error,
        dialect.loaded_dbapi.Error,
        hide_parameters=True,
        connection_invalidated=is_gone,
        dialect=dialect,
    )


class _Compiled:
    """The text of a statement, and how its values and columns are translated for one driver."""

    def __init__(self, statement: Statement, columns: Sequence[str] | None, dialect: Dialect) -> None:
        compiled = statement.compile(dialect=dialect, column_keys=columns)
        assert isinstance(compiled, SQLCompiler)
        self.dialect = dialect
        self._text = str(compiled)
        binds = {name: _Bind(name, bind, dialect) for bind, name in compiled.bind_names.items()}
        # Without an order the driver takes parameters by name.
        self._is_positional = compiled.positiontup is not None
        self._binds = [binds[name] for name in compiled.positiontup or binds]
        returned = statement.exported_columns
        self._names = tuple(str(name) for name in returned.keys())  # noqa: SIM118  no dict: it iterates over columns
        self._types = [column.type.dialect_impl(dialect) for column in returned]
        self._processors: list[tuple[str, Callable[[Any], Any]]] | None = None

    def execute(self, connection: Connection, values: Mapping[str, Any]) -> Any:
        if self._is_positional:
            parameters: Any = [bind.value(values) for bind in self._binds]
        else:
            parameters = {bind.name: bind.value(values) for bind in self._binds}
        raw = connection.connection
        cursor = raw.cursor()
        try:
            cursor.execute(self._text, parameters)
        except self.dialect.loaded_dbapi.Error as error:
            cursor.close()
            raise _wrapped(connection, error, self._text) from error
        return cursor

    def fetch(self, cursor: Any) -> list[Row]:
        raw = cursor.fetchall()
        processors = self._processors
        if processors is None:
            # Some depend on the driver's own type codes, which only a result has.
            found = zip(self._names, self._types, cursor.description, strict=True)
            made = [(name, kind.result_processor(self.dialect, column[1])) for name, kind, column in found]
            self._processors = processors = [(name, process) for name, process in made if process is not None]
        rows: list[Row] = [dict(zip(self._names, row, strict=True)) for row in raw]
        for name, process in processors:
            for row in rows:
                row[name] = process(row[name])
        return rows


class _Bind:
    """A parameter: given by the caller, fixed in the statement, or asked for on every run."""

    def __init__(self, name: str, bind: BindParameter[Any], dialect: Dialect) -> None:
        if bind.expanding:
            raise TypeError(f"the parameter {bind.key} expands; a prepared statement has one text")
        self.name = name
        self._key = bind.key
        self._process: _Processor = bind.type.dialect_impl(dialect).bind_processor(dialect)
        self._is_required = bind.required
        self._ask = bind.callable
        self._fixed = None if self._is_required or self._ask is not None else bind.value

    def value(self, values: Mapping[str, Any]) -> Any:
        if self._is_required:
            value = values[self._key]
        elif self._ask is not None:
            value = self._ask()
        else:
            value = self._fixed
        return value if self._process is None else self._process(value)
