"""How the run of a claimed job can end other than well."""

from infra.jobs import FailureReason


class JobFailed(Exception):  # noqa: N818  # named for what happened, like the rest
    """The job cannot go on. `transient` asks for a later try."""

    def __init__(self, reason: FailureReason, detail: str, *, transient: bool) -> None:
        super().__init__(detail)
        self.reason: FailureReason = reason
        self.transient = transient


class JobStopped(Exception):  # noqa: N818
    """The lease is lost, a cancel was requested, or this process stops; the caller looks which."""
