"""Conditions on times: the first belongs to what is asked for, the end does not."""

import pytest
from sqlalchemy import BigInteger, Column, MetaData, Table, create_engine, select

from infra.listing import between


@pytest.mark.parametrize(
    ("first", "end", "expected"),
    [(None, None, [1, 2, 3]), (2, None, [2, 3]), (None, 2, [1]), (1, 3, [1, 2]), (0, 0, [])],
)
def test_first_belongs_to_it_and_end_does_not(first: int | None, end: int | None, expected: list[int]) -> None:
    table = Table("rows", MetaData(), Column("at", BigInteger))
    engine = create_engine("sqlite://")
    with engine.begin() as connection:
        table.create(connection)
        connection.execute(table.insert(), [{"at": at} for at in (1, 2, 3)])
        query = select(table.c.at).where(*between(table.c.at, first, end)).order_by(table.c.at)
        assert connection.execute(query).scalars().all() == expected
