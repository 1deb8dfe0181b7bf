"""The bill that /metrics shows is the ledger's sum, without adding all of it up each time."""

import time

import pytest
from sqlalchemy import Engine, delete, insert

from infra.database import read, write
from infra.queue_metrics import Bill
from infra.schema import tenants, usage_ledger


class Ledger:
    """Writes rows of the ledger, of any age."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._layer = 0

    def add(self, tenant: str, gpu_ms: int, *, age_s: float = 0) -> None:
        self._layer += 1
        at = round((time.time() - age_s) * 1000)
        values = {"tenant_id": tenant, "gpu_ms": gpu_ms, "at": at, "layer": self._layer}
        with write(self._engine) as connection:
            connection.execute(insert(usage_ledger).values(job_id="j", fence=1, device="cpu", **values))

    def forget(self, *, older_than_s: float) -> None:
        oldest = round((time.time() - older_than_s) * 1000)
        with write(self._engine) as connection:
            connection.execute(delete(usage_ledger).where(usage_ledger.c.at < oldest))


@pytest.fixture
def ledger(engine: Engine) -> Ledger:
    with write(engine) as connection:
        connection.execute(insert(tenants).values(id="zoo", name="Zoo", created_at=0))
    return Ledger(engine)


def totals(bill: Bill, engine: Engine) -> dict[str, int]:
    with read(engine) as connection:
        return bill.totals(connection)


def test_the_bill_follows_the_ledger(ledger: Ledger, engine: Engine) -> None:
    bill = Bill()
    assert totals(bill, engine) == {}
    ledger.add("default", 5, age_s=7200)
    ledger.add("zoo", 7, age_s=7200)
    ledger.add("default", 11)
    for _ in range(2):
        assert totals(bill, engine) == {"default": 16, "zoo": 7}
    ledger.add("zoo", 13)
    # One whose clock was late: it counts by its number, not by its time.
    ledger.add("default", 1, age_s=7200)
    for _ in range(2):
        assert totals(bill, engine) == {"default": 17, "zoo": 20} == totals(Bill(), engine)


def test_what_is_settled_is_not_read_again_and_what_is_fresh_is(ledger: Ledger, engine: Engine) -> None:
    bill = Bill()
    ledger.add("default", 5, age_s=7200)
    ledger.add("default", 11)
    assert totals(bill, engine) == {"default": 16}
    ledger.forget(older_than_s=3600)
    assert totals(Bill(), engine) == {"default": 11}
    assert totals(bill, engine) == {"default": 16}
    ledger.forget(older_than_s=-60)
    assert totals(bill, engine) == {"default": 5}
