"""`duquant key` against a running service."""

import json
from typing import Any

import pytest

from client.errors import EXIT_AUTH, EXIT_BAD_INPUT, EXIT_NOT_FOUND, BadInputError
from client.main import run
from client.times import seconds_of

pytestmark = pytest.mark.integration


def key(service: Any, capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0, token: str = "") -> Any:
    options = ["--url", service.url, "--key", token or service.token, "--json"]
    capsys.readouterr()
    assert run(["key", *arguments, *options]) == status, capsys.readouterr().err
    captured = capsys.readouterr()
    return json.loads(captured.out) if status == 0 else captured.err


def test_a_key_lives_from_create_to_revoke(service: Any, capsys: pytest.CaptureFixture[str]) -> None:
    made = key(service, capsys, "create", "ci", "--scope", "jobs:read", "--scope", "keys:admin", "--expires-in", "90d")
    assert made["scopes"] == ["jobs:read", "keys:admin"]
    assert made["expires_at"] is not None
    listed = key(service, capsys, "list", token=made["token"])["items"]
    assert [each["name"] for each in listed] == ["ci", "bootstrap"]
    shown = key(service, capsys, "get", made["id"])
    assert shown["last_used_at"] is not None
    assert shown.keys() == made.keys() - {"token"}
    new = key(service, capsys, "rotate", made["id"], "--overlap", "0")
    assert key(service, capsys, "list", token=made["token"], status=EXIT_AUTH)
    assert key(service, capsys, "list", token=new["token"])["items"]
    assert key(service, capsys, "revoke", new["id"])["state"] == "revoked"
    assert key(service, capsys, "list", token=new["token"], status=EXIT_AUTH)
    assert "revoked or expired" in key(service, capsys, "rotate", new["id"], status=1)


def test_a_projects_first_key_is_made_from_outside(service: Any, capsys: pytest.CaptureFixture[str]) -> None:
    service.http.post("/v1/tenants", json={"id": "zoo", "name": "Zoo"})
    made = key(service, capsys, "create", "first", "--project", "zoo", "--scope", "keys:admin")
    assert [each["id"] for each in key(service, capsys, "list", token=made["token"])["items"]] == [made["id"]]
    assert key(service, capsys, "create", "x", "--project", "none", "--scope", "jobs:read", status=EXIT_NOT_FOUND)


def test_people_see_a_table_and_the_token_once(service: Any, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--url", service.url, "--key", service.token]
    assert run(["key", "create", "ci", "--scope", "jobs:read", *options]) == 0
    made = capsys.readouterr().out
    token = next(line.split()[1] for line in made.splitlines() if line.startswith("token"))
    assert token.startswith("dq_live_")
    assert run(["key", "list", "--limit", "1", *options]) == 0
    listed = capsys.readouterr()
    assert "ci" in listed.out
    assert token not in listed.out
    assert "--cursor" in listed.err


def test_what_is_wrong_is_one_line_and_an_exit_code(service: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--scope: " in key(service, capsys, "create", "x", "--scope", "root", status=EXIT_BAD_INPUT)
    assert "length of time" in key(
        service, capsys, "create", "x", "--scope", "jobs:read", "--expires-in", "soon", status=EXIT_BAD_INPUT
    )
    assert key(service, capsys, "revoke", "key_none", status=EXIT_NOT_FOUND)
    assert "no key id" in key(service, capsys, "revoke", "../jobs", status=EXIT_BAD_INPUT)
    weak = service.key("jobs:read")
    assert "keys:admin" in key(service, capsys, "list", token=weak, status=EXIT_AUTH)


def test_lengths_of_time_are_strict() -> None:
    for text in ("", "d", "1.5h", "-1h", "1w", "1 h", "9999999999s"):
        with pytest.raises(BadInputError):
            seconds_of(text)
