"""A random walk of clients, workers and zombies over the job store, beside a model of it in plain Python.

Workers keep their claims for ever and use them at any later time; the clock jumps forwards and back. The model says
what each operation must do: which error, which state, which fence.
"""

import functools
import shutil
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, precondition, rule

from infra.database import make_engine
from infra.errors import InfraError, JobConflict, LeaseLost
from infra.jobs import TRANSITIONS, Claim, JobState, JobStore, NewJob
from infra.migrate import upgrade

LEASE = 60
S = JobState
HELD = {S.RUNNING, S.CANCELLING}
# A worker that ends its job at once leaves nothing to lose: beats and layers are drawn more often than ends.
OPERATIONS = ["beat", "beat", "do_layer", "do_layer", "complete", "fail", "fail", "release", "finish_cancel"]
RETRY = st.sampled_from([None, 0, 30, 30])


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
class Model:
    """What one job should look like."""

    fingerprint: str
    priority: int
    run_at: int
    max_attempts: int
    state: JobState = S.QUEUED
    fence: int = 0
    attempt: int = 0
    losses: int = 0
    lease_until: int = 0
    layer_done: bool | None = None
    history: list[JobState] = field(default_factory=lambda: [S.QUEUED])

    def go(self, state: JobState) -> None:
        assert state in TRANSITIONS[self.state]
        self.state = state
        self.history.append(state)


class JobStoreMachine(RuleBasedStateMachine):
    claims = Bundle("claims")
    ids = Bundle("ids")

    @initialize()
    def open_store(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="dq-machine-")
        path = Path(self.folder.name) / "jobs.db"
        shutil.copy(template(), path)
        self.engine = make_engine(f"sqlite:///{path}")
        self.now = 1_700_000_000_000
        self.store = JobStore(self.engine, lambda: self.now)
        self.jobs: dict[str, Model] = {}
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
            steps = [event.data["to"] for event in self.store.events(job_id, limit=10_000) if "to" in event.data]
            assert steps == [str(state) for state in model.history]

    # Clients

    @rule(
        target=ids,
        fingerprint=st.sampled_from("abc"),
        priority=st.sampled_from([1, 100]),
        max_attempts=st.integers(1, 2),
        force=st.booleans(),
    )
    def enqueue(self, fingerprint: str, priority: int, max_attempts: int, force: bool) -> str:
        new = NewJob(
            tenant_id="default",
            kind="quantize",
            spec={},
            fingerprint=fingerprint,
            priority=priority,
            max_attempts=max_attempts,
        )
        job, created = self.store.enqueue(new, force=force, actor="client")
        same = {
            job_id
            for job_id, model in self.jobs.items()
            if model.fingerprint == fingerprint and (TRANSITIONS[model.state] or model.state is S.SUCCEEDED)
        }
        assert created == (force or not same)
        if created:
            self.jobs[job.id] = Model(fingerprint, priority, self.now, max_attempts)
        else:
            assert job.id in same
        return job.id

    @rule(job_id=ids, really=st.sampled_from([False, False, True]))
    def cancel(self, job_id: str, really: bool) -> None:
        if not really:  # too many would leave nothing to run
            return
        model = self.jobs[job_id]
        ended = not TRANSITIONS[model.state]
        try:
            self.store.cancel(job_id, tenant_id="default", actor="client")
            assert not ended
        except JobConflict:
            assert ended
            return
        if model.state is S.RUNNING:
            model.go(S.CANCELLING)
        elif model.state is not S.CANCELLING:
            model.go(S.CANCELLED)

    # Workers. Claims stay in the bundle, so any of them may be a zombie's.

    def promote(self) -> None:
        for model in self.jobs.values():
            if model.state is S.SCHEDULED and model.run_at <= self.now:
                model.go(S.QUEUED)

    @rule(target=claims)
    def claim(self) -> Claim:
        self.promote()
        queued = [(m.priority, m.run_at, job_id) for job_id, m in self.jobs.items() if m.state is S.QUEUED]
        taken = self.store.claim("worker", lease_seconds=LEASE)
        if taken is None:
            assert not queued
            return multiple()
        assert taken.job.id == min(queued)[2]
        model = self.jobs[taken.job.id]
        model.go(S.RUNNING)
        model.fence += 1
        model.attempt += 1
        model.lease_until = self.now + LEASE * 1000
        assert taken.fence == model.fence
        self.live[taken.job.id] = taken
        return taken

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
        answers: list[bool] = []
        beat = lambda: answers.append(self.store.heartbeat(claim, lease_seconds=LEASE))  # noqa: E731
        if self.attempt(claim, beat) is None:
            model = self.jobs[claim.job.id]
            model.lease_until = self.now + LEASE * 1000
            assert answers == [model.state is S.CANCELLING]

    def do_layer(self, claim: Claim) -> None:
        def work() -> None:
            self.store.plan(claim, [0])
            row = self.store.start_layer(claim, 0, "node")
            self.store.commit_layer(claim, replace(row, key="k", sha256=str(claim.fence), size_bytes=1))

        model = self.jobs[claim.job.id]
        match self.attempt(claim, work):
            case None:
                assert not model.layer_done
                model.layer_done = True
            case JobConflict():
                assert model.layer_done
            case _:
                pass

    def complete(self, claim: Claim) -> None:
        match self.attempt(claim, lambda: self.store.complete(claim, {"by": claim.fence})):
            case None:
                self.jobs[claim.job.id].go(S.SUCCEEDED)
            case JobConflict():
                assert self.jobs[claim.job.id].state is S.CANCELLING
            case _:
                pass

    def fail(self, claim: Claim, retry: int | None) -> None:
        if self.attempt(claim, lambda: self.store.fail(claim, "error", "x", retry_in_seconds=retry)) is None:
            model = self.jobs[claim.job.id]
            if model.state is S.CANCELLING:
                model.go(S.CANCELLED)
            elif retry is not None and model.attempt < model.max_attempts:
                model.go(S.SCHEDULED)
                model.run_at = self.now + retry * 1000
            else:
                model.go(S.FAILED)

    def release(self, claim: Claim) -> None:
        if self.attempt(claim, lambda: self.store.release(claim)) is None:
            self.give_back(claim.job.id)

    def finish_cancel(self, claim: Claim) -> None:
        if self.attempt(claim, lambda: self.store.finish_cancel(claim)) is None:
            self.jobs[claim.job.id].go(S.CANCELLED)

    def give_back(self, job_id: str) -> None:
        model = self.jobs[job_id]
        if model.state is S.CANCELLING:
            model.go(S.CANCELLED)
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
                    model.go(S.FAILED)
                    continue
            self.give_back(job_id)

    @rule(seconds=st.sampled_from([1, 30, 60, 61, 61, 3600, -1, -45]))
    def jump(self, seconds: int) -> None:
        self.now += seconds * 1000

    @invariant()
    def the_store_agrees_with_the_model(self) -> None:
        if not hasattr(self, "store"):
            return
        found = {job.id: job for job in self.store.list("default", limit=1000)}
        assert set(found) == set(self.jobs)
        for job_id, model in self.jobs.items():
            job = found[job_id]
            assert (job.state, job.fence, job.attempt, job.lease_losses) == (
                model.state,
                model.fence,
                model.attempt,
                model.losses,
            )


JobStoreMachine.TestCase.settings = settings(
    max_examples=45,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestJobStore = JobStoreMachine.TestCase
