"""`duquant webhook`: have a server told about jobs."""

from typing import Annotated, Any

import typer

from client import calls
from client.connection import Session, on_service
from client.errors import ClientError
from client.lists import CursorOption, LimitOption, tell_of_more
from client.output import note, print_pairs, print_table

app = typer.Typer(help="Servers that are told when your jobs start and end.", no_args_is_help=True)

WebhookArgument = Annotated[str, typer.Argument(metavar="ID", help="The webhook's id.")]


@app.command()
@on_service
def create(
    session: Session,
    address: Annotated[str, typer.Argument(metavar="URL", help="An https URL of a public server.")],
    event: Annotated[
        list[str] | None, typer.Option(help="What to hear of, such as job.failed; repeat for more. [default: all]")
    ] = None,
) -> None:
    """Make a webhook. The secret that its messages are signed with is printed this once."""
    webhook = session.client.run(calls.create_webhook(address, event or ()))
    if webhook["secret"] is None:
        # Only a repeated request is answered so: the first answer, with the secret, was lost.
        raise ClientError(f"{webhook['id']} was made, but its secret was lost on the way; delete it and make another")
    _show(session, webhook)


@app.command("list")
@on_service
def list_webhooks(session: Session, limit: LimitOption = 50, cursor: CursorOption = None) -> None:
    """List the webhooks, newest first."""
    page = session.client.run(calls.list_webhooks(limit=limit, cursor=cursor))
    rows = [
        (each["id"], each["url"], ",".join(each["events"]) or "all", _state(each), each["failing_since"])
        for each in page["items"]
    ]
    session.show(page, lambda: print_table(("id", "url", "events", "state", "failing since"), rows))
    tell_of_more("webhook list", page["next_cursor"])


@app.command()
@on_service
def enable(session: Session, webhook_id: WebhookArgument) -> None:
    """Switch a webhook on again, and forgive its failures."""
    _show(session, session.client.run(calls.change_webhook(webhook_id, enabled=True)))


@app.command()
@on_service
def disable(session: Session, webhook_id: WebhookArgument) -> None:
    """Switch a webhook off; messages that wait are given up."""
    _show(session, session.client.run(calls.change_webhook(webhook_id, enabled=False)))


@app.command()
@on_service
def delete(session: Session, webhook_id: WebhookArgument) -> None:
    """Delete a webhook with the log of its deliveries."""
    session.client.run(calls.delete_webhook(webhook_id))
    session.show({"id": webhook_id, "deleted": True}, lambda: note(f"{webhook_id} is deleted"))


@app.command()
@on_service
def test(session: Session, webhook_id: WebhookArgument) -> None:
    """Send a test message; `duquant webhook deliveries` tells how it went."""
    delivery = session.client.run(calls.test_webhook(webhook_id))
    session.show(delivery, lambda: print_pairs(delivery))


@app.command()
@on_service
def deliveries(
    session: Session, webhook_id: WebhookArgument, limit: LimitOption = 50, cursor: CursorOption = None
) -> None:
    """List what was sent, newest first."""
    page = session.client.run(calls.list_deliveries(webhook_id, limit=limit, cursor=cursor))
    names = ("id", "event", "job_id", "state", "attempts", "last_status", "last_error", "created_at")
    rows = [[each[name] for name in names] for each in page["items"]]
    session.show(page, lambda: print_table(names, rows))
    tell_of_more(f"webhook deliveries {webhook_id}", page["next_cursor"])


@app.command()
@on_service
def redeliver(
    session: Session,
    webhook_id: WebhookArgument,
    delivery_id: Annotated[str, typer.Argument(metavar="DELIVERY", help="The message's id.")],
) -> None:
    """Send a message again."""
    delivery = session.client.run(calls.redeliver(webhook_id, delivery_id))
    session.show(delivery, lambda: print_pairs(delivery))


def _show(session: Session, webhook: dict[str, Any]) -> None:
    shown = {**webhook, "events": ", ".join(webhook["events"]) or "all", "enabled": _state(webhook)}
    session.show(webhook, lambda: print_pairs(shown))


def _state(webhook: dict[str, Any]) -> str:
    return "on" if webhook["enabled"] else "off"
