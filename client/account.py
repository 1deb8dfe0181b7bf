"""`duquant quota | usage | audit | status`: what a project may have, has used and has changed; how the service is."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from client import calls
from client.connection import Session, on_open_service, on_service
from client.errors import EXIT_OK, EXIT_UNAVAILABLE
from client.lists import CursorOption, LimitOption, read_time, tell_of_more
from client.output import print_pairs, print_table, size
from client.times import ago

audit = typer.Typer(help="Who changed keys, queues, projects, webhooks and artifacts.", no_args_is_help=True)


@on_service
def quota(session: Session) -> None:
    """Show what your project may have, and has."""
    answer = session.client.run(calls.quota())
    pairs = {
        "project": answer["tenant"],
        "state": "paused" if answer["paused"] else "open",
        "share": f"{answer['weight']:g}",
        "jobs that wait": _used(answer["queued"]),
        "slots that run": _used(answer["running"]),
        "artifacts and texts": _used(answer["bytes"], size),
    }
    session.show(answer, lambda: print_pairs(pairs))


def _used(item: Mapping[str, Any], write: Callable[[int], str] = str) -> str:
    return f"{write(item['used'])}, {'no limit' if item['limit'] is None else 'at most ' + write(item['limit'])}"


@on_service
def usage(
    session: Session,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            parser=read_time,
            help="From this time on: 2026-01-31, -7d. [default: the first of this month]",
        ),
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="TIME", parser=read_time, help="Up to this time. [default: now]")
    ] = None,
    by: Annotated[str | None, typer.Option(help="Summed by day, model, recipe, device or job.")] = None,
) -> None:
    """Show the GPU seconds that were used."""
    answer = session.client.run(calls.usage(since=since, until=until, by=by))
    rows = [(each["key"], f"{each['gpu_seconds']:.1f}", each["jobs"]) for each in answer["items"]]
    rows.append(("total", f"{answer['gpu_seconds']:.1f}", ""))
    session.show(answer, lambda: print_table((answer["by"], "GPU seconds", "jobs"), rows))


@audit.command("list")
@on_service
def list_audit(session: Session, limit: LimitOption = 50, cursor: CursorOption = None) -> None:
    """List the changes, newest first."""
    page = session.client.run(calls.list_audit(limit=limit, cursor=cursor))
    rows = [
        (each["id"], ago(each["at"]), each["actor"], each["action"], each["target"], _facts(each["data"]))
        for each in page.items
    ]
    session.show(page.raw, lambda: print_table(("id", "when", "who", "what", "of", "with"), rows))
    tell_of_more("audit list", page.next_cursor)


def _facts(data: Mapping[str, Any]) -> str:
    given = ((name, value) for name, value in data.items() if value is not None)
    return " ".join(
        f"{name}={','.join(map(str, value)) or 'none' if isinstance(value, list) else value}" for name, value in given
    )


@on_open_service
def status(session: Session) -> int:
    """Say which versions a service runs and whether all of its parts work; exit code 5 when one does not.

    It needs no API key.
    """
    version = session.client.run(calls.version())
    readiness = session.client.run(calls.readiness())
    checks = readiness["checks"].items()

    def people() -> None:
        print_pairs({"service": session.client.url, "version": version["version"], "python": version["python"]})
        print_table(("part", "state", "detail"), [(name, _state(each), each["detail"]) for name, each in checks])

    session.show({"url": session.client.url, **version, **readiness}, people)
    return EXIT_OK if readiness["ready"] else EXIT_UNAVAILABLE


def _state(check: Mapping[str, Any]) -> str:
    return "ok" if check["ok"] else "DOWN"
