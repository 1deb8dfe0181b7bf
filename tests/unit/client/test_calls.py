"""The calls of the client beside docs/reference/openapi.json: nothing of the API is missing, nothing is made up."""

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from client import calls
from client.calls import Request

DESCRIPTION = json.loads((Path(__file__).parents[3] / "docs" / "reference" / "openapi.json").read_text())
WITHOUT_CALL = {"getMetrics": "is text for Prometheus, which scrapes it by itself"}
PAGE = {"limit": 5, "cursor": "c"}
PERIOD = {"created_from": "2026-01-01T00:00:00Z", "created_until": "2026-02-01T00:00:00Z"}
CALIBRATION = {"samples": 4}
EVALUATE = {"windows": 2}
MEASURES = {"text": {}, "seq_len": 64, "windows": 2, "perplexity": True, "tasks": [], "speed": {}}
LIMITS = {"weight": 2.0, "max_queued": 1, "max_running": None, "max_bytes": None, "paused": False}

EXAMPLES: list[tuple[Callable[..., Request], tuple[Any, ...], Mapping[str, Any]]] = [
    (
        calls.submit_job,
        ("demo:a", "rtn"),
        {
            "calibration": CALIBRATION,
            "evaluate": EVALUATE,
            "priority": 5,
            "force": True,
            "queue": "night",
            "run_at": "2026-01-01T00:00:00Z",
            "deadline_at": "2026-01-02T00:00:00Z",
            "depends_on": ["job_1"],
            "labels": {"team": "search"},
        },
    ),
    (
        calls.list_jobs,
        (),
        dict.fromkeys(("state", "kind", "model", "recipe", "queue", "batch", "reason", "label"), "x") | PAGE | PERIOD,
    ),
    (calls.get_job, ("job_1",), {"hold_s": 5}),
    (
        calls.change_job,
        ("job_1",),
        {"version": 3, "priority": 5, "labels": {"team": "ads"}} | dict.fromkeys(("run_at", "deadline_at", "queue")),
    ),
    (calls.retry_job, ("job_1",), {}),
    (calls.cancel_job, ("job_1",), {}),
    (calls.list_layers, ("job_1",), {}),
    (calls.follow_job, ("job_1",), {"after": 7}),
    (
        calls.submit_batch,
        (["demo:a"], ["rtn"]),
        {
            "name": "zoo",
            "calibration": CALIBRATION,
            "evaluate": EVALUATE,
            "priority": 5,
            "queue": "night",
            "force": True,
        },
    ),
    (calls.list_batches, (), dict.fromkeys(("state", "name", "model", "recipe"), "x") | PAGE | PERIOD),
    (
        calls.requantize,
        (),
        dict.fromkeys(("name", "model", "recipe", "tag", "evaluate", "priority", "queue", "dry_run"), "x"),
    ),
    (calls.get_batch, ("batch_1",), {}),
    (calls.batch_table, ("batch_1",), {}),
    (calls.cancel_batch, ("batch_1",), {}),
    (calls.retry_batch, ("batch_1",), {}),
    (calls.estimate_job, ("demo:a", "rtn"), {"calibration": CALIBRATION}),
    (calls.list_queues, (), {}),
    (calls.get_queue, ("night-shift",), {}),
    (calls.create_queue, ("night",), {"max_running": 2}),
    (calls.change_queue, ("night",), {"max_running": None}),
    (calls.delete_queue, ("night",), {}),
    (calls.pause_queue, ("default",), {}),
    (calls.pause_queue, ("default",), {"paused": False}),
    (calls.list_workers, (), {}),
    (calls.list_failures, (), {}),
    (calls.list_artifacts, (), {"model": "a", "recipe": "rtn", "tag": "best"} | PAGE | PERIOD),
    (calls.get_artifact, ("art_1",), {}),
    (calls.keep_artifact, ("art_1", None), {}),
    (calls.delete_artifact, ("art_1",), {"force": True}),
    (calls.artifact_files, ("art_1",), {}),
    (calls.artifact_files, ("job_1",), {}),
    (calls.compare_artifacts, ("art_1", "art_2"), {}),
    (calls.tag_artifact, ("art_1", "best"), {}),
    (calls.untag_artifact, ("art_1", "best"), {}),
    (calls.submit_evaluation, ("art_1",), {"force": True, "priority": 5} | MEASURES),
    (calls.submit_evaluation, (), {"model": "demo:a"}),
    (calls.list_evaluations, (), {"artifact": "art_1", "model": "a"} | PAGE),
    (calls.get_evaluation, ("eval_1",), {}),
    (calls.evaluation_report, ("eval_1",), {}),
    (calls.list_models, (), {}),
    (calls.upload_text, (Path("a.txt"),), {}),
    (calls.list_texts, (), PAGE),
    (calls.get_text, ("text_1",), {}),
    (calls.delete_text, ("text_1",), {}),
    (calls.list_recipes, (), {}),
    (calls.usage, (), {"by": "day", "since": "2026-01-01T00:00:00Z", "until": "2026-02-01T00:00:00Z"}),
    (calls.quota, (), {}),
    (calls.create_key, ("ci", ["jobs:read"]), {"expires_at": "2027-01-01T00:00:00Z"}),
    (calls.create_key, ("ci", ["jobs:read"]), {"expires_at": "2027-01-01T00:00:00Z", "project": "zoo"}),
    (calls.list_keys, (), PAGE),
    (calls.get_key, ("key_1",), {}),
    (calls.rotate_key, ("key_1",), {"overlap_seconds": 0}),
    (calls.revoke_key, ("key_1",), {}),
    (calls.list_audit, (), PAGE),
    (calls.create_project, ("zoo", "Zoo"), LIMITS),
    (calls.list_projects, (), PAGE),
    (calls.get_project, ("zoo",), {}),
    (calls.change_project, ("zoo",), {"name": "Zoo"} | LIMITS),
    (calls.create_webhook, ("https://example.com", ["job.failed"]), {}),
    (calls.list_webhooks, (), PAGE),
    (calls.get_webhook, ("wh_1",), {}),
    (calls.change_webhook, ("wh_1",), {"url": "https://example.com", "events": [], "enabled": True}),
    (calls.delete_webhook, ("wh_1",), {}),
    (calls.rotate_webhook, ("wh_1",), {}),
    (calls.test_webhook, ("wh_1",), {}),
    (calls.list_deliveries, ("wh_1",), PAGE),
    (calls.redeliver, ("wh_1", "msg_1"), {}),
    (calls.health, (), {}),
    (calls.readiness, (), {}),
    (calls.version, (), {}),
]


@dataclass(frozen=True)
class Operation:
    """One operation of the description."""

    method: str
    path: str
    id: str
    query: Mapping[str, bool]
    """Whether each parameter is required."""
    fields: frozenset[str]
    required: frozenset[str]
    has_json: bool

    def takes(self, sent: Request) -> bool:
        pattern = re.sub(r"\\\{\w+\\\}", "[^/:]+", re.escape(self.path))
        return sent.method == self.method and re.fullmatch(pattern, sent.path) is not None


def operations() -> Iterator[Operation]:
    for path, methods in DESCRIPTION["paths"].items():
        for method, operation in methods.items():
            parameters = operation.get("parameters", [])
            content = operation.get("requestBody", {}).get("content", {})
            schema = _resolved(content.get("application/json", {}).get("schema", {}))
            yield Operation(
                method=method.upper(),
                path=path,
                id=operation["operationId"],
                query={each["name"]: each.get("required", False) for each in parameters if each["in"] == "query"},
                fields=frozenset(schema.get("properties", {})),
                required=frozenset(schema.get("required", [])),
                has_json="application/json" in content,
            )


def _resolved(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    for each in (schema, *schema.get("anyOf", [])):
        if "$ref" in each:
            return dict(DESCRIPTION["components"]["schemas"][each["$ref"].rpartition("/")[2]])
    return schema


OPERATIONS = {each.id: each for each in operations()}


def sent_to(operation: Operation) -> list[Request]:
    """Build the examples that go to an operation."""
    return [sent for sent in (make(*given, **named) for make, given, named in EXAMPLES) if operation.takes(sent)]


@pytest.mark.parametrize("name", sorted(OPERATIONS.keys() - WITHOUT_CALL))
def test_every_operation_has_a_call_that_can_say_all_it_takes(name: str) -> None:
    operation = OPERATIONS[name]
    sent = sent_to(operation)
    assert sent, f"client.calls has nothing for {operation.method} {operation.path}, or EXAMPLES does not show it"
    assert {each for call in sent for each in call.params} == operation.query.keys()
    assert {each for call in sent for each in call.body or ()} == operation.fields
    for call in sent:
        assert {each for each, is_required in operation.query.items() if is_required} <= call.params.keys()
        assert operation.required <= set(call.body or ())
        assert call.body is None or operation.has_json


def test_every_call_belongs_to_one_operation() -> None:
    for make, given, named in EXAMPLES:
        sent = make(*given, **named)
        takers = [each.id for each in OPERATIONS.values() if each.takes(sent)]
        assert len(takers) == 1, f"{make.__name__} sends {sent.method} {sent.path}: {takers}"


def test_every_call_is_shown_here() -> None:
    def makes_request(function: Callable[..., Any]) -> bool:
        result = inspect.signature(function).return_annotation
        kind = getattr(result, "__origin__", result)
        return isinstance(kind, type) and issubclass(kind, Request)

    public = inspect.getmembers(calls, inspect.isfunction)
    makers = {name for name, each in public if not name.startswith("_") and makes_request(each)}
    assert makers == {make.__name__ for make, _, _ in EXAMPLES}


def test_what_has_no_call_is_an_operation() -> None:
    assert OPERATIONS.keys() >= WITHOUT_CALL.keys()
    assert not any(sent_to(OPERATIONS[name]) for name in WITHOUT_CALL)


def test_a_change_says_the_version_that_it_is_based_on() -> None:
    assert calls.change_job("job_1", version=3, run_at=None).headers == {"If-Match": '"3"'}
    assert calls.change_job("job_1", run_at=None).body == {"run_at": None}
    assert calls.change_job("job_1", priority=5).headers == {}


def test_a_stream_goes_on_after_the_last_event() -> None:
    assert calls.follow_job("job_1", after=7).headers["Last-Event-ID"] == "7"
    assert "Last-Event-ID" not in calls.follow_job("job_1").headers
