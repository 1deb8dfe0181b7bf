"""`duquant text`: texts of your own on a running service."""

from pathlib import Path
from typing import Annotated, Any

import typer

from client import calls
from client.connection import Session, on_service
from client.lists import CursorOption, LimitOption, tell_of_more
from client.output import note, print_pairs, print_table, print_text, size
from client.times import ago, at

app = typer.Typer(help="Texts to calibrate and measure on.", no_args_is_help=True)

TextArgument = Annotated[str, typer.Argument(metavar="TEXT", help="The text's id.")]


@app.command()
@on_service
def upload(
    session: Session,
    file: Annotated[Path, typer.Argument(help="A UTF-8 file; .jsonl and .ndjson hold a text in each line.")],
    name: Annotated[str | None, typer.Option(help="What people call it. [default: the file's name]")] = None,
) -> None:
    """Upload a text. The same file again is stored once."""
    text = session.client.run(calls.upload_text(file, name))
    note(f"{'found' if text['reused'] else 'uploaded'} {text['id']}: job submit ... --calibration {text['id']}")
    session.show(text, lambda: print_pairs(_pairs(text)))


@app.command("list")
@on_service
def list_texts(session: Session, limit: LimitOption = 50, cursor: CursorOption = None) -> None:
    """List the texts, newest first."""
    page = session.client.run(calls.list_texts(limit=limit, cursor=cursor))
    rows = [(each["id"], each["name"], size(each["size_bytes"]), ago(each["created_at"])) for each in page["items"]]
    session.show(page, lambda: print_table(("text", "name", "size", "made"), rows))
    tell_of_more("text list", page["next_cursor"])


@app.command()
@on_service
def get(session: Session, text_id: TextArgument) -> None:
    """Show what is known of a text."""
    text = session.client.run(calls.get_text(text_id))
    session.show(text, lambda: print_pairs(_pairs(text)))


@app.command()
@on_service
def delete(session: Session, text_id: TextArgument) -> None:
    """Delete a text."""
    session.client.run(calls.delete_text(text_id))
    session.show({"deleted": text_id}, lambda: print_text(f"{text_id} is deleted"))


def _pairs(text: dict[str, Any]) -> dict[str, Any]:
    return {
        "text": text["id"],
        "name": text["name"],
        "source": text["source"]["name"],
        "size": size(text["size_bytes"]),
        "sha256": text["sha256"],
        "made": at(text["created_at"]),
    }
