"""`duquant webhook` against a running service and a real receiver."""

import json
from typing import Any

import pytest
from standardwebhooks.webhooks import Webhook as Verifier
from support.receiver import receiving, wait_until

from client.errors import EXIT_BAD_INPUT, EXIT_NOT_FOUND
from client.main import run

pytestmark = pytest.mark.integration


def test_a_webhook_from_create_to_delete(service: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def webhook(*arguments: str, status: int = 0) -> Any:
        capsys.readouterr()
        assert run(["webhook", *arguments, "--url", service.url, "--key", service.token, "--json"]) == status
        captured = capsys.readouterr()
        return json.loads(captured.out) if status == 0 else captured.err

    def is_delivered() -> bool:
        return {each["state"] for each in webhook("deliveries", made["id"])["items"]} == {"delivered"}

    with receiving() as receiver:
        made = webhook("create", f"{receiver.url}/hook", "--event", "job.failed")
        assert [each["id"] for each in webhook("list")["items"]] == [made["id"]]
        sent = webhook("test", made["id"])
        (message,) = receiver.wait_for(1)
        assert Verifier(made["secret"]).verify(message.body, dict(message.headers))["type"] == "webhook.test"
        wait_until(is_delivered)
        assert webhook("redeliver", made["id"], sent["id"])["state"] == "pending"
        receiver.wait_for(2)
    assert webhook("get", made["id"]) == {name: value for name, value in made.items() if name != "secret"}
    assert webhook("rotate", made["id"])["secret"] not in (None, made["secret"])
    changed = webhook("set", made["id"], "--to", "https://example.com/other", "--event", "all")
    assert (changed["url"], changed["events"]) == ("https://example.com/other", [])
    assert "--to" in webhook("set", made["id"], status=EXIT_BAD_INPUT)
    assert webhook("disable", made["id"])["enabled"] is False
    assert webhook("enable", made["id"])["enabled"] is True
    assert webhook("delete", made["id"]) == {"id": made["id"], "deleted": True}
    assert made["id"] in webhook("test", made["id"], status=EXIT_NOT_FOUND)
    assert "public address" in webhook("create", "https://10.0.0.1/", status=EXIT_BAD_INPUT)
    assert "no webhook id" in webhook("delete", "../keys", status=EXIT_BAD_INPUT)


def test_people_see_tables(service: Any, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--url", service.url, "--key", service.token]
    assert run(["webhook", "create", "https://example.com/hook", *options]) == 0
    made = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert made["secret"].startswith("whsec_")
    assert run(["webhook", "list", *options]) == 0
    listed = capsys.readouterr().out
    assert "https://example.com/hook  all     on" in listed
    assert "whsec_" not in listed
    assert run(["webhook", "rotate", made["id"], *options]) == 0
    assert "whsec_" in capsys.readouterr().out
    assert run(["webhook", "test", made["id"], *options]) == 0
    capsys.readouterr()
    assert run(["webhook", "deliveries", made["id"], *options]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith(" s ago")
