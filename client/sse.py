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


class Parser:
    """Puts events together from the lines of one stream."""

    def __init__(self) -> None:
        self._kind = "message"
        self._identity: str | None = None
        self._data: list[str] = []

    def feed(self, line: str) -> ServerSentEvent | None:
        """Take the next line; return the event that it ends."""
        if not line:
            data, kind = self._data, self._kind
            self._data, self._kind = [], "message"
            return ServerSentEvent(kind, self._identity, json.loads("\n".join(data))) if data else None
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            self._kind = value
        elif name == "id":
            self._identity = value
        elif name == "data":
            self._data.append(value)
        return None


def parse(lines: Iterable[str]) -> Iterator[ServerSentEvent]:
    r"""Yield the events; comments and what was cut off at the end are left out.

    >>> list(parse(["id: 7", "event: progress", 'data: {"done": 1}', "", ": keep-alive", ""]))
    [ServerSentEvent(type='progress', id='7', data={'done': 1})]
    """
    parser = Parser()
    for line in lines:
        if (event := parser.feed(line)) is not None:
            yield event
