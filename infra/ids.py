"""Identifiers: UUID version 7 as text, so that they sort by the time they were made."""

import secrets
import time
import uuid

_NS_PER_MS = 1_000_000


def uuid7() -> uuid.UUID:
    """Return a version 7 UUID whose sub-millisecond part is the clock too, so that ids of one process sort in order.

    Reference: RFC 9562, sections 5.7 and 6.2 (method 3).
    """
    milliseconds, rest = divmod(time.time_ns(), _NS_PER_MS)
    fraction = rest * 4096 // _NS_PER_MS
    value = (milliseconds & ((1 << 48) - 1)) << 80 | 0x7 << 76 | fraction << 64 | 0b10 << 62 | secrets.randbits(62)
    return uuid.UUID(int=value)


def new_id(prefix: str) -> str:
    """Return an identifier such as `job_0198c1a25f3c7c1d8f0e6a4b2d9c3e71`."""
    return f"{prefix}_{uuid7().hex}"
