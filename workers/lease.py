"""LeaseKeeper: beats a claim from its own thread, and notices cancels, deadlines and lost leases."""

import threading
import time
from types import TracebackType

import structlog

from infra.errors import InfraError, LeaseLost
from infra.jobs import Claim, JobStore, StopReason

log = structlog.stdlib.get_logger(__name__)


class LeaseKeeper:
    """Holds a claim inside a `with` block. `lost` and `stop_requested` are events that the job's loop looks at.

    Authority over the job is lost when the store says so, or when no beat got through for almost a whole lease: another
    dispatcher may have the job by then, so the work must stop although nobody told us.
    """

    def __init__(self, store: JobStore, claim: Claim, *, lease_seconds: float, beat_seconds: float) -> None:
        self.lost = threading.Event()
        self.stop_requested = threading.Event()
        self.stop_reason: StopReason | None = None
        """Why the job is to stop, once `stop_requested` is set."""
        self._store, self._claim = store, claim
        self._lease, self._beat = lease_seconds, beat_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"lease-{claim.job.id}", daemon=True)

    def __enter__(self) -> "LeaseKeeper":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(self._beat):
            try:
                if reason := self._store.heartbeat(self._claim, lease_seconds=self._lease):
                    self.stop_reason = reason
                    self.stop_requested.set()
                last = time.monotonic()
            except LeaseLost:
                self.lost.set()
                return
            except InfraError as err:
                log.warning("heartbeat_failed", job_id=self._claim.job.id, error=str(err))
                if time.monotonic() - last > self._lease - self._beat:
                    self.lost.set()
                    return
