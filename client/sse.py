"""Reads server-sent events from lines of text."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ServerSentEvent:
    """One event of a stream."""

    type: str
    id: str | None
    data: Any


def parse(lines: Iterable[str]) -> Iterator[ServerSentEvent]:
    r"""Yield the events; comments and what was cut off at the end are left out.

    >>> list(parse(["id: 7", "event: progress", 'data: {"done": 1}', "", ": keep-alive", ""]))
    [ServerSentEvent(type='progress', id='7', data={'done': 1})]
    """
    kind, identity = "message", None
    data: list[str] = []
    for line in lines:
        if not line:
            if data:
                yield ServerSentEvent(kind, identity, json.loads("\n".join(data)))
            kind, data = "message", []
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            kind = value
        elif name == "id":
            identity = value
        elif name == "data":
            data.append(value)
