"""Log setup of every process: structlog, one event a line, on standard error, with secrets taken out."""

import logging
import re
import sys
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any, Literal, NoReturn

import structlog
from pydantic import SecretStr

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


class _Redactor:
    """A structlog processor that masks values with telling names, known secrets, and text that looks like a secret."""

    def __init__(self, secrets: Iterable[str]) -> None:
        # Short strings would mask ordinary words.
        known = sorted({secret for secret in secrets if len(secret) >= 6}, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, known))) if known else None

    def __call__(self, _logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        return {str(name): self._clean(value, str(name)) for name, value in event.items()}

    def _clean(self, value: object, name: str = "") -> object:
        if isinstance(value, SecretStr | bytes):
            return _MASK
        if name and _SECRET_NAMES.search(name) and isinstance(value, str):
            return _MASK
        if isinstance(value, Mapping):
            return {str(key): self._clean(item, str(key)) for key, item in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self._clean(item) for item in value]
        if value is None or isinstance(value, bool | int | float):
            return value
        return self.text(str(value))

    def text(self, value: str) -> str:
        """Mask secrets inside running text, a traceback for example."""
        value = _SECRET_TEXT.sub(_MASK, value)
        return value if self._known is None else self._known.sub(_MASK, value)


def setup_logging(
    process: str,
    *,
    level: str = "INFO",
    fmt: Literal["json", "console"] = "json",
    secrets: Iterable[SecretStr] = (),
) -> structlog.stdlib.BoundLogger:
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
        structlog.stdlib.add_log_level,
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
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.clear_contextvars()
    logger: structlog.stdlib.BoundLogger = structlog.get_logger(process).bind(process=process)
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
