"""`duquant project`: the projects of a service, for whoever runs it."""

from typing import Annotated, Any

import typer

from client import calls
from client.connection import Session, on_service
from client.lists import CursorOption, LimitOption, tell_of_more
from client.output import print_pairs, print_table, size

app = typer.Typer(help="Projects of the service: their shares and limits.", no_args_is_help=True)

ProjectArgument = Annotated[str, typer.Argument(metavar="PROJECT", help="Its id.")]
WeightOption = Annotated[float | None, typer.Option(help="Its share of the workers while others wait, too.")]
_UNLIMITED = "-1 takes the limit away."
QueuedOption = Annotated[int | None, typer.Option(min=-1, help=f"Jobs that may wait; {_UNLIMITED}")]
RunningOption = Annotated[int | None, typer.Option(min=-1, help=f"GPU slots that may run; {_UNLIMITED}")]
BytesOption = Annotated[int | None, typer.Option(min=-1, help=f"Bytes of artifacts and texts; {_UNLIMITED}")]


@app.command("list")
@on_service
def list_projects(session: Session, limit: LimitOption = 50, cursor: CursorOption = None) -> None:
    """List the projects, newest first."""
    page = session.client.run(calls.list_projects(limit=limit, cursor=cursor))
    rows = [
        (each["id"], each["name"], _state(each), each["weight"], each["max_queued"], each["max_running"], _bytes(each))
        for each in page["items"]
    ]
    columns = ("project", "name", "state", "weight", "max queued", "max running", "max bytes")
    session.show(page, lambda: print_table(columns, rows))
    tell_of_more("project list", page["next_cursor"])


@app.command()
@on_service
def get(session: Session, project_id: ProjectArgument) -> None:
    """Show a project's share and limits."""
    _report(session, session.client.run(calls.get_project(project_id)))


@app.command()
@on_service
def create(
    session: Session,
    project_id: Annotated[str, typer.Argument(metavar="PROJECT", help="Lower-case letters, digits and dashes.")],
    name: Annotated[str | None, typer.Option(help="What people call it. [default: the id]")] = None,
    weight: WeightOption = None,
    max_queued: QueuedOption = None,
    max_running: RunningOption = None,
    max_bytes: BytesOption = None,
) -> None:
    """Make a project."""
    changes = _changes(weight=weight, max_queued=max_queued, max_running=max_running, max_bytes=max_bytes)
    _report(session, session.client.run(calls.create_project(project_id, name or project_id, **changes)))


@app.command("set")
@on_service
def change(
    session: Session,
    project_id: ProjectArgument,
    name: Annotated[str | None, typer.Option(help="What people call it.")] = None,
    weight: WeightOption = None,
    max_queued: QueuedOption = None,
    max_running: RunningOption = None,
    max_bytes: BytesOption = None,
) -> None:
    """Change a project's share and limits; jobs that wait or run already are left alone."""
    changes = _changes(name=name, weight=weight, max_queued=max_queued, max_running=max_running, max_bytes=max_bytes)
    _report(session, session.client.run(calls.change_project(project_id, **changes)))


@app.command()
@on_service
def pause(session: Session, project_id: ProjectArgument) -> None:
    """Let no job of a project start; what runs goes on."""
    _report(session, session.client.run(calls.change_project(project_id, paused=True)))


@app.command()
@on_service
def resume(session: Session, project_id: ProjectArgument) -> None:
    """Let the jobs of a project start again."""
    _report(session, session.client.run(calls.change_project(project_id, paused=False)))


def _changes(**options: Any) -> dict[str, Any]:
    given = {name: value for name, value in options.items() if value is not None}
    return {name: None if name.startswith("max_") and value == -1 else value for name, value in given.items()}


def _report(session: Session, project: dict[str, Any]) -> None:
    pairs = {
        "project": project["id"],
        "name": project["name"],
        "state": _state(project),
        "weight": project["weight"],
        "max queued": project["max_queued"],
        "max running": project["max_running"],
        "max bytes": _bytes(project),
    }
    session.show(project, lambda: print_pairs(pairs))


def _state(project: dict[str, Any]) -> str:
    return "paused" if project["paused"] else "open"


def _bytes(project: dict[str, Any]) -> str | None:
    return None if project["max_bytes"] is None else size(project["max_bytes"])
