"""Prepared statements: the same values, rows and errors as the connection's own."""

from decimal import Decimal

import pytest
from sqlalchemy import Engine, bindparam, func, insert, literal, select, update
from sqlalchemy.exc import IntegrityError

from infra.database import read, write
from infra.errors import DatabaseUnusable
from infra.prepared import Prepared, together
from infra.schema import tenants, workers

NEW_WORKER = Prepared(insert(workers).returning(workers), columns=("owner", "started_at", "beat_at", "info"))
ONE = {"owner": "host-1", "started_at": 1, "beat_at": 2, "info": {"slots": 2, "names": ["é", None]}}


def test_rows_are_those_of_the_connection(engine: Engine) -> None:
    query = select(workers, func.count().over().label("count"), (literal(3) / literal(2)).label("ratio"))
    with write(engine) as connection:
        assert NEW_WORKER.row(connection, ONE) == ONE
        assert Prepared(query).rows(connection, {}) == [dict(row) for row in connection.execute(query).mappings()]


def test_a_decimal_is_the_type_that_the_column_says(engine: Engine) -> None:
    query = select(func.sum(tenants.c.weight).label("weight"), func.avg(tenants.c.paused).label("share"))
    with read(engine) as connection:
        (row,) = Prepared(query).rows(connection, {})
        plain = connection.execute(query).mappings().one()
    assert row == dict(plain)
    assert {type(value) for value in row.values()} == {type(value) for value in plain.values()}
    assert not isinstance(row["weight"], Decimal)


def test_a_clock_is_asked_on_every_run(engine: Engine) -> None:
    ticks = iter((1, 2, 3))
    statement = Prepared(select(bindparam(None, callable_=lambda: next(ticks), unique=True).label("now")))
    with read(engine) as connection:
        assert [statement.rows(connection, {})[0]["now"] for _ in range(3)] == [1, 2, 3]


def test_none_of_no_rows(engine: Engine) -> None:
    statement = Prepared(select(workers.c.owner).where(workers.c.owner == bindparam("name")))
    with read(engine) as connection:
        assert statement.row(connection, {"name": "nobody"}) is None


def test_a_broken_rule_is_an_integrity_error_and_rolls_back(engine: Engine) -> None:
    def twice() -> None:
        with write(engine) as connection:
            NEW_WORKER.run(connection, ONE)
            NEW_WORKER.run(connection, ONE)

    with pytest.raises(IntegrityError):
        twice()
    with read(engine) as connection:
        assert connection.execute(select(func.count()).select_from(workers)).scalar_one() == 0


def test_what_goes_wrong_together_is_told_where_the_block_ends(engine: Engine) -> None:
    def twice() -> None:
        with write(engine) as connection, together(connection):
            NEW_WORKER.run(connection, ONE)
            NEW_WORKER.run(connection, ONE)

    with pytest.raises(IntegrityError):
        twice()
    with write(engine) as connection:
        with together(connection):
            NEW_WORKER.run(connection, ONE)
        assert connection.execute(select(func.count()).select_from(workers)).scalar_one() == 1


def test_a_missing_table_is_ours_to_tell(engine: Engine) -> None:
    with write(engine) as connection:
        connection.exec_driver_sql("DROP TABLE workers")
    with pytest.raises(DatabaseUnusable), write(engine) as connection:
        NEW_WORKER.run(connection, ONE)


def test_a_missing_value_is_told_at_once(engine: Engine) -> None:
    statement = Prepared(update(workers).where(workers.c.owner == bindparam("name")).values(beat_at=1))
    with pytest.raises(KeyError, match="name"), write(engine) as connection:
        statement.run(connection, {})


def test_a_list_is_refused_since_it_would_change_the_text(engine: Engine) -> None:
    statement = Prepared(select(workers).where(workers.c.owner.in_(bindparam("names", expanding=True))))
    with pytest.raises(TypeError, match="names"), read(engine) as connection:
        statement.rows(connection, {"names": ["a"]})
