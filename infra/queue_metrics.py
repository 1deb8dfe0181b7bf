"""Metrics that are read from the database when somebody asks: the queue, the bill, the outbox, the dispatchers."""

import threading
from collections import Counter
from collections.abc import Iterable

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from sqlalchemy import Connection, Engine, func, select

from infra.database import now_ms, read
from infra.job_model import JobState
from infra.job_rows import state_is
from infra.metrics import restore
from infra.schema import jobs, queues, usage_ledger, webhook_deliveries, workers

_LIVE_MS = 60_000
_SETTLED_MS = 600_000


class QueueMetrics:
    """Reads the metrics of the whole installation."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._bill = Bill()

    def collect(self) -> list[Metric]:
        """Return them all.

        Raises:
            InfraError: the database does not answer.
        """
        with read(self._engine) as connection:
            return [
                *_jobs(connection),
                *_queues(connection),
                self._usage(connection),
                _outbox(connection),
                *_workers(connection),
            ]

    def _usage(self, connection: Connection) -> Metric:
        family = CounterMetricFamily("duquant_gpu_seconds", "Device time that was billed", labels=["tenant"])
        for tenant, gpu_ms in sorted(self._bill.totals(connection).items()):
            family.add_metric([tenant], gpu_ms / 1000)
        return family


class Bill:
    """The sums of the ledger, which only grows: what is settled is added up once and remembered.

    Numbers of rows are given out before their transactions commit. So a row counts as settled when it is so old that
    nobody can still be writing one with a smaller number.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._settled: Counter[str] = Counter()
        self._last = 0

    def totals(self, connection: Connection) -> dict[str, int]:
        """Return the GPU milliseconds of each tenant."""
        with self._lock:
            oldest = now_ms(connection.dialect) - _SETTLED_MS
            last = connection.execute(
                select(func.max(usage_ledger.c.id)).where(usage_ledger.c.id > self._last, usage_ledger.c.at < oldest)
            ).scalar_one()
            if last is not None:
                self._settled += self._sums(connection, self._last, last)
                self._last = last
            return dict(self._settled + self._sums(connection, self._last, None))

    def _sums(self, connection: Connection, after: int, upto: int | None) -> Counter[str]:
        total = func.sum(usage_ledger.c.gpu_ms)
        # An expression, so that SQLite walks the few new rows by their number and not all rows by their tenant.
        tenant = func.coalesce(usage_ledger.c.tenant_id, "")
        query = select(tenant, total).where(usage_ledger.c.id > after)
        if upto is not None:
            query = query.where(usage_ledger.c.id <= upto)
        rows = connection.execute(query.group_by(tenant))
        return Counter({name: int(gpu_ms) for name, gpu_ms in rows})


def _jobs(connection: Connection) -> Iterable[Metric]:
    family = GaugeMetricFamily("duquant_jobs", "Jobs by state", labels=["state"])
    query = select(jobs.c.state, func.count().label("count")).group_by(jobs.c.state)
    found = {row["state"]: row["count"] for row in connection.execute(query).mappings()}
    for state in JobState:
        family.add_metric([state.value], found.get(state.value, 0))
    yield family


def _queues(connection: Connection) -> Iterable[Metric]:
    depth = GaugeMetricFamily("duquant_queue_depth", "Jobs that wait for a dispatcher", labels=["queue"])
    oldest = GaugeMetricFamily(
        "duquant_queue_oldest_seconds", "How long the oldest waiting job has waited", labels=["queue"]
    )
    age = now_ms(connection.dialect) - func.min(jobs.c.run_at)
    query = select(jobs.c.queue, func.count(), age).where(state_is(JobState.QUEUED)).group_by(jobs.c.queue)
    rows = dict.fromkeys(connection.execute(select(queues.c.name)).scalars(), (0, 0))
    rows |= {queue: (count, age_ms) for queue, count, age_ms in connection.execute(query)}
    for queue, (count, age_ms) in rows.items():
        depth.add_metric([queue], count)
        oldest.add_metric([queue], max(age_ms, 0) / 1000)
    yield from (depth, oldest)


def _outbox(connection: Connection) -> Metric:
    query = select(func.count()).where(webhook_deliveries.c.state == "pending")
    return GaugeMetricFamily(
        "duquant_webhook_outbox", "Webhook messages not yet delivered", value=connection.execute(query).scalar_one()
    )


def _workers(connection: Connection) -> Iterable[Metric]:
    """Count the dispatchers that have beaten lately, and pass on what they count themselves."""
    since = now_ms(connection.dialect) - _LIVE_MS
    live = connection.execute(select(workers.c.owner, workers.c.info).where(workers.c.beat_at >= since)).all()
    yield GaugeMetricFamily("duquant_workers", "Dispatchers that have reported lately", value=len(live))
    for owner, info in live:
        yield from restore(info.get("metrics", []), {"worker": owner})
