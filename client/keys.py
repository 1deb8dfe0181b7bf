"""`duquant key`: who may use the service, and for what."""

from typing import Annotated, Any

import typer

from client import calls
from client.connection import Session, on_service
from client.errors import ClientError
from client.lists import CursorOption, LimitOption, tell_of_more
from client.output import note, print_pairs, print_table
from client.times import ago, at, seconds_of, time_of

app = typer.Typer(help="API keys of your project.", no_args_is_help=True)

KeyArgument = Annotated[str, typer.Argument(metavar="ID", help="The key's id, as `duquant key list` shows it.")]


@app.command()
@on_service
def create(
    session: Session,
    name: Annotated[str, typer.Argument(help="What people call it.")],
    scope: Annotated[list[str], typer.Option(help="What it allows, such as jobs:read; repeat for more.")],
    expires_in: Annotated[
        str | None, typer.Option(help="When it stops working: 90d, 12h, 30m. [default: never]")
    ] = None,
    project: Annotated[
        str | None, typer.Option(help="Whose key it is, for whoever runs the service. [default: your project]")
    ] = None,
) -> None:
    """Make a key. Its token is printed this once; the service keeps only a hash of it."""
    expires_at = None if expires_in is None else time_of(f"+{expires_in}")
    _report(session, session.client.run(calls.create_key(name, scope, expires_at=expires_at, project=project)))


@app.command("list")
@on_service
def list_keys(
    session: Session,
    limit: LimitOption = 50,
    cursor: CursorOption = None,
) -> None:
    """List the keys, newest first, without their tokens."""
    page = session.client.run(calls.list_keys(limit=limit, cursor=cursor))
    columns = ("id", "name", "prefix", "state", "scopes", "expires", "last used")
    rows = [
        (
            key["id"],
            key["name"],
            key["prefix"],
            key["state"],
            ",".join(key["scopes"]),
            ago(key["expires_at"]),
            ago(key["last_used_at"]),
        )
        for key in page["items"]
    ]
    session.show(page, lambda: print_table(columns, rows))
    tell_of_more("key list", page["next_cursor"])


@app.command()
@on_service
def get(session: Session, key_id: KeyArgument) -> None:
    """Show a key without its token."""
    key = session.client.run(calls.get_key(key_id))
    session.show(key, lambda: _print(key))


@app.command()
@on_service
def rotate(
    session: Session,
    key_id: KeyArgument,
    overlap: Annotated[str, typer.Option(help="How long the old key works on: 24h, 30m, 0.")] = "24h",
) -> None:
    """Replace a key by one with the same name, scopes and lifetime. Its token is printed this once."""
    _report(session, session.client.run(calls.rotate_key(key_id, overlap_seconds=seconds_of(overlap))))
    note(f"{key_id} works for {overlap} more")


@app.command()
@on_service
def revoke(session: Session, key_id: KeyArgument) -> None:
    """Refuse a key from now on, for ever."""
    key = session.client.run(calls.revoke_key(key_id))
    session.show(key, lambda: _print(key))


def _report(session: Session, key: dict[str, Any]) -> None:
    if key["token"] is None:
        # Only a repeated request is answered so: the first answer, with the token, was lost.
        raise ClientError(f"{key['id']} was made, but its token was lost on the way; revoke it and make another")
    session.show(key, lambda: _print(key))


def _print(key: dict[str, Any]) -> None:
    pairs = {name: key.get(name) for name in ("id", "name", "token", "prefix", "state")}
    times = {"made": "created_at", "expires": "expires_at", "last used": "last_used_at", "revoked": "revoked_at"}
    print_pairs(
        {**pairs, "scopes": ", ".join(key["scopes"]), **{name: at(key[field]) for name, field in times.items()}}
    )
