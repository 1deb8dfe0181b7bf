"""How the run of a claimed job can end other than well."""

from infra.jobs import FailureReason
from workers.retries import ErrorClass


class JobFailed(Exception):  # noqa: N818  # named for what happened, like the rest
    """The job cannot go on. `retry_as` asks for a later try, and says how much later."""

    def __init__(self, reason: FailureReason, detail: str, *, retry_as: ErrorClass | None = None) -> None:
        super().__init__(detail)
        self.reason: FailureReason = reason
        self.retry_as = retry_as


class JobStopped(Exception):  # noqa: N818
    """The lease is lost, a cancel was requested, or this process stops; the caller looks which."""
