"""A random walk of clients, operators, workers and zombies over the job store, beside a model of it in plain Python.

Two tenants of different weight share the queue. Workers keep their claims for ever and use them at any later time; the
clock jumps forwards and back; tenants and the queue are paused, quotas change, jobs depend on each other, wait for
their time, have deadlines and are retried. The model says what each operation must do: which job, which error, which
state, which fence.
"""

import functools
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, precondition, rule
from sqlalchemy import Engine, func, insert, select, update

from infra.database import make_engine, read, write
from infra.errors import DependencyFailed, DependencyNotFound, InfraError, JobConflict, LeaseLost, QuotaExceeded
from infra.job_claims import NOMINAL_GPU_SECONDS
from infra.job_model import turn_at
from infra.jobs import TERMINAL, TRANSITIONS, WAITING, Claim, JobState, JobStore, NewJob
from infra.migrate import upgrade
from infra.schema import artifacts, job_events, job_layers, jobs, queues, tenants, usage_ledger

LEASE = 60
LAYER_S = 2.0
S = JobState
HELD = {S.RUNNING, S.CANCELLING}
ENDED_BADLY = {S.FAILED, S.CANCELLED}
WEIGHTS = {"default": 1.0, "other": 2.0}
# A worker that ends its job at once leaves nothing to lose: beats and layers are drawn more often than ends.
OPERATIONS = [
    "beat",
    "beat",
    "do_layer",
    "do_layer",
    "complete",
    "complete",
    "fail",
    "fail",
    "release",
    "finish_cancel",
]
RETRY = st.sampled_from([None, 0, 30, 30])
# What is paused most of the time starts nothing that could go wrong.
RARELY = st.sampled_from([False, False, False, True])
TENANT = st.sampled_from(sorted(WEIGHTS))


@functools.cache
def template() -> Path:
    """A migrated SQLite file to copy; kept for the whole session."""
    folder = tempfile.TemporaryDirectory(prefix="dq-machine-")
    path = Path(folder.name) / "template.db"
    upgrade(f"sqlite:///{path}")
    # The folder lives as long as the cached path does.
    template.folder = folder
    return path


@dataclass
class Tenant:
    """What one tenant should look like."""

    weight: float
    paused: bool = False
    max_queued: int | None = None
    max_running: int | None = None
    vstart: float = 0.0
    vtime: float = 0.0


@dataclass
class Model:
    """What one job should look like."""

    tenant: str
    fingerprint: str
    forced: bool
    priority: int
    run_at: int
    turn_at: int
    deadline_at: int | None
    depends_on: list[str]
    gpus: int
    max_attempts: int
    state: JobState
    fence: int = 0
    attempt: int = 0
    losses: int = 0
    lease_until: int = 0
    layer_done: bool | None = None
    gpu_ms: int = 0
    history: list[JobState] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.history.append(self.state)

    def go(self, state: JobState) -> None:
        assert state in TRANSITIONS[self.state]
        self.state = state
        self.history.append(state)


class JobStoreMachine(RuleBasedStateMachine):
    claims = Bundle("claims")
    ids = Bundle("ids")
    url: ClassVar[str | None] = None
    """A migrated database to empty before each walk; none means a new SQLite file."""

    @initialize()
    def open_store(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="dq-machine-")
        if self.url is None:
            path = Path(self.folder.name) / "jobs.db"
            shutil.copy(template(), path)
            self.engine = make_engine(f"sqlite:///{path}")
        else:
            self.engine = make_engine(self.url)
            empty(self.engine)
        with write(self.engine) as connection:
            connection.execute(insert(tenants).values(id="other", name="Other", created_at=0, weight=WEIGHTS["other"]))
        self.now = 1_700_000_000_000
        self.store = JobStore(self.engine, lambda: self.now)
        self.jobs: dict[str, Model] = {}
        self.tenants = {name: Tenant(weight) for name, weight in WEIGHTS.items()}
        self.queue_paused = False
        self.live: dict[str, Claim] = {}

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            try:
                self.events_replay_to_the_history()
            finally:
                self.engine.dispose()
                self.folder.cleanup()

    def events_replay_to_the_history(self) -> None:
        for job_id, model in self.jobs.items():
            events = self.store.events(job_id, limit=10_000)
            steps = [event.data["to"] for event in events if "to" in event.data]
            assert steps == [str(state) for state in model.history]

    # Clients

    @rule(
        target=ids,
        tenant=TENANT,
        fingerprint=st.sampled_from("abcd"),
        priority=st.sampled_from([1, 100]),
        max_attempts=st.integers(1, 2),
        gpus=st.sampled_from([1, 1, 2]),
        delay=st.sampled_from([None, None, None, 30]),
        deadline=st.sampled_from([None, None, None, 30, 3600]),
        force=st.booleans(),
        data=st.data(),
    )
    def enqueue(
        self,
        tenant: str,
        fingerprint: str,
        priority: int,
        max_attempts: int,
        gpus: int,
        delay: int | None,
        deadline: int | None,
        force: bool,
        data: st.DataObject,
    ) -> str:
        known = sorted(self.jobs)
        depends_on = data.draw(st.lists(st.sampled_from(known), max_size=2)) if known else []
        new = NewJob(
            tenant_id=tenant,
            kind="quantize",
            spec={},
            fingerprint=fingerprint,
            priority=priority,
            max_attempts=max_attempts,
            gpus=gpus,
            run_at=None if delay is None else self.now + delay * 1000,
            deadline_at=None if deadline is None else self.now + deadline * 1000,
            depends_on=depends_on,
        )
        same = {
            job_id
            for job_id, model in self.jobs.items()
            if (model.tenant, model.fingerprint) == (tenant, fingerprint) and model.state not in ENDED_BADLY
        }
        expected = self.refusal(tenant, depends_on, gpus)
        if same and not force and expected is not DependencyNotFound:
            expected = JobConflict if all(self.jobs[job_id].state is S.CANCELLING for job_id in same) else None
        refused: type[InfraError] | None = None
        try:
            job, created = self.store.enqueue(new, force=force, actor="client")
        except (DependencyFailed, DependencyNotFound, QuotaExceeded, JobConflict) as error:
            refused = type(error)
        assert refused is expected
        if refused is not None:
            return multiple()
        assert created == (force or not same)
        if created:
            run_at = self.now + (delay or 0) * 1000
            self.jobs[job.id] = Model(
                tenant,
                fingerprint,
                force,
                priority,
                run_at,
                turn_at(run_at, priority),
                new.deadline_at,
                depends_on,
                gpus,
                max_attempts,
                S.BLOCKED if self.is_blocked(depends_on) else self.waiting_state(run_at),
            )
        else:
            assert job.id in same
            self.join(self.jobs[job.id], new)
        return job.id

    def join(self, model: Model, new: NewJob) -> None:
        """What a second request for the same work changes of the job that does it."""
        assert model.state is not S.CANCELLING
        if model.state is S.SUCCEEDED:
            return
        if model.deadline_at is not None and (new.deadline_at is None or new.deadline_at > model.deadline_at):
            model.deadline_at = new.deadline_at
        if model.state not in WAITING:
            return
        is_more_urgent = new.priority < model.priority
        model.priority = min(model.priority, new.priority)
        is_earlier = (run_at := max(self.now, new.run_at or self.now)) < model.run_at
        if is_earlier:
            model.run_at = run_at
        if is_earlier or is_more_urgent:
            model.turn_at = turn_at(model.run_at, model.priority)
        if model.state is S.BLOCKED and not new.depends_on:
            model.depends_on = []
            model.go(self.waiting_state(model.run_at))
        elif is_earlier and model.state not in (S.BLOCKED, to := self.waiting_state(model.run_at)):
            model.go(to)

    def refusal(self, tenant: str, depends_on: list[str], gpus: int) -> type[InfraError] | None:
        """What keeps a job from being queued, the first reason first."""
        for job_id in depends_on:
            if self.jobs[job_id].tenant != tenant:
                return DependencyNotFound
        if any(self.jobs[job_id].state in ENDED_BADLY for job_id in depends_on):
            return DependencyFailed
        limits = self.tenants[tenant]
        if limits.max_running is not None and gpus > limits.max_running:
            return QuotaExceeded
        waiting = sum(model.tenant == tenant and model.state in WAITING for model in self.jobs.values())
        return QuotaExceeded if limits.max_queued is not None and waiting >= limits.max_queued else None

    def is_blocked(self, depends_on: list[str]) -> bool:
        return any(self.jobs[job_id].state is not S.SUCCEEDED for job_id in depends_on)

    def waiting_state(self, run_at: int) -> JobState:
        return S.SCHEDULED if run_at > self.now else S.QUEUED

    def end(self, job_id: str, state: JobState) -> None:
        """End a job, and do to those that wait for it what follows."""
        self.jobs[job_id].go(state)
        for waiting_id, waiting in self.jobs.items():
            if waiting.state is not S.BLOCKED or job_id not in waiting.depends_on:
                continue
            if state is not S.SUCCEEDED:
                self.end(waiting_id, S.FAILED)
            elif not self.is_blocked(waiting.depends_on):
                waiting.go(self.waiting_state(waiting.run_at))

    @rule(job_id=ids, really=st.sampled_from([False, False, True]))
    def cancel(self, job_id: str, really: bool) -> None:
        if not really:  # too many would leave nothing to run
            return
        model = self.jobs[job_id]
        ended = model.state in TERMINAL
        try:
            self.store.cancel(job_id, tenant_id=model.tenant, actor="client")
            assert not ended
        except JobConflict:
            assert ended
            return
        if model.state is S.RUNNING:
            model.go(S.CANCELLING)
        elif model.state is not S.CANCELLING:
            self.end(job_id, S.CANCELLED)

    @rule(job_id=ids)
    def retry(self, job_id: str) -> None:
        model = self.jobs[job_id]
        expected: type[InfraError] | None = JobConflict
        if model.state in ENDED_BADLY:
            expected = self.refusal(model.tenant, model.depends_on, model.gpus)
            rivals = [
                each
                for each in self.jobs.values()
                if (each.tenant, each.fingerprint) == (model.tenant, model.fingerprint)
                and each.state not in TERMINAL
                and not each.forced
            ]
            if expected is None and rivals and not model.forced:
                expected = JobConflict
        refused: type[InfraError] | None = None
        try:
            self.store.retry(job_id, tenant_id=model.tenant, actor="client")
        except (JobConflict, DependencyFailed, QuotaExceeded) as error:
            refused = type(error)
        assert refused is expected
        if refused is not None:
            return
        model.go(S.BLOCKED if self.is_blocked(model.depends_on) else S.QUEUED)
        model.run_at, model.turn_at = self.now, turn_at(self.now, model.priority)
        model.attempt = model.losses = 0
        if model.deadline_at is not None and model.deadline_at <= self.now:
            model.deadline_at = None

    @rule(job_id=ids, priority=st.sampled_from([1, 100]), delay=st.sampled_from([None, -30, 30]))
    def change(self, job_id: str, priority: int, delay: int | None) -> None:
        model = self.jobs[job_id]
        wanted = {"priority": priority} if delay is None else {"run_at": self.now + delay * 1000}
        try:
            self.store.change(job_id, wanted, tenant_id=model.tenant, actor="client")
        except JobConflict:
            assert model.state not in WAITING
            return
        assert model.state in WAITING
        if delay is None:
            model.priority = priority
        else:
            model.run_at = max(self.now + delay * 1000, self.now)
            to = self.waiting_state(model.run_at)
            if model.state not in (S.BLOCKED, to):
                model.go(to)
        model.turn_at = turn_at(model.run_at, model.priority)

    # Operators

    @rule(what=st.sampled_from(["queue", *sorted(WEIGHTS)]), paused=RARELY)
    def pause_or_resume(self, what: str, paused: bool) -> None:
        if what != "queue":
            self.tenants[what].paused = paused
            self.set_tenant(what, paused=int(paused))
            return
        self.queue_paused = paused
        with write(self.engine) as connection:
            connection.execute(update(queues).values(paused=int(paused)))

    @rule(tenant=TENANT, max_queued=st.sampled_from([None, None, 2]), max_running=st.sampled_from([None, None, 2]))
    def set_quota(self, tenant: str, max_queued: int | None, max_running: int | None) -> None:
        self.tenants[tenant].max_queued, self.tenants[tenant].max_running = max_queued, max_running
        self.set_tenant(tenant, max_queued=max_queued, max_running=max_running)

    def set_tenant(self, tenant: str, **values: int | None) -> None:
        with write(self.engine) as connection:
            connection.execute(update(tenants).where(tenants.c.id == tenant).values(**values))

    # Workers. Claims stay in the bundle, so any of them may be a zombie's.

    def promote(self) -> None:
        for model in self.jobs.values():
            if model.state is S.SCHEDULED and model.run_at <= self.now:
                model.go(S.QUEUED)

    @rule(target=claims)
    def claim(self) -> Claim:
        return self.take()

    @rule(target=claims)
    def claim_too(self) -> Claim:
        """As often as two other rules: without claims the rest has nothing to do."""
        return self.take()

    def take(self) -> Claim:
        if self.anybody_may_start():
            self.promote()
        expected = None if self.queue_paused else self.next_job()
        taken = self.store.claim("worker", lease_seconds=LEASE)
        if taken is None:
            assert expected is None
            return multiple()
        assert expected is not None
        start, job_id = expected
        assert taken.job.id == job_id
        model = self.jobs[job_id]
        tenant = self.tenants[model.tenant]
        tenant.vstart, tenant.vtime = start, start + model.gpus * NOMINAL_GPU_SECONDS / tenant.weight
        model.go(S.RUNNING)
        model.fence += 1
        model.attempt += 1
        model.lease_until = self.now + LEASE * 1000
        assert taken.fence == model.fence
        self.live[job_id] = taken
        return taken

    def anybody_may_start(self) -> bool:
        """Whether a claim looks at jobs at all; what is due while nobody may is queued by the next sweep."""
        return not self.queue_paused and any(
            not tenant.paused and (tenant.max_running is None or tenant.max_running > self.held_by(name))
            for name, tenant in self.tenants.items()
        )

    def held_by(self, tenant: str) -> int:
        return sum(model.gpus for model in self.jobs.values() if model.tenant == tenant and model.state in HELD)

    def next_job(self) -> tuple[float, str] | None:
        latest = max(tenant.vstart for tenant in self.tenants.values())
        heads = []
        for name, tenant in self.tenants.items():
            room = 1000 if tenant.max_running is None else tenant.max_running - self.held_by(name)
            ready = [
                (model.turn_at, job_id)
                for job_id, model in self.jobs.items()
                if (model.tenant, model.state) == (name, S.QUEUED)
                and model.gpus <= room
                and (model.deadline_at is None or model.deadline_at > self.now)
            ]
            if ready and not tenant.paused:
                heads.append((max(tenant.vtime, latest), *min(ready)))
        if not heads:
            return None
        start, _, job_id = min(heads)
        return start, job_id

    @rule(claim=claims, operation=st.sampled_from(OPERATIONS), retry=RETRY)
    def any_worker_acts(self, claim: Claim, operation: str, retry: int | None) -> None:
        """Most of these claims are zombies' after a while."""
        self.act(claim, operation, retry)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), operation=st.sampled_from(OPERATIONS), retry=RETRY)
    def latest_worker_acts(self, data: st.DataObject, operation: str, retry: int | None) -> None:
        self.act(self.live[data.draw(st.sampled_from(sorted(self.live)))], operation, retry)

    def act(self, claim: Claim, operation: str, retry: int | None) -> None:
        if operation == "fail":
            self.fail(claim, retry)
        else:
            getattr(self, operation)(claim)

    def holds(self, claim: Claim) -> bool:
        model = self.jobs[claim.job.id]
        return model.state in HELD and model.fence == claim.fence and model.lease_until >= self.now

    def attempt(self, claim: Claim, operation) -> InfraError | None:
        """Run a worker's write; a claim that does not hold its job must be told so, and nothing else may be."""
        try:
            operation()
        except LeaseLost as error:
            assert not self.holds(claim)
            return error
        except JobConflict as error:
            assert self.holds(claim)
            return error
        assert self.holds(claim)
        return None

    def beat(self, claim: Claim) -> None:
        answers: list[str | None] = []
        beat = lambda: answers.append(self.store.heartbeat(claim, lease_seconds=LEASE))  # noqa: E731
        if self.attempt(claim, beat) is None:
            model = self.jobs[claim.job.id]
            model.lease_until = self.now + LEASE * 1000
            overdue = model.deadline_at is not None and model.deadline_at <= self.now
            assert answers == ["cancel" if model.state is S.CANCELLING else "deadline" if overdue else None]

    def do_layer(self, claim: Claim) -> None:
        def work() -> None:
            self.store.plan(claim, [0])
            row = self.store.start_layer(claim, 0, "node")
            done = replace(row, key="k", sha256=str(claim.fence), size_bytes=1, seconds=LAYER_S)
            self.store.commit_layer(claim, done)

        model = self.jobs[claim.job.id]
        match self.attempt(claim, work):
            case None:
                assert not model.layer_done
                model.layer_done = True
                model.gpu_ms += round(LAYER_S * 1000)
                tenant = self.tenants[model.tenant]
                tenant.vtime += LAYER_S / tenant.weight
            case JobConflict():
                assert model.layer_done
            case _:
                pass

    def complete(self, claim: Claim) -> None:
        match self.attempt(claim, lambda: self.store.complete(claim, {"by": claim.fence})):
            case None:
                self.end(claim.job.id, S.SUCCEEDED)
            case JobConflict():
                assert self.jobs[claim.job.id].state is S.CANCELLING
            case _:
                pass

    def fail(self, claim: Claim, retry: int | None) -> None:
        if self.attempt(claim, lambda: self.store.fail(claim, "error", "x", retry_in_seconds=retry)) is None:
            model = self.jobs[claim.job.id]
            if model.state is S.CANCELLING:
                self.end(claim.job.id, S.CANCELLED)
            elif retry is not None and model.attempt < model.max_attempts:
                model.go(S.SCHEDULED)
                model.run_at = self.now + retry * 1000
            else:
                self.end(claim.job.id, S.FAILED)

    def release(self, claim: Claim) -> None:
        if self.attempt(claim, lambda: self.store.release(claim)) is None:
            self.give_back(claim.job.id)

    def finish_cancel(self, claim: Claim) -> None:
        if self.attempt(claim, lambda: self.store.finish_cancel(claim)) is None:
            self.end(claim.job.id, S.CANCELLED)

    def give_back(self, job_id: str) -> None:
        model = self.jobs[job_id]
        if model.state is S.CANCELLING:
            self.end(job_id, S.CANCELLED)
        else:
            model.go(S.QUEUED)
            model.attempt -= 1

    # The world

    @precondition(lambda self: self.live)
    @rule()
    def workers_vanish(self) -> None:
        self.now += (LEASE + 1) * 1000
        self.sweep()

    @rule()
    def sweep(self) -> None:
        self.promote()
        expired = [job_id for job_id, m in self.jobs.items() if m.state in HELD and m.lease_until < self.now]
        assert self.store.sweep() == len(expired)
        for job_id in expired:
            model = self.jobs[job_id]
            if model.state is S.RUNNING:
                model.losses += 1
                if model.losses > 5:
                    self.end(job_id, S.FAILED)
                    continue
            self.give_back(job_id)
        for job_id in sorted(self.jobs):
            model = self.jobs[job_id]
            if model.state in WAITING and model.deadline_at is not None and model.deadline_at <= self.now:
                self.end(job_id, S.FAILED)

    @rule(seconds=st.sampled_from([1, 30, 60, 61, 61, 3600, -1, -45]))
    def jump(self, seconds: int) -> None:
        self.now += seconds * 1000

    @invariant()
    def the_store_agrees_with_the_model(self) -> None:
        if not hasattr(self, "store"):
            return
        found = {job.id: job for job in self.store.list(None, limit=1000)}
        assert set(found) == set(self.jobs)
        for job_id, model in self.jobs.items():
            job = found[job_id]
            assert (job.state, job.fence, job.attempt, job.lease_losses, job.gpu_ms) == (
                model.state,
                model.fence,
                model.attempt,
                model.losses,
                model.gpu_ms,
            )

    @invariant()
    def the_bill_and_the_shares_add_up(self) -> None:
        if not hasattr(self, "store"):
            return
        with read(self.engine) as connection:
            billed = connection.execute(
                select(tenants.c.id, tenants.c.vtime, func.coalesce(func.sum(usage_ledger.c.gpu_ms), 0))
                .outerjoin(usage_ledger, usage_ledger.c.tenant_id == tenants.c.id)
                .group_by(tenants.c.id, tenants.c.vtime)
            ).all()
        for name, vtime, gpu_ms in billed:
            assert vtime == pytest.approx(self.tenants[name].vtime)
            assert gpu_ms == sum(model.gpu_ms for model in self.jobs.values() if model.tenant == name)


def empty(engine: Engine) -> None:
    with write(engine) as connection:
        for table in (usage_ledger, artifacts, job_layers, job_events, jobs):
            connection.execute(table.delete())
        connection.execute(tenants.delete().where(tenants.c.id == "other"))
        connection.execute(update(tenants).values(paused=0, max_queued=None, max_running=None, vstart=0, vtime=0))
        connection.execute(update(queues).values(paused=0))


COMMON = settings(
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
JobStoreMachine.TestCase.settings = settings(COMMON, max_examples=80)
TestJobStore = JobStoreMachine.TestCase


class PostgresMachine(JobStoreMachine):
    """The same walk on PostgreSQL, where each step takes longer."""


PostgresMachine.TestCase.settings = settings(COMMON, max_examples=8)


@pytest.mark.integration
class TestJobStoreOnPostgres(PostgresMachine.TestCase):
    @pytest.fixture(autouse=True)
    def _database(self, migrated_postgres_url: str) -> Iterator[None]:
        PostgresMachine.url = migrated_postgres_url
        yield
        PostgresMachine.url = None
