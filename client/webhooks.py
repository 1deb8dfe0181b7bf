"""`duquant webhook`: have a server told about jobs."""

from typing import Annotated, Any

import typer

from client import calls
from client.connection import Session, on_service
from client.errors import BadInputError, ClientError
from client.lists import CursorOption, LimitOption, tell_of_more
from client.output import note, print_pairs, print_table
from client.times import ago, at

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
    _require_secret(webhook, "was made, but its secret was lost on the way; delete it and make another")
    _show(session, webhook)


@app.command("list")
@on_service
def list_webhooks(session: Session, limit: LimitOption = 50, cursor: CursorOption = None) -> None:
    """List the webhooks, newest first."""
    page = session.client.run(calls.list_webhooks(limit=limit, cursor=cursor))
    rows = [
        (each["id"], each["url"], ",".join(each["events"]) or "all", _state(each), ago(each["failing_since"]))
        for each in page["items"]
    ]
    session.show(page, lambda: print_table(("id", "url", "events", "state", "failing since"), rows))
    tell_of_more("webhook list", page["next_cursor"])


@app.command()
@on_service
def get(session: Session, webhook_id: WebhookArgument) -> None:
    """Show a webhook without its secret."""
    _show(session, session.client.run(calls.get_webhook(webhook_id)))


@app.command("set")
@on_service
def change(
    session: Session,
    webhook_id: WebhookArgument,
    address: Annotated[str | None, typer.Option("--to", metavar="URL", help="An https URL of a public server.")] = None,
    event: Annotated[
        list[str] | None, typer.Option(help="What to hear of from now on, or all; repeat for more.")
    ] = None,
) -> None:
    """Change where a webhook's messages go, or what it hears of."""
    events = None if event is None else [] if event == ["all"] else event
    given = {name: value for name, value in {"url": address, "events": events}.items() if value is not None}
    if not given:
        raise BadInputError("nothing is to be changed; give --to or --event")
    _show(session, session.client.run(calls.change_webhook(webhook_id, **given)))


@app.command()
@on_service
def rotate(session: Session, webhook_id: WebhookArgument) -> None:
    """Give a webhook another secret, printed this once. For a day messages carry the signatures of both."""
    webhook = session.client.run(calls.rotate_webhook(webhook_id))
    _require_secret(webhook, "was given another secret, but it was lost on the way; rotate it again")
    _show(session, webhook)


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
    _show_delivery(session, delivery)


@app.command()
@on_service
def deliveries(
    session: Session, webhook_id: WebhookArgument, limit: LimitOption = 50, cursor: CursorOption = None
) -> None:
    """List what was sent, newest first."""
    page = session.client.run(calls.list_deliveries(webhook_id, limit=limit, cursor=cursor))
    names = ("id", "event", "job_id", "state", "attempts", "last_status", "last_error")
    rows = [[*(each[name] for name in names), ago(each["created_at"])] for each in page["items"]]
    columns = ("delivery", "event", "job", "state", "attempts", "answer", "error", "made")
    session.show(page, lambda: print_table(columns, rows))
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
    _show_delivery(session, delivery)


def _require_secret(webhook: dict[str, Any], words: str) -> None:
    if webhook["secret"] is None:
        # Only a repeated request is answered so: the first answer, with the secret, was lost.
        raise ClientError(f"{webhook['id']} {words}")


def _show(session: Session, webhook: dict[str, Any]) -> None:
    pairs = {
        "id": webhook["id"],
        "url": webhook["url"],
        "secret": webhook.get("secret"),
        "events": ", ".join(webhook["events"]) or "all",
        "state": _state(webhook),
        "failing since": at(webhook["failing_since"]),
        "made": at(webhook["created_at"]),
    }
    session.show(webhook, lambda: print_pairs(pairs))


def _show_delivery(session: Session, delivery: dict[str, Any]) -> None:
    pairs = {
        "delivery": delivery["id"],
        "event": delivery["event"],
        "job": delivery["job_id"],
        "state": delivery["state"],
        "attempts": delivery["attempts"],
        "next attempt": at(delivery["next_at"]),
        "last answer": delivery["last_status"],
        "last error": delivery["last_error"],
        "made": at(delivery["created_at"]),
        "finished": at(delivery["finished_at"]),
    }
    session.show(delivery, lambda: print_pairs(pairs))


def _state(webhook: dict[str, Any]) -> str:
    return "on" if webhook["enabled"] else "off"
