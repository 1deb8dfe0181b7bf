"""Everything that is wrong gets a problem document that names it, and nothing is queued."""

import http.client
import json
from typing import Any
from urllib.parse import urlsplit

import pytest

from service.errors import RULES
from service.filters import LABEL
from service.paging import write_cursor
from service.schemas.jobs import QUEUE_NAME

pytestmark = pytest.mark.integration
MODEL = {"source": "demo", "name": "smollm2-135m"}


@pytest.fixture(scope="module")
def service(shared_service: Any) -> Any:
    """One for all: what is refused leaves nothing behind."""
    root, texts = shared_service.settings.model_roots[0], shared_service.settings.text_roots[0]
    (root / "link-out").symlink_to("/etc")
    for name, weights in (("only-pickle", "pytorch_model.bin"), ("remote-code", "model.safetensors")):
        (root / name).mkdir()
        (root / name / "config.json").write_text('{"auto_map": {"AutoModelForCausalLM": "evil.Model"}}')
        (root / name / weights).write_bytes(b"x")
    (root / "leaky").mkdir()
    (root / "leaky" / "config.json").symlink_to("/etc/passwd")
    (texts / "link-out").symlink_to("/etc/passwd")
    return shared_service


def refused(service: Any, body: Any) -> dict[str, Any]:
    # By hand: the client library refuses to send some of these.
    answer = service.http.post("/v1/jobs", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.headers["Content-Type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == answer.status_code
    assert problem["request_id"] == answer.headers["X-Request-Id"]
    assert service.http.get("/v1/jobs").json()["items"] == []
    return problem


@pytest.mark.parametrize(
    ("change", "pointer", "words"),
    [
        ({"recipe": "duqant"}, "/recipe", "presets are: rtn"),
        ({"recipe": {"wieght": {}}}, "/recipe/wieght", "unknown field 'wieght'"),
        ({"recipe": {"weight": {"bits": 5}}}, "/recipe/weight/bits", "one of: 4, 8"),
        ({"recipe": {"weight": {"bits": "4"}}}, "/recipe/weight/bits", "must be int"),
        ({"recipe": {"activation": {"bits": 1}}}, "/recipe/activation/bits", "2, 3, 4"),
        ({"recipe": {"transform": {"block_size": 1}}}, "/recipe/transform/block_size", "between 2 and"),
        ({"recipe": {"transform": {"rotation": "spin"}}}, "/recipe/transform/rotation", "greedy"),
        ({"recipe": {"seed": 2**80}}, "/recipe/seed", ""),
        ({"recipe": {"name": ""}}, "/recipe/name", "1 to 100"),
        ({"recipe": 7}, "/recipe", ""),
        ({"recipe": None}, "/recipe", ""),
        ({"calibration": {"sample": 3}}, "/calibration/sample", "unknown field"),
        ({"calibration": {"samples": 0}}, "/calibration/samples", "between 1 and"),
        ({"calibration": {"samples": 2.0}}, "/calibration/samples", "integer"),
        ({"calibration": {"source": {"kind": "tape"}}}, "/calibration/source/kind", "'builtin'"),
        ({"priority": -1}, "/priority", "greater than"),
        ({"priority": True}, "/priority", "integer"),
        ({"force": "yes"}, "/force", "boolean"),
        ({"modle": {}}, "/modle", "unknown field"),
        ({"model": {"source": "demo"}}, "/model/name", "required"),
        ({"model": {**MODEL, "url": "http://x"}}, "/model/url", "unknown field"),
        ({"model": {"source": "s3", "name": "x"}}, "/model/source", "'demo'"),
        ({"recipe": {"name": "a\u0000b"}}, "", "NUL"),
        ({"recipe": {"name": "\ud800"}}, "", "surrogates"),
        ({"\ud800": 1}, "", "surrogates"),
    ],
)
def test_a_wrong_field_is_named(service: Any, change: dict[str, Any], pointer: str, words: str) -> None:
    problem = refused(service, {"model": MODEL, **change})
    assert (problem["status"], problem["type"]) == (422, "urn:duquant:problem:validation-failed")
    assert pointer in [error["pointer"] for error in problem["errors"]]
    assert words in json.dumps(problem["errors"], ensure_ascii=False)


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "/etc",
        "a/../../b",
        # MLflow read the same text as a URI and as a path (CVE-2023-6977, CVE-2024-1483, CVE-2024-3848).
        "//proc/self/root",
        "http:///#/../../etc/",
        "http:///?/../../etc/",
        "#/../../etc",
        "file:///etc/passwd",
        "%2e%2e/etc",
        "%2e%2e%2fetc",
        "..%00/etc",
        "a?b",
        "a#b",
        "a\\b",
        "..\\..\\etc",
        # Neural Solution's list of bad characters had holes, and a no-break space became a space behind it.
        "x; rm -rf /",
        "x\u00a0y",
        "\u00a0",
        "$(id)",
        "`id`",
        "x\ny",
        "x<y",
        "x|y",
        "\uff0e\uff0e/etc",
        "link-out",
        "link-out/ssl",
        "only-pickle",
        "remote-code",
        "leaky",
    ],
)
def test_a_model_outside_the_roots_or_unsafe_is_forbidden(service: Any, name: str) -> None:
    problem = refused(service, {"model": {"source": "local", "name": name}})
    assert (problem["status"], problem["type"]) == (422, "urn:duquant:problem:model-forbidden")
    assert problem["errors"][0]["pointer"] == "/model/name"
    assert str(service.settings.home) not in json.dumps(problem)


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ({"source": "local", "name": "absent"}, "model-not-found"),
        ({"source": "demo", "name": "gpt-5"}, "model-not-found"),
        ({"source": "hub", "name": "org/model", "revision": "0" * 40}, "model-forbidden"),
    ],
)
def test_a_model_that_cannot_be_had_is_named(service: Any, model: dict[str, Any], kind: str) -> None:
    assert refused(service, {"model": model})["type"] == f"urn:duquant:problem:{kind}"


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ({"kind": "file", "name": "../../etc/passwd"}, "text-forbidden"),
        ({"kind": "file", "name": "/etc/passwd"}, "text-forbidden"),
        ({"kind": "file", "name": "link-out"}, "text-forbidden"),
        ({"kind": "file", "name": "absent.txt"}, "text-not-found"),
        ({"kind": "object", "name": "artifacts/other/job/manifest.json"}, "text-forbidden"),
        ({"kind": "object", "name": "texts/default/../other/a"}, "text-forbidden"),
        ({"kind": "object", "name": "texts/default/absent"}, "text-not-found"),
        ({"kind": "hub", "name": "wikitext"}, "text-forbidden"),
    ],
)
def test_a_text_that_may_not_or_cannot_be_read_is_named(service: Any, source: dict[str, Any], kind: str) -> None:
    problem = refused(service, {"model": MODEL, "calibration": {"source": source}})
    assert problem["type"] == f"urn:duquant:problem:{kind}"
    assert problem["errors"][0]["pointer"] == "/calibration/source/name"


def test_a_recipes_own_text_source_is_checked_as_well(service: Any) -> None:
    recipe = {"calibration": {"source": {"kind": "file", "name": "/etc/passwd"}}}
    assert refused(service, {"model": MODEL, "recipe": recipe})["type"] == "urn:duquant:problem:text-forbidden"


def test_a_declared_body_over_the_limit_is_refused_unread(service: Any) -> None:
    where = urlsplit(service.url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=10)
    connection.putrequest("POST", "/v1/jobs")
    headers = {"Authorization": f"Bearer {service.token}", "Content-Type": "application/json"}
    for name, value in {**headers, "Content-Length": "2000000"}.items():
        connection.putheader(name, value)
    connection.endheaders()  # and never a byte of the body
    answer = connection.getresponse()
    assert answer.status == 413
    assert json.loads(answer.read())["type"] == "urn:duquant:problem:body-too-large"
    connection.close()


def test_a_streamed_body_over_the_limit_is_refused(service: Any) -> None:
    chunks = (b" " * 100_000 for _ in range(20))
    answer = service.http.post("/v1/jobs", content=chunks, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["type"]) == (413, "urn:duquant:problem:body-too-large")


@pytest.mark.parametrize("body", [b"{", b"", b"\xff", b'{"model": ' + b"[" * 100_000, b"9" * 5000])
def test_a_body_that_is_no_json_is_refused(service: Any, body: bytes) -> None:
    answer = service.http.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    assert answer.headers["Content-Type"] == "application/problem+json"


def test_a_body_of_another_type_is_refused(service: Any) -> None:
    answer = service.http.post("/v1/jobs", content=b"a=b", headers={"Content-Type": "text/plain"})
    assert (answer.status_code, answer.json()["type"]) == (415, "urn:duquant:problem:unsupported-media-type")
    assert "application/json" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("method", "path", "status", "name"),
    [
        ("GET", "/v1/nothing", 404, "not-found"),
        ("GET", "/nothing.html", 404, "not-found"),
        ("GET", "/static/../app.py", 404, "not-found"),
        ("DELETE", "/v1/jobs", 405, "method-not-allowed"),
        ("GET", "/v1/jobs/job_none", 404, "job-not-found"),
        ("GET", "/v1/jobs/%00", 404, "not-found"),
        ("GET", "/v1/jobs%0a", 404, "not-found"),
        ("GET", "/v1/jobs/job_none%0A", 404, "not-found"),
        ("GET", "/healthz%0a", 404, "not-found"),
        ("GET", "/static/app.css%0a", 404, "not-found"),
        ("PUT", "/v1/queues/q%0a", 404, "not-found"),
        ("DELETE", "/v1/queues/default%0a", 404, "not-found"),
        ("POST", "/v1/queues/default:pause%0a", 404, "not-found"),
        ("POST", "/v1/queues/def%7fault:pause", 404, "not-found"),
        ("GET", "/v1/jobs/" + "x" * 65, 404, "job-not-found"),
        ("POST", "/v1/jobs/" + "x" * 65 + ":cancel", 404, "job-not-found"),
        ("GET", "/v1/batches/" + "x" * 65, 404, "batch-not-found"),
        ("GET", "/v1/artifacts/" + "x" * 65, 404, "artifact-not-found"),
        ("GET", "/v1/artifacts/art_" + "1" * 65, 404, "artifact-not-found"),
        ("GET", "/v1/evaluations/" + "x" * 65, 404, "evaluation-not-found"),
        ("GET", "/v1/texts/" + "x" * 65, 404, "text-unknown"),
        ("GET", "/v1/keys/" + "x" * 65, 404, "key-not-found"),
        ("GET", "/v1/webhooks/" + "x" * 65, 404, "webhook-not-found"),
        ("GET", "/v1/webhooks/" + "x" * 65 + "/deliveries", 404, "webhook-not-found"),
        ("GET", "/v1/tenants/" + "x" * 65, 404, "tenant-not-found"),
        ("GET", "/v1/queues/" + "x" * 65, 404, "queue-not-found"),
        ("POST", "/v1/queues/" + "x" * 65 + ":pause", 404, "queue-not-found"),
        ("DELETE", "/v1/queues/" + "x" * 65, 404, "queue-not-found"),
        ("GET", "/v1/jobs/" + "x" * 20_000, 404, "job-not-found"),
        ("GET", "/v1/batches/nope", 404, "batch-not-found"),
        ("GET", "/v1/texts/nope", 404, "text-unknown"),
        ("GET", "/v1/artifacts/NOPE-1", 404, "artifact-not-found"),
        ("GET", "/v1/jobs?sate=failed", 422, "validation-failed"),
        ("GET", "/v1/jobs?limit=0", 422, "validation-failed"),
        ("GET", "/v1/jobs?state=lost", 422, "validation-failed"),
    ],
)
def test_every_refusal_is_a_problem(service: Any, method: str, path: str, status: int, name: str) -> None:
    answer = service.http.request(method, path)
    assert (answer.status_code, answer.headers["Content-Type"]) == (status, "application/problem+json")
    assert answer.json()["type"] == f"urn:duquant:problem:{name}"


def test_an_id_of_any_length_is_one_that_there_is_not(any_service: Any) -> None:
    for length in (65, 3000, 30_000):
        for action in ("cancel", "retry"):
            path = f"/v1/jobs/{'x' * length}:{action}"
            answer = any_service.http.post(path, headers={"Idempotency-Key": "one"})
            assert (answer.status_code, answer.json()["type"]) == (404, "urn:duquant:problem:job-not-found")
        assert any_service.http.patch(f"/v1/jobs/{'x' * length}", json={"priority": 1}).status_code == 404


def test_a_misspelt_filter_names_the_one_that_was_meant(service: Any) -> None:
    answer = service.http.get("/v1/jobs?sate=failed&colour=blue")
    colour, sate = (error["detail"] for error in answer.json()["errors"])
    assert sate == "unknown parameter; did you mean state?"
    assert colour.startswith("unknown parameter; there are batch, created_from,")
    assert service.http.get("/v1/queues?x=1").json()["errors"][0]["detail"].endswith("there are none here")


def test_a_parameter_that_comes_twice_is_refused_unless_it_is_a_list(service: Any) -> None:
    answer = service.http.get("/v1/jobs?limit=1&limit=2&queue=a&queue=a&state=failed&state=queued")
    assert (answer.status_code, answer.json()["type"]) == (422, "urn:duquant:problem:validation-failed")
    assert [error["pointer"] for error in answer.json()["errors"]] == ["/limit", "/queue"]
    lists = "state=failed&state=queued&label=a=1&label=b=2"
    assert service.http.get(f"/v1/jobs?limit=1&{lists}").status_code == 200
    assert service.http.post("/v1/texts?name=a&name=b", content=b"x").status_code == 422


LISTS = {
    "jobs": "job_1",
    "batches": "batch_1",
    "artifacts": "art_1",
    "evaluations": "eval_1",
    "texts": "text_1",
    "keys": "key_1",
    "webhooks": "wh_1",
    "tenants": "zoo",
    "audit": "audit_",
}


@pytest.mark.parametrize("name", sorted(LISTS))
def test_only_the_cursors_of_a_list_lead_on_in_it(service: Any, name: str) -> None:
    for other, row_id in LISTS.items():
        answer = service.http.get(f"/v1/{name}?cursor={write_cursor(5, row_id)}")
        assert answer.status_code == (200 if other == name else 422), other
        if other != name:
            assert answer.json()["errors"][0]["pointer"] == "/cursor"


def test_names_that_break_a_rule_are_told_the_rule_in_words(service: Any) -> None:
    assert {QUEUE_NAME, LABEL} < RULES.keys()
    answer = refused(service, {"model": MODEL, "queue": "Not This", "labels": {"a b": "x"}})
    queue, label = sorted(answer["errors"], key=lambda error: error["pointer"] != "/queue")
    assert queue["detail"].startswith("must be 1 to 64 lower-case letters")
    assert label["detail"].startswith("must be 1 to 63 letters")
    given = service.http.get("/v1/jobs?label=nothing").json()["errors"][0]
    assert given["detail"].startswith("must be NAME=VALUE")
    named = service.http.put("/v1/queues/Express", json={}).json()["errors"][0]
    assert named["detail"] == queue["detail"]


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/version", "/", "/login", "/static/app.css", "/openapi.json"])
def test_probes_and_pages_take_head(service: Any, path: str) -> None:
    got, headed = service.http.get(path), service.http.head(path)
    assert (headed.status_code, headed.content) == (got.status_code, b"")
    same = ("content-type", "content-length", "content-security-policy", "location")
    assert [headed.headers.get(name) for name in same] == [got.headers.get(name) for name in same]


def test_head_is_refused_where_an_answer_may_be_held_back(service: Any) -> None:
    for path in ("/v1/jobs", "/live"):
        answer = service.http.head(path)
        assert answer.status_code == 405, path
        assert "HEAD" not in answer.headers["Allow"]
    assert service.http.delete("/healthz").headers["Allow"] == "GET, HEAD"
    described = service.http.get("/openapi.json").json()["paths"]
    assert not any("head" in methods for methods in described.values())


def test_a_sane_request_id_comes_back_and_another_is_replaced(service: Any) -> None:
    assert service.http.get("/healthz", headers={"X-Request-Id": "abc-123"}).headers["X-Request-Id"] == "abc-123"
    given = 'x"; evil' + "y" * 100
    assert service.http.get("/healthz", headers={"X-Request-Id": given}).headers["X-Request-Id"] != given
