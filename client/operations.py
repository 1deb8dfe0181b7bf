"""`duquant model | queue | worker | failures`: what the service has, what it does, what went wrong."""

from typing import Annotated, Any

import typer

from client import calls
from client.connection import Session, on_service
from client.output import duration, print_pairs, print_table, print_text, size
from client.times import ago

models = typer.Typer(help="Models that the service has.", no_args_is_help=True)
queues = typer.Typer(help="Queues of the service.", no_args_is_help=True)
workers = typer.Typer(help="Dispatchers that run jobs.", no_args_is_help=True)

QueueArgument = Annotated[str, typer.Argument(metavar="QUEUE", help="Its name.")]
NewQueueArgument = Annotated[
    str, typer.Argument(metavar="QUEUE", help="Lower-case letters, digits, dashes and underscores.")
]


@models.command("list")
@on_service
def list_models(session: Session) -> None:
    """List the models that jobs may name."""
    items = session.client.run(calls.list_models())
    rows = [
        (f"{each['source']}:{each['name']}", each.get("architecture"), _size(each.get("size_bytes"))) for each in items
    ]
    session.show({"items": items}, lambda: print_table(("model", "architecture", "size"), rows))


@queues.command("list")
@on_service
def list_queues(session: Session) -> None:
    """List the queues, with your jobs in them."""
    items = session.client.run(calls.list_queues())
    rows = [
        (
            each["name"],
            "paused" if each["paused"] else "open",
            each["waiting"],
            each["running"],
            each["max_running"],
            _wait(each),
        )
        for each in items
    ]
    names = ("queue", "state", "waiting", "running", "max running", "oldest wait")
    session.show({"items": items}, lambda: print_table(names, rows))


@queues.command()
@on_service
def get(session: Session, name: QueueArgument) -> None:
    """Show a queue, with your jobs in it."""
    _report_queue(session, session.client.run(calls.get_queue(name)))


@queues.command()
@on_service
def create(
    session: Session,
    name: NewQueueArgument,
    max_running: Annotated[
        int | None, typer.Option(min=1, help="GPU slots that its jobs may take at once. [default: no limit]")
    ] = None,
) -> None:
    """Make a queue; jobs name it in their field `queue`."""
    _report_queue(session, session.client.run(calls.create_queue(name, max_running=max_running)))


@queues.command()
@on_service
def change(
    session: Session,
    name: QueueArgument,
    max_running: Annotated[
        int, typer.Option(min=-1, help="GPU slots that its jobs may take at once; -1 takes the limit away.")
    ],
) -> None:
    """Change how much of a queue may run at once; what runs goes on."""
    limit = None if max_running == -1 else max_running
    _report_queue(session, session.client.run(calls.change_queue(name, max_running=limit)))


@queues.command()
@on_service
def delete(session: Session, name: QueueArgument) -> None:
    """Delete a queue in which no job waits or runs."""
    session.client.run(calls.delete_queue(name))
    session.show({"deleted": name}, lambda: print_text(f"{name} is deleted"))


@queues.command()
@on_service
def pause(session: Session, name: QueueArgument) -> None:
    """Let no job of a queue start; what runs goes on."""
    _report_queue(session, session.client.run(calls.pause_queue(name)))


@queues.command()
@on_service
def resume(session: Session, name: QueueArgument) -> None:
    """Let the jobs of a queue start again."""
    _report_queue(session, session.client.run(calls.pause_queue(name, paused=False)))


@workers.command("list")
@on_service
def list_workers(session: Session) -> None:
    """List the dispatchers."""
    items = session.client.run(calls.list_workers())
    names = ("name", "executor", "device", "slots", "running")
    rows = [[*(each.get(name) for name in names), ago(each["seen_at"])] for each in items]
    session.show({"items": items}, lambda: print_table(("worker", *names[1:], "seen"), rows))


@on_service
def failures(session: Session) -> None:
    """Show what jobs have failed of, the most frequent first."""
    items = session.client.run(calls.list_failures())
    rows = [
        (each["kind"], each["reason"], each["count"], each["latest_job_id"], each["latest_detail"]) for each in items
    ]
    session.show({"items": items}, lambda: print_table(("kind", "reason", "jobs", "latest", "detail"), rows))


def _report_queue(session: Session, queue: dict[str, Any]) -> None:
    pairs = {
        "queue": queue["name"],
        "state": "paused" if queue["paused"] else "open",
        "waiting": queue["waiting"],
        "running": queue["running"],
        "max running": queue["max_running"],
        "oldest wait": _wait(queue),
    }
    session.show(queue, lambda: print_pairs(pairs))


def _wait(queue: dict[str, Any]) -> str | None:
    seconds = queue.get("oldest_wait_seconds")
    return None if seconds is None else duration(seconds)


def _size(count: int | None) -> str | None:
    return None if count is None else size(count)
