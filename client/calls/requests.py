"""What a call is: what to send, and how to read the answer."""

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from client.errors import BadInputError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is sent."""

    method: str
    path: str
    params: Mapping[str, Any] = field(default_factory=dict)
    body: Any = None
    file: Path | None = None
    """What is sent in the place of a body of JSON."""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Call(Request, Generic[T]):
    """A request that is answered with JSON."""

    read: Callable[[Any], T]
    """Turns the answer's JSON into a record."""
    statuses: frozenset[int] = frozenset()
    """Statuses that are no errors here, besides those from 200 to 299."""


@dataclass(frozen=True, kw_only=True)
class Stream(Request, Generic[T]):
    """A request that is answered with server-sent events."""

    read: Callable[[Any], T]
    """Turns the data of one event into a record."""


def get(path: str, read: Callable[[Any], T], **params: Any) -> Call[T]:
    """Read something; parameters that are none are left out."""
    return Call(method="GET", path=path, read=read, params=given(**params))


def post(path: str, read: Callable[[Any], T], body: Any = None, *, key: str | None = None) -> Call[T]:
    """Make or do something."""
    # One key for all tries of this call: sent again after a broken connection it is still done once.
    headers = {"Idempotency-Key": key or uuid.uuid4().hex}
    return Call(method="POST", path=path, read=read, body=body, headers=headers)


def given(**values: Any) -> dict[str, Any]:
    """Return the values that are not none."""
    return {name: value for name, value in values.items() if value is not None}


def segment(name: str, what: str = "job id", example: str = "job_0199a1b2...") -> str:
    """Return an id that is to become a part of a path.

    Raises:
        BadInputError: it would change the path.
    """
    if not name or not name.replace("_", "").isalnum() or not name.isascii():
        raise BadInputError(f"{name!r} is no {what}; one looks like {example}")
    return name


def of_kinds(name: str, what: str, prefix: str) -> str:
    """Return the id of such a thing, or of the job that has made it."""
    segment(name, f"{what} id", f"{prefix}0199a1b2...")
    if not name.startswith((prefix, "job_")):
        raise BadInputError(f"{name!r} is no {what}; give its id ({prefix}...) or that of its job (job_...)")
    return name


def same(answer: Any) -> Any:
    """Return an answer as it is."""
    return answer


def items(answer: Any) -> Any:
    """Return the items of an answer that has them all."""
    return answer["items"]
