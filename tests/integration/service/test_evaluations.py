"""Evaluations and quality gates over HTTP: what is asked for, what is refused, what is shown."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from client.aio import AsyncClient
from client.errors import ApiError
from infra.artifact_keys import report_key
from infra.jobs import Measured

pytestmark = pytest.mark.integration

MODEL = {"source": "demo", "name": "smollm2-135m"}
QUIZ = {"kind": "file", "name": "quiz.jsonl"}


@pytest.fixture
def quiz(service: Any) -> Path:
    """A task file below the text roots."""
    path: Path = service.settings.text_roots[0] / "quiz.jsonl"
    path.write_text('{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}\n')
    return path


def ask(service: Any, path: str, body: dict[str, Any], status: int = 201) -> dict[str, Any]:
    answer = service.http.post(path, json=body)
    assert answer.status_code == status, answer.text
    shown: dict[str, Any] = answer.json()
    return shown


def get(service: Any, path: str, status: int = 200) -> dict[str, Any]:
    answer = service.http.get(path)
    assert answer.status_code == status, answer.text
    shown: dict[str, Any] = answer.json()
    return shown


def test_a_job_and_its_evaluation_lead_to_each_other(service: Any) -> None:
    job = ask(service, "/v1/jobs", {"model": MODEL, "recipe": "rtn", "evaluate": {"windows": 2}})
    evaluation = get(service, f"/v1/jobs/{job['evaluation_job_id']}")
    assert (evaluation["state"], evaluation["artifact_job_id"]) == ("blocked", job["id"])
    assert get(service, f"/v1/jobs/{job['id']}")["evaluation_job_ids"] == [evaluation["id"]]
    claim = service.claim()
    service.do_layers(claim, 1)
    service.finish(claim)
    # The same transaction that ended the one has queued the other.
    assert get(service, f"/v1/jobs/{evaluation['id']}")["state"] == "queued"

    same = ask(service, "/v1/jobs", {"model": MODEL, "recipe": "rtn", "evaluate": {"windows": 2}}, 200)
    assert (same["id"], same["evaluation_job_id"]) == (job["id"], evaluation["id"])
    other = ask(service, "/v1/jobs", {"model": MODEL, "recipe": "rtn", "evaluate": {"windows": 3}}, 200)
    assert (other["id"], other["reused"]) == (job["id"], True)
    late = get(service, f"/v1/jobs/{other['evaluation_job_id']}")
    assert (late["state"], late["artifact_job_id"], late["depends_on"]) == ("queued", job["id"], [job["id"]])
    linked = get(service, f"/v1/jobs/{job['id']}")["evaluation_job_ids"]
    assert linked == [late["id"], evaluation["id"]]


def test_what_is_measured_by_parts_is_shown_while_it_runs_and_after_it_failed(service: Any, quiz: Path) -> None:
    job = ask(service, "/v1/evaluations", {"model": MODEL, "tasks": [QUIZ], "speed": {"decode_batches": [1, 4]}})
    get(service, f"/v1/evaluations/{job['id']}", 404)
    claim = service.claim()
    spec = claim.job.spec
    assert spec["evaluation"]["tasks"] == [{**QUIZ, "num_fewshot": None, "limit": None}]
    assert spec["evaluation"]["speed"]["decode_batches"] == [1, 4]
    assert set(spec["task_identities"]) == {"quiz.jsonl"}
    parts = {
        "perplexity": {"state": "done"},
        "task quiz.jsonl": {"state": "failed", "error": "line 1 has no goal"},
        "speed": {"state": "pending"},
    }
    measured = Measured(
        fingerprint=claim.job.fingerprint,
        artifact_job_id=None,
        settings=spec["evaluation"],
        metrics={"perplexity": 9.5},
        parts=parts,
        is_complete=False,
    )
    service.jobs.record_measured(claim, measured)
    service.jobs.fail(claim, "bad_input", "task quiz.jsonl: line 1 has no goal")
    shown = get(service, f"/v1/evaluations/{job['id']}")
    assert (shown["is_complete"], shown["has_report"], shown["metrics"]) == (False, False, {"perplexity": 9.5})
    assert shown["parts"]["task quiz.jsonl"] == {"state": "failed", "error": "line 1 has no goal"}
    assert {name: part["state"] for name, part in shown["parts"].items()}["speed"] == "pending"
    refused = get(service, f"/v1/evaluations/{shown['id']}/report", 409)
    assert refused["type"] == "urn:duquant:problem:report-not-ready"


def test_a_report_is_behind_a_link_that_needs_no_key(service: Any, cli: Any, tmp_path: Path) -> None:
    job = ask(service, "/v1/evaluations", {"model": MODEL, "force": True})
    claim = service.claim()
    key = report_key("default", job["id"], "1-measured.html")
    service.storage.put_bytes(key, b"<!doctype html><p>9.5")
    result = {"artifact_job_id": None, "metrics": {"perplexity": 9.5}, "report_key": key, "seconds": 1.0}
    service.jobs.complete(claim, result)
    answer = service.http.get(f"/v1/evaluations/{job['id']}/report", follow_redirects=False)
    assert answer.status_code == 307
    page = httpx.get(answer.headers["Location"])
    assert page.content == b"<!doctype html><p>9.5"
    assert page.headers["Content-Disposition"].startswith("attachment")
    out = tmp_path / "page.html"
    status, _, err = cli("evaluation", "report", job["id"], "--out", str(out))
    assert (status, out.read_bytes()) == (0, page.content), err

    async def fetch() -> bytes:
        async with AsyncClient(service.url, service.token) as client:
            with pytest.raises(ApiError):
                await client.report("eval_nope")
            return await client.report(job["id"])

    assert asyncio.run(fetch()) == page.content


@pytest.mark.parametrize("name", ["nope", "eval_" + "z" * 80, "EVAL_1", "eval_%00", "job_1/../2"])
def test_an_evaluation_that_is_not_there_is_said_in_a_sentence(service: Any, name: str) -> None:
    answer = service.http.get(f"/v1/evaluations/{name}")
    assert answer.status_code == 404
    assert "pattern" not in answer.text
    assert "^" not in answer.text


@pytest.mark.parametrize(
    ("settings", "pointer", "kind"),
    [
        ({"tasks": [{"name": "piqa"}]}, "/tasks/0/name", "text-forbidden"),
        ({"tasks": [QUIZ, {"kind": "file", "name": "absent.jsonl"}]}, "/tasks/1/name", "text-not-found"),
        ({"tasks": [{"kind": "file", "name": "../quiz.jsonl"}]}, "/tasks/0/name", "text-forbidden"),
        ({"tasks": [{"kind": "file", "name": "/etc/quiz.jsonl"}]}, "/tasks/0/name", "text-forbidden"),
        ({"tasks": [{"kind": "file", "name": "https://a.b/c.jsonl"}]}, "/tasks/0/name", "text-forbidden"),
        ({"tasks": [{"kind": "object", "name": "texts/other/a.jsonl"}]}, "/tasks/0/name", "text-forbidden"),
        ({"tasks": [{"kind": "object", "name": "texts/default/a.jsonl"}]}, "/tasks/0/name", "text-not-found"),
        ({"tasks": [{"kind": "object", "name": "texts/default/a.yaml"}]}, "/tasks/0/name", "validation-failed"),
        ({"tasks": [{"kind": "file", "name": "quiz.txt"}]}, "/tasks/0/name", "validation-failed"),
        ({"tasks": [{**QUIZ, "limit": 0}]}, "/tasks/0/limit", "validation-failed"),
        ({"tasks": [QUIZ, QUIZ]}, "/tasks", "validation-failed"),
        ({"perplexity": False}, "/perplexity", "validation-failed"),
        ({"speed": {"decode_batches": [0]}}, "/speed/decode_batches", "validation-failed"),
        ({"speed": {"batches": [1]}}, "/speed/batches", "validation-failed"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_its_field(
    service: Any, quiz: Path, settings: dict[str, Any], pointer: str, kind: str
) -> None:
    for path, body, prefix in (
        ("/v1/evaluations", {"model": MODEL, **settings}, ""),
        ("/v1/jobs", {"model": MODEL, "evaluate": settings}, "/evaluate"),
    ):
        problem = service.http.post(path, json=body).json()
        assert problem["type"] == f"urn:duquant:problem:{kind}", problem
        assert problem["errors"][0]["pointer"] == prefix + pointer


@pytest.mark.parametrize(
    ("gate", "pointer", "kind"),
    [
        ({}, "/recipe/quality_gate", "validation-failed"),
        ({"max_perplexity_increase": -1}, "/recipe/quality_gate/max_perplexity_increase", "validation-failed"),
        ({"min_accuracy": {"x": 1}, "tasks": ["y"]}, "/recipe/quality_gate/min_accuracy", "validation-failed"),
        ({"min_accuracy": 0.5, "tasks": ["piqa"]}, "/recipe/quality_gate/tasks/0", "text-forbidden"),
        ({"min_accuracy": 0.5, "tasks": ["no.jsonl"]}, "/recipe/quality_gate/tasks/0", "text-not-found"),
        (
            {"max_perplexity_increase": 1, "text": {"kind": "file", "name": "/etc/passwd"}},
            "/recipe/quality_gate/text/name",
            "text-forbidden",
        ),
    ],
)
def test_a_gate_that_cannot_be_checked_is_refused_by_its_field(
    service: Any, gate: dict[str, Any], pointer: str, kind: str
) -> None:
    problem = service.http.post("/v1/jobs", json={"model": MODEL, "recipe": {"quality_gate": gate}}).json()
    assert problem["type"] == f"urn:duquant:problem:{kind}", problem
    assert problem["errors"][0]["pointer"] == pointer


def test_a_gate_makes_another_job_and_the_same_gate_the_same(service: Any, quiz: Path) -> None:
    def submit(gate: dict[str, Any] | None, status: int = 201) -> dict[str, Any]:
        return ask(service, "/v1/jobs", {"model": MODEL, "recipe": {"seed": 7, "quality_gate": gate}}, status)

    plain = submit(None)
    gated = submit({"max_perplexity_increase": 0.5})
    assert submit({"max_perplexity_increase": 0.5}, 200)["id"] == gated["id"]
    stricter = submit({"max_perplexity_increase": 0.4})
    tasks = submit({"min_accuracy": 0.5, "tasks": ["quiz.jsonl"]})
    assert len({job["id"] for job in (plain, gated, stricter, tasks)}) == 4
    quiz.write_text("other questions\n" * 3)
    assert submit({"min_accuracy": 0.5, "tasks": ["quiz.jsonl"]})["id"] != tasks["id"]
    # Asked for anew, each gated recipe is what it was.
    digests = {json.dumps(get(service, f"/v1/jobs/{job['id']}")["recipe"]["quality_gate"]) for job in (plain, gated)}
    assert len(digests) == 2


def test_a_text_that_a_gate_or_a_task_reads_is_not_deleted(service: Any) -> None:
    lines = b'{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}\n'
    headers = {"Content-Type": "application/x-ndjson"}
    text = service.http.post("/v1/texts?name=quiz", content=lines, headers=headers).json()
    task = {"kind": "object", "name": text["source"]["name"]}
    job = ask(service, "/v1/evaluations", {"model": MODEL, "tasks": [task]})
    assert service.http.delete(f"/v1/texts/{text['id']}").status_code == 409
    service.http.post(f"/v1/jobs/{job['id']}:cancel")
    assert service.http.delete(f"/v1/texts/{text['id']}").status_code == 204


def test_the_command_line_asks_for_tasks_and_shows_their_scores(service: Any, cli: Any, quiz: Path) -> None:
    status, out, err = cli(
        "evaluation",
        "submit",
        "demo:smollm2-135m",
        "--tasks",
        "quiz.jsonl",
        "--limit",
        "3",
        "--text",
        "none",
        "--speed",
    )
    assert status == 0, err
    claim = service.claim()
    assert claim.job.spec["evaluation"]["tasks"] == [{**QUIZ, "num_fewshot": None, "limit": 3}]
    assert "text" not in claim.job.spec["evaluation"]
    row = {"phase": "prefill", "tokens": 8, "tokens_per_second": {"duquant": 123.0}, "speedup": {"duquant": 1.5}}
    metrics = {
        "tasks": {"quiz": {"acc": 0.75, "acc_stderr": 0.05, "samples": 3}},
        "speed": {"artifact": "duquant", "layer": [], "model": [row]},
        "model_bytes": 5,
    }
    parts = {"task quiz.jsonl": {"state": "done"}, "speed": {"state": "done"}}
    service.jobs.complete(claim, {"artifact_job_id": None, "metrics": metrics, "parts": parts, "seconds": 1.0})
    status, out, err = cli("evaluation", "get", claim.job.id, "-o", "table")
    assert status == 0, err
    for words in ("quiz", "acc", "0.75", "prefill 8", "123", "1.5"):
        assert words in out
