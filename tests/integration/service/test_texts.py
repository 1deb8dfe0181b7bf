"""Texts: uploaded in a stream, named by their ids, used by jobs, seen by their own project only."""

import asyncio
import hashlib
import http.client
import json
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from support.commands import data

from client import calls
from client.aio import AsyncClient
from infra.texts import MAX_TEXTS
from service.limits import OpenStreams

pytestmark = pytest.mark.integration

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. \N{SNOWMAN}\n".encode()
PLAIN = {"Content-Type": "text/plain; charset=utf-8"}
MODEL = {"source": "demo", "name": "smollm2-135m"}


def upload(service: Any, content: Any = TEXT, name: str = "april", **headers: str) -> Any:
    return service.http.post("/v1/texts", params={"name": name}, content=content, headers=PLAIN | headers)


def test_texts_count_against_a_projects_bytes(service: Any) -> None:
    service.http.patch("/v1/tenants/default", json={"max_bytes": len(TEXT) + 10})
    first = upload(service).json()
    refused = upload(service, b"one more text", name="second")
    assert problem(refused) == (429, "quota-exceeded")
    assert "texts" in refused.json()["detail"]
    assert service.http.get("/v1/quota").json()["bytes"]["used"] == len(TEXT)
    service.http.delete(f"/v1/texts/{first['id']}")
    assert upload(service, b"one more text", name="second").status_code == 201


def problem(answer: Any) -> tuple[int, str]:
    return answer.status_code, answer.json()["type"].rpartition(":")[2]


def test_a_text_is_uploaded_listed_used_and_deleted(any_service: Any) -> None:
    service = any_service
    made = upload(service)
    assert made.status_code == 201, made.text
    text = made.json()
    assert made.headers["Location"] == f"/v1/texts/{text['id']}"
    assert (text["sha256"], text["size_bytes"]) == (hashlib.sha256(TEXT).hexdigest(), len(TEXT))
    assert text["source"] == {"kind": "object", "name": f"texts/default/{text['id']}.txt"}
    assert service.storage.get_bytes(text["source"]["name"]) == TEXT
    again = upload(service)
    assert (again.status_code, again.json()["id"], again.json()["reused"]) == (200, text["id"], True)
    lines = upload(service, b'{"text": "It was."}\n', **{"Content-Type": "application/x-ndjson"}).json()
    assert lines["source"]["name"].endswith(".jsonl")
    first = service.http.get("/v1/texts?limit=1").json()
    rest = service.http.get("/v1/texts", params={"cursor": first["next_cursor"]}).json()
    assert [each["id"] for each in (*first["items"], *rest["items"])] == [lines["id"], text["id"]]
    job = service.http.post("/v1/jobs", json={"model": MODEL, "calibration": {"source": text["source"]}})
    assert job.status_code == 201, job.text
    path = f"/v1/texts/{text['id']}"
    assert problem(service.http.delete(path)) == (409, "text-conflict")
    measuring = {"model": MODEL, "text": lines["source"]}
    assert service.http.post("/v1/evaluations", json=measuring).status_code == 201
    assert problem(service.http.delete(f"/v1/texts/{lines['id']}")) == (409, "text-conflict")
    service.http.post(f"/v1/jobs/{job.json()['id']}:cancel")
    assert service.http.delete(path).status_code == 204
    assert problem(service.http.get(path)) == (404, "text-unknown")
    assert problem(service.http.delete(path)) == (404, "text-unknown")
    assert [item.key for item in service.storage.list(text["source"]["name"])] == []
    actions = [each["action"] for each in service.http.get("/v1/audit").json()["items"]]
    assert actions[:3] == ["text.deleted", "text.uploaded", "text.uploaded"]


def test_a_large_text_streams_through(service: Any) -> None:
    line = b"the quick brown fox jumps over the lazy dog, again and again and again\n"
    made = upload(service, (line * 10_000 for _ in range(6)))
    assert made.status_code == 201, made.text
    assert made.json()["size_bytes"] == 60_000 * len(line) > service.settings.max_body_bytes


@pytest.mark.parametrize("set_service", [{"max_text_bytes": 1000}], indirect=True)
def test_a_text_over_the_limit_is_refused_declared_or_not_and_leaves_nothing(set_service: Any) -> None:
    before = {item.key for item in set_service.storage.list("texts/")}
    assert upload(set_service, b"x" * 1000).status_code == 201
    assert problem(upload(set_service, b"x" * 1001)) == (413, "body-too-large")
    assert problem(upload(set_service, (b"x" * 100 for _ in range(50)))) == (413, "body-too-large")
    assert len({item.key for item in set_service.storage.list("texts/")} - before) == 1


@pytest.mark.parametrize(
    ("content", "headers", "expected"),
    [
        (b"", {}, (422, "validation-failed")),
        (b"caf\xe9", {}, (422, "validation-failed")),
        (TEXT[:-2], {}, (422, "validation-failed")),  # cut in the middle of a character
        (TEXT, {"Content-Type": "application/octet-stream"}, (415, "unsupported-media-type")),
        (TEXT, {"Content-Type": "application/json"}, (415, "unsupported-media-type")),
    ],
)
def test_what_is_no_text_is_refused(
    service: Any, content: bytes, headers: dict[str, str], expected: tuple[int, str]
) -> None:
    assert problem(upload(service, content, **headers)) == expected
    assert service.http.get("/v1/texts").json()["items"] == []


@pytest.mark.parametrize("name", ["", "x" * 201, "a\nb", "\x00"])
def test_a_name_that_is_none_is_refused(service: Any, name: str) -> None:
    assert problem(upload(service, name=name)) == (422, "validation-failed")


def test_no_name_ever_becomes_a_part_of_a_key(service: Any) -> None:
    text = upload(service, name="../../artifacts/default/evil").json()
    assert text["source"]["name"] == f"texts/default/{text['id']}.txt"


def test_scopes_and_projects_are_kept_apart(service: Any, other_tenant: str) -> None:
    text = upload(service).json()
    reader = {"Authorization": f"Bearer {service.key('jobs:read')}"}
    stranger = {"Authorization": f"Bearer {service.key('jobs:read', 'jobs:write', tenant=other_tenant)}"}
    assert problem(upload(service, **reader)) == (403, "missing-scope")
    path = f"/v1/texts/{text['id']}"
    assert service.http.get(path, headers=reader).status_code == 200
    assert problem(service.http.delete(path, headers=reader)) == (403, "missing-scope")
    assert problem(service.http.get(path, headers=stranger)) == (404, "text-unknown")
    assert problem(service.http.delete(path, headers=stranger)) == (404, "text-unknown")
    assert service.http.get("/v1/texts", headers=stranger).json()["items"] == []
    # The same bytes under the same name are each project's own.
    theirs = upload(service, **stranger).json()
    assert (theirs["reused"], theirs["source"]["name"]) == (False, f"texts/other/{theirs['id']}.txt")
    body = {"model": MODEL, "calibration": {"source": theirs["source"]}}
    assert problem(service.http.post("/v1/jobs", json=body)) == (422, "text-forbidden")


def test_a_project_has_so_many_texts_and_no_more(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_TEXTS > 3
    monkeypatch.setattr("infra.texts.MAX_TEXTS", 3)
    answers = []

    def send(number: int) -> None:
        answers.append(problem_or_id(upload(service, TEXT + str(number).encode())))

    threads = [threading.Thread(target=send, args=(number,)) for number in range(2)]
    service.app.state.context.uploads = OpenStreams(10)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2, 5):
        send(number)
    assert answers.count("quota-exceeded") == 2
    kept = {each["source"]["name"] for each in service.http.get("/v1/texts").json()["items"]}
    assert len(kept) == 3
    assert kept <= {item.key for item in service.storage.list("texts/default/")}


def problem_or_id(answer: Any) -> str:
    return answer.json()["id"] if answer.is_success else problem(answer)[1]


def test_uploads_of_one_key_at_a_time_are_few_and_one_that_breaks_off_leaves_nothing(service: Any) -> None:
    where = urlsplit(service.url)
    half = []
    for _ in range(service.app.state.context.uploads.most):
        connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=10)
        connection.putrequest("POST", "/v1/texts?name=slow")
        for name, value in {**PLAIN, "Authorization": f"Bearer {service.token}", "Content-Length": "1000"}.items():
            connection.putheader(name, value)
        connection.endheaders(b"half of it")
        half.append(connection)
    uploads, key_id = service.app.state.context.uploads, service.keys.authenticate(service.token).id
    deadline = time.monotonic() + 60
    while uploads.has_room(key_id):  # they are on their way, and an upload of ours would take the place of one
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert problem(upload(service)) == (429, "too-many-streams")
    for connection in half:
        connection.close()
    while (answer := upload(service, name="after")).status_code == 429:
        pass
    assert answer.status_code == 201
    assert "slow" not in {each["name"] for each in service.http.get("/v1/texts").json()["items"]}


def test_the_command_line_uploads_uses_and_deletes(service: Any, cli: Any, tmp_path: Path) -> None:
    path = tmp_path / "april.txt"
    path.write_bytes(TEXT * 10_000)
    text = data(cli("text", "upload", str(path), "--json"))
    assert (text["name"], text["size_bytes"], text["reused"]) == ("april.txt", len(TEXT) * 10_000, False)
    assert data(cli("text", "upload", str(path), "--json"))["reused"] is True
    assert "april.txt" in cli("text", "list")[1]
    assert data(cli("text", "get", text["id"], "--json"))["sha256"] == text["sha256"]
    job = data(cli("job", "submit", "demo:smollm2-135m", "--calibration", text["id"], "--json"))
    assert job["recipe"]["calibration"]["source"]["name"] == text["source"]["name"]
    status, _, err = cli("text", "delete", text["id"])
    assert (status, job["id"] in err) == (1, True)
    cli("job", "cancel", job["id"])
    assert data(cli("text", "delete", text["id"], "--json")) == {"deleted": text["id"]}
    assert cli("text", "get", text["id"])[0] == 4
    assert cli("text", "upload", str(tmp_path / "absent.txt"))[0] == 2
    path.write_bytes(b"\xff")
    status, out, err = cli("text", "upload", str(path))
    assert (status, out, "UTF-8" in err) == (2, "", True)


def test_the_asynchronous_client_uploads_too(service: Any, tmp_path: Path) -> None:
    path = tmp_path / "april.jsonl"
    path.write_text(json.dumps({"text": "It was."}) + "\n")

    async def send() -> Any:
        async with AsyncClient(service.url, service.token) as client:
            return await client.run(calls.upload_text(path, "lines"))

    text = asyncio.run(send())
    assert (text["name"], text["size_bytes"]) == ("lines", path.stat().st_size)
    assert text["source"]["name"].endswith(".jsonl")
