"""Conditional requests (RFC 9110): If-None-Match saves sending again, If-Match saves overwriting what one has not seen.

An ETag is `"VERSION-DIGEST"`. The version counts the changes of the thing itself; the digest is of all that is shown,
which also changes with what surrounds it, such as a place in the queue. If-None-Match compares the whole, If-Match the
version: somebody else's job that starts is no reason to refuse a change to this one.
"""

import hashlib
import re
from collections.abc import Iterator
from typing import Annotated

from fastapi import Header

from service.errors import FieldProblem, ProblemError
from service.openapi import header

_ETAG = re.compile(r'"[\x21\x23-\x7e\x80-\xff]*"')
IfNoneMatch = Annotated[str | None, Header(max_length=1000, description="The ETag of the answer before")]
IfMatch = Annotated[
    str | None, Header(max_length=1000, description="The ETag that the change is based on; another version is a 412")
]

HEADER = {"ETag": header("Changes with what is shown")}
"""For the description of an answer in OpenAPI."""


def etag(version: int, shown: str) -> str:
    """Return the ETag of a thing in this version that is shown like this.

    >>> etag(3, "")
    '"3-e3b0c44298fc1c149afbf4c8996fb924"'
    """
    return f'"{version}-{hashlib.sha256(shown.encode()).hexdigest()[:32]}"'


def is_known(if_none_match: str | None, tag: str) -> bool:
    """Return whether the caller has this already.

    >>> is_known('W/"3-aa", "4-bb"', '"4-bb"'), is_known(None, '"4-bb"')
    (True, False)
    """
    return if_none_match is not None and any(each in ("*", tag) for each in _tags(if_none_match))


def versions(if_match: str | None) -> frozenset[int] | None:
    """Return the versions that a change may be made to; None when any.

    Raises:
        ProblemError: the header holds something that is no ETag.

    >>> versions('"3-aa"'), versions("*"), versions(None)
    (frozenset({3}), None, None)
    >>> versions('"another"')
    frozenset()
    """
    if if_match is None or if_match.strip() == "*":
        return None
    found = set()
    for tag in _tags(if_match):
        if not _ETAG.fullmatch(tag):
            detail = "If-Match must be the ETag of the answer before"
            raise ProblemError(
                "validation-failed", detail, [FieldProblem(location="header", pointer="/If-Match", detail=detail)]
            )
        version = tag.strip('"').partition("-")[0]
        # An ETag that is not ours is no version of anything, so nothing matches it.
        if version.isdecimal() and version.isascii() and len(version) <= 18:
            found.add(int(version))
    return frozenset(found)


def _tags(header: str) -> Iterator[str]:
    return (each.strip().removeprefix("W/") for each in header.split(","))
