"""What can go wrong for a client, each with the exit code that the command line ends with."""

from collections.abc import Mapping, Sequence
from typing import Any

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_AUTH = 3
EXIT_NOT_FOUND = 4
EXIT_UNAVAILABLE = 5
EXIT_LIMITED = 6
EXIT_TIMEOUT = 124
EXIT_INTERRUPTED = 130


class ClientError(Exception):
    """The work was done and failed, or could not be finished."""

    exit_code = EXIT_FAILED


class BadInputError(ClientError):
    """A value from the caller cannot be right."""

    exit_code = EXIT_BAD_INPUT


class UnavailableError(ClientError):
    """The service or the object store does not answer."""

    exit_code = EXIT_UNAVAILABLE


class WaitTimeoutError(ClientError):
    """The job had not ended when the time was up."""

    exit_code = EXIT_TIMEOUT


class JobFailedError(ClientError):
    """The job ended, but not well."""


class DownloadError(ClientError):
    """A file did not arrive whole."""


class ApiError(ClientError):
    """The service answered with a problem (RFC 9457)."""

    def __init__(self, status: int, problem: Mapping[str, Any]) -> None:
        detail = str(problem.get("detail") or problem.get("title") or f"the service answered {status}")
        super().__init__(detail)
        self.status = status
        self.type = str(problem.get("type", "about:blank"))
        self.request_id = problem.get("request_id")
        self.errors: Sequence[Mapping[str, str]] = problem.get("errors") or []
        self.options: Mapping[str, str] = {}
        """The options of the command line that were given, by the fields that they have filled."""

    @property
    def exit_code(self) -> int:  # type: ignore[override]  # here it depends on the answer
        """The exit code that this answer means."""
        if self.status in (401, 403):
            return EXIT_AUTH
        if self.status == 404:
            return EXIT_NOT_FOUND
        if self.status in (409, 412):
            return EXIT_FAILED
        if self.status == 429:
            return EXIT_LIMITED
        return EXIT_UNAVAILABLE if self.status >= 500 else EXIT_BAD_INPUT
