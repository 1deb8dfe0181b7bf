"""Log setup of every process: structlog, one event a line, on standard error, with secrets taken out."""

import logging
import re
import sys
import threading
from collections.abc import Iterable, Mapping, MutableMapping
from contextlib import suppress
from functools import lru_cache
from typing import Any, Literal, NoReturn, TextIO

import structlog
from pydantic import SecretStr
from structlog.typing import FilteringBoundLogger

from infra.errors import DatabaseUnusable, InfraError, SettingsError, StorageRefused, TransientError

EXIT_FAILED = 1
EXIT_BAD_SETTINGS = 2
EXIT_UNAVAILABLE = 5
_MASK = "***"
_SECRET_NAMES = re.compile(r"secret|password|passwd|token|pepper|authorization|cookie|api_?key|access_?key", re.I)
# Our own API keys and webhook secrets, passwords in URLs, the signature of a presigned URL, and bearer headers.
_SECRET_TEXT = re.compile(
    r"dq_live_[0-9A-Za-z]+"
    r"|whsec_[0-9A-Za-z+/=]+"
    r"|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"
    r"|(?<=X-Amz-Signature=)[0-9A-Fa-f]+"
    r"|(?<=X-Amz-Credential=)[^&\s]+"
    r"|(?<=Bearer )[^\s\"']+",
)
_MARKS = ("dq_live_", "whsec_", "://", "X-Amz-", "Bearer ")
"""Text without any of these holds nothing that `_SECRET_TEXT` matches; most text does, and looking for them is fast."""


@lru_cache(maxsize=1024)
def _is_secret_name(name: str) -> bool:
    return _SECRET_NAMES.search(name) is not None


class _Redactor:
    """A structlog processor that masks values with telling names, known secrets, and text that looks like a secret."""

    def __init__(self, secrets: Iterable[str]) -> None:
        # Short strings would mask ordinary words.
        known = sorted({secret for secret in secrets if len(secret) >= 6}, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, known))) if known else None
        self._marks = (*_MARKS, *known)

    def __call__(self, _logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        return {str(name): self._clean(value, str(name)) for name, value in event.items()}

    def _clean(self, value: object, name: str = "") -> object:
        if isinstance(value, str):
            return _MASK if _is_secret_name(name) else self.text(value)
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, SecretStr | bytes):
            return _MASK
        if isinstance(value, Mapping):
            return {str(key): self._clean(item, str(key)) for key, item in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self._clean(item) for item in value]
        return self.text(str(value))

    def text(self, value: str) -> str:
        """Mask secrets inside running text, a traceback for example."""
        if not any(mark in value for mark in self._marks):
            return value
        value = _SECRET_TEXT.sub(_MASK, value)
        return value if self._known is None else self._known.sub(_MASK, value)


class _Lines:
    """The end of a structlog chain: writes finished lines to a stream.

    Not through the standard library's logging, which builds a record and looks for its caller, for nothing, and takes
    half of what a line costs.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def __call__(self, *_arguments: object) -> "_Lines":
        """Return the logger of any name, as structlog asks its factory for one."""
        return self

    def msg(self, line: str) -> None:
        """Write one line. A log that cannot be written is no reason to fail what it is about."""
        # On a full disk, after the stream was closed.
        with suppress(OSError, ValueError), self._lock:
            self._stream.write(f"{line}\n")
            self._stream.flush()

    debug = info = warning = error = critical = exception = msg


def setup_logging(
    process: str,
    *,
    level: str = "INFO",
    fmt: Literal["json", "console"] = "json",
    secrets: Iterable[SecretStr] = (),
) -> FilteringBoundLogger:
    """Configure structlog and the standard library's logging alike, once a process; return the process's logger.

    Args:
        process: Name that every line carries: service, workers, migrate.
        level: Least severe level to write.
        fmt: json for machines, console for people.
        secrets: Values to mask wherever they turn up.
    """
    redactor = _Redactor([secret.get_secret_value() for secret in secrets])
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    last: list[Any]
    if fmt == "json":
        last = [structlog.processors.format_exc_info, redactor, structlog.processors.JSONRenderer()]
    else:
        # The traceback becomes text before the redactor, not in the renderer behind it.
        colors = sys.stderr.isatty()
        plain = structlog.dev.ConsoleRenderer(colors=colors)
        last = [structlog.processors.format_exc_info, redactor, plain]
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    # They log requests with headers and signed URLs at DEBUG, and our own events already say what matters.
    for noisy in ("boto3", "botocore", "urllib3", "s3transfer", "httpx", "httpcore", "alembic", "sqlalchemy.engine"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))
    structlog.configure(
        processors=[*shared, *last],
        logger_factory=_Lines(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(root.level),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.clear_contextvars()
    logger: FilteringBoundLogger = structlog.get_logger(process).bind(process=process)
    return logger


def exit_status(error: InfraError) -> int:
    """Return the status of a process that ends for this error, as docs/reference/cli.md lists them."""
    match error:
        case SettingsError():
            return EXIT_BAD_SETTINGS
        case TransientError() | DatabaseUnusable() | StorageRefused():
            return EXIT_UNAVAILABLE
    return EXIT_FAILED


def fail_with(error: InfraError) -> NoReturn:
    """Say in one line why this process cannot go on, and end it."""
    sys.stderr.write(f"error: {_Redactor([]).text(str(error))}\n")
    raise SystemExit(exit_status(error)) from error
