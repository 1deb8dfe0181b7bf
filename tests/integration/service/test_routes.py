"""Every route of the description, walked with no key, a wrong key, a key without the scope, and another tenant's."""

import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from infra.jobs import NewJob
from service.auth import SCOPES

pytestmark = pytest.mark.integration

OPEN = {"/healthz", "/readyz", "/version", "/metrics"}
"""Routes that need no key."""
SHARED = {"queue", "tag"}
"""What stands in paths and is no id of a thing."""
ACROSS_TENANTS = {"tenants:admin"}
"""Scopes whose point is to reach the things of other tenants."""


@dataclass(frozen=True)
class Route:
    """One operation of the description, and a body that it takes."""

    method: str
    path: str
    body: Any
    media_type: str
    query: tuple[str, ...]
    """Query parameters that it cannot do without."""

    @property
    def ids(self) -> list[str]:
        return re.findall(r"\{(\w+)\}", self.path)

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


def routes(service: Any) -> Iterator[Route]:
    described = service.http.get("/openapi.json").json()
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            contents = operation.get("requestBody", {}).get("content", {})
            media_type, content = next(iter(contents.items()), ("", {}))
            examples = [{"value": content["example"]}] if "example" in content else []
            examples += content.get("examples", {}).values()
            query = (each for each in operation.get("parameters", []) if each["in"] == "query" and each.get("required"))
            body = examples[0]["value"] if examples else None
            yield Route(method.upper(), path, body, media_type, tuple(each["name"] for each in query))


def ask(service: Any, route: Route, ids: dict[str, str], token: str | None) -> httpx.Response:
    headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
    if route.method == "POST":
        headers["Idempotency-Key"] = uuid.uuid4().hex
    query = [(name, ids["artifact_id"]) for name in route.query]  # what is compared with
    ids = _Absent({"tag": "best", **ids})
    sent = {"content": route.body} if route.media_type.startswith("text/") else {"json": route.body}
    headers |= {"Content-Type": route.media_type} if route.media_type else {}
    request = service.http.build_request(route.method, route.path.format_map(ids), params=query, **sent)
    del request.headers["Authorization"]  # the client's own
    request.headers.update(headers)
    return service.http.send(request)


_PREFIXES = {"webhook_id": "wh", "delivery_id": "msg", "artifact_id": "art", "evaluation_id": "eval"}


class _Absent(dict[str, str]):
    """Ids that nothing has."""

    def __missing__(self, name: str) -> str:
        return f"{_PREFIXES.get(name, name.removesuffix('_id'))}_00000000000000000000000000000000"


@pytest.fixture
def mine(service: Any) -> dict[str, str]:
    """One of each thing that has an id, of the default tenant."""
    job = service.finished_job()
    hook = service.http.post("/v1/webhooks", json={"url": "https://example.com/hook", "events": ["job.succeeded"]})
    webhook = hook.json()["id"]
    service.http.post(f"/v1/webhooks/{webhook}:test")
    request = {"models": [{"source": "demo", "name": "smollm2-135m"}], "recipes": ["rtn"]}
    batch = service.http.post("/v1/batches", json=request, headers={"Idempotency-Key": "mine"})
    return {
        "job_id": job.id,
        "key_id": service.http.get("/v1/keys").json()["items"][0]["id"],
        "webhook_id": webhook,
        "delivery_id": service.http.get(f"/v1/webhooks/{webhook}/deliveries").json()["items"][0]["id"],
        "artifact_id": service.http.get("/v1/artifacts").json()["items"][0]["id"],
        "batch_id": batch.json()["id"],
        "evaluation_id": _evaluation(service, job),
        "text_id": _text(service),
    }


def _text(service: Any) -> str:
    headers = {"Content-Type": "text/plain"}
    answer = service.http.post("/v1/texts", params={"name": "mine"}, content="It was.", headers=headers)
    return answer.json()["id"]


def _evaluation(service: Any, job: Any) -> str:
    """Let a dispatcher evaluate the artifact of a job."""
    spec = {"kind": "evaluate", "artifact_job_id": job.id, "evaluation": {}}
    new = NewJob(tenant_id=job.tenant_id, kind="evaluate", spec=spec, fingerprint="e" * 64, model_name=job.model_name)
    service.jobs.enqueue(new, actor="test")
    claim = service.jobs.claim("dispatcher-2", lease_seconds=60, kinds=("evaluate",))
    service.jobs.complete(claim, {"metrics": {"perplexity": 20.0}, "seconds": 1.0})
    return service.http.get("/v1/evaluations").json()["items"][0]["id"]


def test_every_body_and_answer_has_an_example(service: Any) -> None:
    described = service.http.get("/openapi.json").json()
    lacking = []
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            where = f"{method.upper()} {path}"
            answers = operation["responses"].items()
            contents = {f"{where} {status}": answer.get("content", {}) for status, answer in answers}
            contents[f"{where} body"] = operation.get("requestBody", {}).get("content", {})
            for name, content in contents.items():
                lacking += [name for each in content.values() if not (each.get("example") or each.get("examples"))]
            if not operation.get("summary") or not operation.get("operationId"):
                lacking.append(where)
    assert lacking == []


def test_examples_are_what_the_schemas_say(service: Any) -> None:
    described = service.http.get("/openapi.json").json()
    wrong = []
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            contents = [answer.get("content", {}) for answer in operation["responses"].values()]
            contents.append(operation.get("requestBody", {}).get("content", {}))
            for content in (each for by_type in contents for each in by_type.values()):
                schema = {"allOf": [content.get("schema", {})], "components": described["components"]}
                for example in _examples(described, content):
                    found = Draft202012Validator(schema).iter_errors(example)
                    wrong += [f"{method} {path} {error.json_path}: {error.message}" for error in found]
    assert wrong == []


def _examples(described: dict[str, Any], content: dict[str, Any]) -> Iterator[Any]:
    if "example" in content:
        yield content["example"]
    for example in content.get("examples", {}).values():
        name = example.get("$ref", "").rpartition("/")[2]
        yield (described["components"]["examples"][name] if name else example)["value"]


def test_every_route_refuses_a_missing_or_wrong_key(service: Any) -> None:
    revoked, revoked_token = service.keys.create("default", "old", SCOPES)
    service.keys.revoke(revoked.id, "default")
    expired = service.keys.create("default", "older", SCOPES, expires_at=1)[1]
    forged = f"{service.token[:-1]}{'a' if service.token[-1] != 'a' else 'b'}"
    for route in routes(service):
        if route.path in OPEN:
            continue
        # Checking a key is the same for all routes; that it is checked at all is what each could lack.
        wrong = (None, "x", revoked_token, expired, forged) if route.path == "/v1/jobs" else (None, expired)
        for token in wrong:
            answer = ask(service, route, _Absent(), token)
            assert answer.status_code == 401, (str(route), token, answer.text)
            assert answer.json()["type"] == "urn:duquant:problem:unauthorized"
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")


def test_every_route_needs_just_one_scope(service: Any) -> None:
    keys = {scope: service.key(scope) for scope in SCOPES}
    without = {scope: service.key(*(each for each in SCOPES if each != scope)) for scope in SCOPES}
    nothing = service.key()
    for route in routes(service):
        if route.path in OPEN:
            continue
        refused = ask(service, route, _Absent(), nothing)
        assert refused.status_code == 403, (str(route), refused.text)
        needed = re.findall(r"lacks the scope (\S+);", refused.json()["detail"])
        assert len(needed) == 1, (str(route), refused.text)
        assert needed[0] in SCOPES
        assert ask(service, route, _Absent(), without[needed[0]]).status_code == 403, str(route)
        allowed = ask(service, route, _Absent(), keys[needed[0]])
        assert allowed.status_code not in (401, 500), (str(route), allowed.text)
        if allowed.status_code == 403:  # only for handing out more than one has
            assert "cannot give what it lacks" in allowed.json()["detail"], (str(route), allowed.text)


def test_another_tenants_things_do_not_exist(service: Any, mine: dict[str, str], other_tenant: str) -> None:
    stranger = service.key(*(each for each in SCOPES if each not in ACROSS_TENANTS), tenant=other_tenant)
    walked = 0
    for route in routes(service):
        own = [name for name in route.ids if name not in SHARED]
        if not own or route.path.startswith("/v1/tenants"):
            continue
        assert set(own) <= mine.keys(), f"{route}: make the fixture `mine` give it a {own}"
        theirs = ask(service, route, mine, stranger)
        absent = ask(service, route, _Absent(), stranger)
        assert theirs.status_code == 404, (str(route), theirs.text)
        # Not even the words tell a thing of somebody else from nothing.
        words = [re.sub(r"\w+_[0-9a-f]{32}", "ID", each.json()["detail"]) for each in (theirs, absent)]
        assert (absent.status_code, words[0]) == (404, words[1]), (str(route), words)
        walked += 1
    assert walked >= 20


def test_lists_show_only_ones_own(service: Any, mine: dict[str, str], other_tenant: str) -> None:
    everything = [each for each in SCOPES if each not in ACROSS_TENANTS]
    key, stranger = service.keys.create(other_tenant, "stranger", everything)
    for route in routes(service):
        if route.method != "GET" or route.ids or not route.path.startswith("/v1/") or route.path == "/v1/tenants":
            continue
        answer = ask(service, route, {}, stranger)
        assert answer.status_code == 200, (str(route), answer.text)
        for name, value in mine.items():
            assert value not in answer.text, (str(route), name)
    assert key.tenant_id == other_tenant
