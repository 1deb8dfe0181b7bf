"""The bill: GPU time from the ledger, summed by what somebody asks for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import ColumnElement, Engine, String, cast, func, select

from infra.database import read
from infra.schema import jobs, usage_ledger

DAY_MS = 86_400_000

UsageKey = Literal["day", "model", "recipe", "device", "job"]


@dataclass(frozen=True, kw_only=True, slots=True)
class UsageRow:
    """What was used of one kind."""

    key: str
    gpu_ms: int
    jobs: int
    """How many jobs used it."""


class UsageStore:
    """Reads the ledger. Rows are written with the work that they are for, by the job store."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def totals(self, tenant_id: str, *, by: UsageKey, since: int, until: int, limit: int = 1000) -> Sequence[UsageRow]:
        """Return a tenant's use between two times (ms since 1970; `until` is not included), largest first.

        Days are of UTC, and come as the milliseconds at which they begin. Jobs that are gone still count; their model
        and recipe are then unknown and come as an empty text.
        """
        key = self._key(by)
        used = func.sum(usage_ledger.c.gpu_ms)
        users = func.count(usage_ledger.c.job_id.distinct())
        query = (
            select(key.label("bucket"), used.label("gpu_ms"), users.label("jobs"))
            .select_from(usage_ledger.outerjoin(jobs, jobs.c.id == usage_ledger.c.job_id))
            .where(usage_ledger.c.tenant_id == tenant_id, usage_ledger.c.at >= since, usage_ledger.c.at < until)
            # By its name: a database cannot see that two expressions with parameters are the same.
            .group_by("bucket")
            .order_by(used.desc(), "bucket")
            .limit(limit)
        )
        with read(self._engine) as connection:
            rows = connection.execute(query).mappings().all()
        return [UsageRow(key=row["bucket"], gpu_ms=int(row["gpu_ms"]), jobs=row["jobs"]) for row in rows]

    def total_ms(self, tenant_id: str, *, since: int, until: int) -> int:
        """Return the GPU time that a tenant has used between two times."""
        query = select(func.coalesce(func.sum(usage_ledger.c.gpu_ms), 0)).where(
            usage_ledger.c.tenant_id == tenant_id, usage_ledger.c.at >= since, usage_ledger.c.at < until
        )
        with read(self._engine) as connection:
            return int(connection.execute(query).scalar_one())

    @staticmethod
    def _key(by: UsageKey) -> ColumnElement[str]:
        match by:
            case "day":
                day = usage_ledger.c.at - usage_ledger.c.at % DAY_MS
                return cast(day, String)
            case "model":
                return func.coalesce(jobs.c.model_name, "")
            case "recipe":
                return func.coalesce(jobs.c.recipe_name, "")
            case "device":
                return usage_ledger.c.device
            case "job":
                return usage_ledger.c.job_id
