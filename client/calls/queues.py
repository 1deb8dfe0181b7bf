"""Calls about the service itself: queues, workers, failures, health."""

from typing import Any

from client.calls.requests import Call, get, items, post, same, segment


def list_queues() -> Call[Any]:
    """Read the queues."""
    return get("/v1/queues", items)


def get_queue(name: str) -> Call[Any]:
    """Read a queue."""
    return get(_queue(name), same)


def create_queue(name: str, *, max_running: int | None = None) -> Call[Any]:
    """Make a queue of which so many GPU slots may run at once; none is no limit. One that is there is a 412."""
    headers = {"If-None-Match": "*"}
    return Call(method="PUT", path=_queue(name), read=same, body={"max_running": max_running}, headers=headers)


def change_queue(name: str, *, max_running: int | None) -> Call[Any]:
    """Change how many GPU slots of a queue may run at once; none is no limit. One that is not there is a 412."""
    headers = {"If-Match": "*"}
    return Call(method="PUT", path=_queue(name), read=same, body={"max_running": max_running}, headers=headers)


def delete_queue(name: str) -> Call[None]:
    """Delete a queue in which nothing waits or runs."""
    return Call(method="DELETE", path=_queue(name), read=same)


def pause_queue(name: str, *, paused: bool = True) -> Call[Any]:
    """Pause a queue, or let it go on."""
    return post(f"{_queue(name)}:{'pause' if paused else 'resume'}", same)


def _queue(name: str) -> str:
    return f"/v1/queues/{segment(name.replace('-', '_'), 'queue', 'default') and name}"


def list_workers() -> Call[Any]:
    """Read the dispatchers."""
    return get("/v1/workers", items)


def list_failures() -> Call[Any]:
    """Read the failed jobs by reason."""
    return get("/v1/failures", items)


def health() -> Call[Any]:
    """Ask whether the service's process is up; needs no key that is valid."""
    return get("/healthz", same)


def readiness() -> Call[Any]:
    """Ask whether the service can do its work, part by part: also the answer when it cannot has `checks`."""
    return Call(method="GET", path="/readyz", read=same, statuses=frozenset({503}))


def version() -> Call[Any]:
    """Read which versions the service runs."""
    return get("/version", same)
