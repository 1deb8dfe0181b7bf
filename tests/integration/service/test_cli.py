"""The nouns of the command line against the service: batches, artifacts, evaluations, queues, usage."""

import asyncio
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.commands import data

from client import calls
from client.aio import AsyncClient
from client.errors import ApiError, BadInputError, UnavailableError, WaitTimeoutError
from client.main import run
from infra.jobs import Job

pytestmark = pytest.mark.integration


def work(service: Any) -> Job:
    """Do the next job as a worker would."""
    claim = service.claim()
    if claim.job.kind == "evaluate":
        metrics = {"perplexity": 21.5, "windows": 2, "seq_len": 64, "tokens": 126, "model_bytes": 5}
        result = {"artifact_job_id": claim.job.spec["artifact_job_id"], "metrics": metrics, "seconds": 1.0}
        return service.jobs.complete(claim, result)
    service.do_layers(claim, 1)
    return service.finish(claim)


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """A batch file that names models, a preset and a recipe file the short way."""
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"name": "mine", "activation": {"bits": 8}}))
    path = tmp_path / "zoo.yaml"
    path.write_text("name: pair\nmodels: ['demo:smollm2-135m', 'demo:smol*']\nrecipes: [rtn, mine.yaml]\n")
    return path


def test_a_batch_is_submitted_watched_retried_and_shown(service: Any, cli: Any, zoo: Path) -> None:
    batch = data(cli("batch", "submit", str(zoo), "--json"))
    assert (batch["name"], batch["jobs"]["total"]) == ("pair", 2)
    assert [each["id"] for each in data(cli("batch", "list", "--json"))["items"]] == [batch["id"]]
    found = ("--state", "running", "--state", "failed", "--name", "pair", "--recipe", "rtn", "--created-from", "-1h")
    assert [each["id"] for each in data(cli("batch", "list", *found, "--json"))["items"]] == [batch["id"]]
    for other in (("--state", "succeeded"), ("--name", "other"), ("--model", "x"), ("--created-until", "-1h")):
        assert data(cli("batch", "list", *other, "--json"))["items"] == []
    assert cli("batch", "wait", batch["id"], "--timeout", "0.2")[0] == 124
    work(service)
    service.jobs.fail(service.claim(), "worker_error", "the GPU fell off")
    status, out, err = cli("batch", "wait", batch["id"])
    assert status == 1
    assert "1 of the 2 jobs" in err
    assert f"duquant batch retry {batch['id']}" in err
    lines = out.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [
        ["smollm2-135m", "rtn", "succeeded"],
        ["smollm2-135m", "mine", "failed"],
    ]
    assert "worker_error: the GPU fell off" in lines[2]
    assert data(cli("batch", "retry", batch["id"], "--json"))["state"] == "running"
    work(service)
    assert cli("batch", "wait", batch["id"])[0] == 0
    again = data(cli("batch", "submit", str(zoo), "--json"))
    assert again["reused"] == 2
    assert cli("batch", "submit", str(zoo), "--wait")[0] == 0
    forced = data(cli("batch", "submit", str(zoo), "--force", "-o", "json"))
    assert data(cli("batch", "cancel", forced["id"], "--json"))["state"] == "cancelled"
    assert len(yaml.safe_load(cli("batch", "table", batch["id"], "-o", "yaml")[1])["rows"]) == 2
    assert data(cli("batch", "requantize", "--dry-run", "--json"))["batch"] is None


def test_a_refused_model_is_not_tried_again_but_submitted(cli: Any, tmp_path: Path) -> None:
    file = tmp_path / "zoo.yaml"
    file.write_text("models: [local:absent]\nrecipes: [rtn]\n")
    status, out, err = cli("batch", "submit", str(file), "--wait")
    assert (status, "refused" in out) == (1, True)
    assert "submit it again" in err
    assert "batch retry" not in err
    assert "finished" in cli("batch", "get", err.split()[1].rstrip(":"))[1]


def test_what_is_refused_is_told_without_waiting(cli: Any, tmp_path: Path) -> None:
    file = tmp_path / "zoo.yaml"
    file.write_text("models: [local:absent, local:gone]\nrecipes: [rtn]\n")
    status, out, err = cli("batch", "submit", str(file))
    assert (status, "2 failed (refused)" in out) == (1, True)
    assert "refused absent with rtn: no model absent" in err
    assert "nothing of batch_" in err.splitlines()[-1]
    file.write_text("models: [local:absent, 'demo:smollm2-135m']\nrecipes: [rtn]\n")
    status, _, err = cli("batch", "submit", str(file))
    assert (status, err.count("refused absent with rtn: ")) == (0, 1)
    assert "nothing of" not in err


def test_jobs_and_evaluations_are_counted_apart_and_a_bad_input_is_not_tried_again(
    service: Any, cli: Any, tmp_path: Path
) -> None:
    file = tmp_path / "zoo.yaml"
    file.write_text("models: ['demo:smollm2-135m']\nrecipes: [rtn, duquant]\nevaluate: {}\n")
    status, out, err = cli("batch", "submit", str(file))
    assert status == 0
    batch_id = out.split()[1]
    assert err == f"submitted {batch_id}: 2 jobs and 2 evaluations\n"
    service.jobs.fail(service.claim(), "bad_input", "the text is too short")
    work(service)
    work(service)
    status, _, err = cli("batch", "wait", batch_id)
    assert status == 1
    assert "2/2 jobs, 2/2 evaluations" in err
    assert "2 of the 2 jobs and 2 evaluations" in err.splitlines()[-1]
    assert "mend what the table says and submit it again" in err
    assert "batch retry" not in err


def test_an_evaluation_that_did_not_succeed_says_why_in_the_table(service: Any, cli: Any, tmp_path: Path) -> None:
    file = tmp_path / "zoo.yaml"
    file.write_text("models: ['demo:smollm2-135m']\nrecipes: [rtn, duquant]\nevaluate: {}\n")
    batch_id = cli("batch", "submit", str(file))[1].split()[1]
    reasons = iter([("error", "the worker has no memory left"), ("bad_input", "the text is too short")])
    for _ in range(4):
        claim = service.claim()
        if claim.job.kind == "evaluate":
            service.jobs.fail(claim, *next(reasons))
            continue
        service.do_layers(claim, 1)
        service.finish(claim)
    status, out, err = cli("batch", "wait", batch_id)
    assert "evaluation: error: the worker has no memory left" in out
    assert "evaluation: bad_input: the text is too short" in out
    assert (status, f"duquant batch retry {batch_id}" in err) == (1, True)
    # One that is cancelled by itself.
    assert cli("batch", "retry", batch_id)[0] == 0
    rows = data(cli("batch", "table", batch_id, "--json"))["rows"]
    assert cli("job", "cancel", rows[0]["evaluation_job_id"])[0] == 0
    assert "evaluation: cancelled" in cli("batch", "table", batch_id)[1]


def test_options_that_what_is_there_does_not_take_are_named(service: Any, cli: Any, tmp_path: Path) -> None:
    first = ("job", "submit", "demo:smollm2-135m", "--recipe", "rtn", "--label", "team=a", "--priority", "7")
    job = data(cli(*first, "--json"))
    work(service)
    assert cli(*first)[2] == f"found {job['id']} (succeeded)\n", "it has all of that already"
    ignored = cli(*first, "--run-at", "+2h", "--deadline", "+3h", "--label", "run=2", "--priority", "8")[2]
    for option in ("--run-at", "--deadline", "--label", "--priority"):
        assert option in ignored.splitlines()[1]
    assert "--queue" not in ignored
    assert f"do not apply to {job['id']}; --force makes it anew" in ignored
    file = tmp_path / "zoo.yaml"
    file.write_text("models: ['demo:smollm2-135m']\nrecipes: [rtn]\n")
    err = cli("batch", "submit", str(file), "--priority", "3")[2]
    assert "1 job, 1 of them there already" in err
    assert "--priority does not apply to what is there already" in err
    assert "apply" not in cli("batch", "submit", str(file))[2]


def test_nothing_outdated_is_a_sentence(cli: Any) -> None:
    assert cli("batch", "requantize", "--dry-run") == (0, "", "nothing is outdated\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models: demo:x", "list of models"),
        ("models: [x]", "no model"),
        ("models: [demo:x]\nrecipe: rtn", "'recipe'"),
        ("models: [demo:x]\nrecipes: rtn", "recipes must be a list"),
        ("models: [demo:x]\nrecipes: [absent.json]", "absent.json"),
        ("models: [", "no YAML"),
        ("models: [5]", "no model"),
    ],
)
def test_a_wrong_batch_file_is_one_line_before_anything_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    monkeypatch.setenv("DUQUANT_CONFIG", str(tmp_path / "config.yaml"))
    (tmp_path / "zoo.yaml").write_text(text)
    status = run(["batch", "submit", str(tmp_path / "zoo.yaml"), "--url", "http://127.0.0.1:9", "--key", "k"])
    err = capsys.readouterr().err
    assert status == 2
    assert words in err
    assert len(err.strip().splitlines()) == 1


def test_artifacts_are_listed_tagged_compared_measured_pulled_and_deleted(
    service: Any, cli: Any, tmp_path: Path
) -> None:
    jobs = [data(cli("job", "submit", "demo:smollm2-135m", "--recipe", name, "--json")) for name in ("rtn", "duquant")]
    made = [work(service) for _ in jobs]
    a, b = (data(cli("artifact", "get", job.id, "--json")) for job in made)
    assert data(cli("artifact", "tag", a["id"], "best", "--json"))["tags"] == ["best"]
    assert [each["id"] for each in data(cli("artifact", "list", "--tag", "be*", "--json"))["items"]] == [a["id"]]
    difference = data(cli("artifact", "compare", a["id"], b["id"], "--json"))
    assert "transform.rotation" in {each["field"] for each in difference["recipe"]}
    shown = cli("artifact", "compare", a["id"], b["id"])[1]
    assert "transform.rotation" in shown
    assert f"only {a['id']}" not in shown

    waiting = data(cli("evaluation", "submit", a["id"], "--windows", "2", "--json"))
    assert waiting["kind"] == "evaluate"
    worker = threading.Thread(target=work, args=(service,))
    worker.start()
    measured = data(cli("evaluation", "submit", a["id"], "--windows", "2", "--wait", "--json"))
    worker.join()
    assert measured["metrics"]["perplexity"] == 21.5
    assert "21.5" in cli("evaluation", "get", measured["id"])[1]
    assert len(data(cli("evaluation", "list", "--artifact", a["id"], "--json"))["items"]) == 1
    assert "21.50" in cli("artifact", "list")[1]

    pulled = data(cli("artifact", "pull", a["id"], "--out", str(tmp_path / "out"), "--json"))
    assert pulled["fetched_bytes"] == pulled["size_bytes"]
    until = "2036-01-31T00:00:00Z"
    assert data(cli("artifact", "keep", b["id"], "--until", until, "--json"))["expires_at"].startswith("2036-01-31")
    assert data(cli("artifact", "keep", b["id"], "--json"))["expires_at"] is None
    status, _, err = cli("artifact", "delete", a["id"])
    assert (status, "--force" in err) == (1, True), "it has a tag"
    assert data(cli("artifact", "untag", a["id"], "best", "--json"))["tags"] == []
    assert cli("artifact", "delete", a["id"])[0] == 0
    assert cli("artifact", "get", a["id"])[0] == 4


def test_jobs_are_retried_estimated_ordered_and_filtered(service: Any, cli: Any) -> None:
    job = data(cli("job", "submit", "demo:smollm2-135m", "--recipe", "rtn", "--evaluate", "--json"))
    assert service.jobs.get(job["evaluation_job_id"]).state == "blocked"
    later = data(cli("job", "submit", "demo:smollm2-135m", "--recipe", "duquant", "--after", job["id"], "--json"))
    assert (later["state"], later["depends_on"]) == ("blocked", [job["id"]])
    assert cli("job", "submit", "demo:smollm2-135m", "--after", "job_absent")[0] == 2
    data(cli("job", "cancel", job["id"], "--json"))
    assert data(cli("job", "retry", job["id"], "--json"))["state"] == "queued"
    assert cli("job", "retry", job["id"])[0] == 1
    kinds = [each["kind"] for each in data(cli("job", "list", "--kind", "evaluate", "--json"))["items"]]
    assert kinds == ["evaluate"]
    listed = data(cli("job", "list", "--recipe", "rtn", "--kind", "quantize", "--json"))["items"]
    assert [each["id"] for each in listed] == [job["id"]]
    assert "time" in data(cli("job", "estimate", "demo:smollm2-135m", "--recipe", "rtn", "--json"))
    assert "no job like it has finished" in cli("job", "estimate", "demo:smollm2-135m", "--samples", "3")[1]
    status, _, err = cli("job", "estimate", "demo:smollm2-135m", "--seq-len", "0")
    assert (status, err.startswith("duquant: error: --seq-len: ")) == (2, True)


def test_people_see_when_jobs_ran_what_they_made_and_why_they_failed(service: Any, cli: Any) -> None:
    made = service.finished_job(layers=2)  # layers of 0.5, 1.5 and 2.5 s
    shown = dict(line.split("  ", 1) for line in cli("job", "get", made.id)[1].splitlines())
    shown = {name.strip(): value.strip() for name, value in shown.items()}
    assert shown["created"].endswith(" ago)")
    assert {"started", "finished", "took"} <= set(shown)
    assert (shown["GPU time"], shown["artifact"]) == ("4.5 s", "5 files, 4.5 MB")
    assert "{" not in "".join(shown.values()), "no JSON"
    failed = service.submit()
    service.jobs.fail(service.claim(), "bad_input", "the text is too short")
    lines = cli("job", "list")[1].splitlines()
    assert lines[0].split()[-4:] == ["took", "GPU", "time", "reason"]
    assert lines[1].split()[0] == failed["id"]
    assert lines[1].endswith("bad_input")
    assert (" ago " in lines[2], "4.5 s" in lines[2]) == (True, True)


def test_artifacts_that_differ_name_their_models_and_files(service: Any, cli: Any) -> None:
    a, b = service.finished_job(layers=2), None
    service.enqueue(model_name="other", recipe_name="mine")
    claim = service.claim()
    service.do_layers(claim, 1)
    b = service.finish(claim)
    lines = [line.split() for line in cli("artifact", "compare", a.id, b.id)[1].splitlines()]
    assert ["model", "smollm2-135m", "other"] in lines
    assert ["recipe", "duquant", "mine"] in lines
    assert lines[-1][-1] == "model-layer-0001.safetensors"


@pytest.mark.parametrize("arguments", [("artifact", "pull"), ("artifact", "get"), ("evaluation", "get")])
def test_a_word_that_is_no_id_is_told_what_one_looks_like(cli: Any, arguments: tuple[str, str]) -> None:
    status, _, err = cli(*arguments, "nope")
    assert (status, "'nope' is no" in err, "job_..." in err) == (2, True, True), err


def test_operators_see_and_steer_what_runs(service: Any, cli: Any) -> None:
    service.submit()
    assert "demo:smollm2-135m" in cli("model", "list")[1]
    assert data(cli("queue", "pause", "default", "--json"))["paused"] is True
    assert service.jobs.claim("x", lease_seconds=5) is None
    assert data(cli("queue", "resume", "default", "--json"))["paused"] is False
    assert data(cli("queue", "list", "--json"))["items"][0]["waiting"] == 1
    assert data(cli("worker", "list", "--json"))["items"] == []
    service.jobs.fail(service.claim(), "bad_input", "on purpose")
    assert "on purpose" in cli("failures")[1]
    assert data(cli("usage", "--json"))["gpu_seconds"] == 0
    service.app.state.context.tenants.change("default", max_queued=0, actor="test")
    status, _, err = cli("job", "submit", "demo:smollm2-135m", "--recipe", "rtn")
    assert (status, "waiting jobs" in err) == (6, True)
    checks = {each["name"]: each for each in data(cli("doctor", "--json"))["checks"]}
    assert checks["API key"]["ok"]
    assert "no dispatcher" in checks["service"]["detail"]


def test_projects_are_made_changed_and_paused(service: Any, cli: Any) -> None:
    made = data(cli("project", "create", "zoo", "--weight", "2", "--max-queued", "5", "--json"))
    assert (made["id"], made["name"], made["weight"], made["max_queued"]) == ("zoo", "zoo", 2.0, 5)
    assert data(cli("project", "set", "zoo", "--max-queued", "-1", "--json"))["max_queued"] is None
    assert data(cli("project", "pause", "default", "--json"))["paused"] is True
    service.submit()
    assert service.jobs.claim("x", lease_seconds=5) is None
    assert "paused" in cli("project", "get", "default")[1]
    assert data(cli("project", "resume", "default", "--json"))["paused"] is False
    assert {each["id"] for each in data(cli("project", "list", "--json"))["items"]} == {"zoo", "default"}
    assert cli("project", "get", "absent")[0] == 4
    assert cli("project", "get", "../x")[0] == 2


def test_ctrl_c_detaches_from_a_batch(service: Any, zoo: Path, tmp_path: Path) -> None:
    with service.client() as client:
        batch = client.submit_batch(["demo:smollm2-135m"], ["rtn"])
    options = ["--url", service.url, "--key", service.token]
    process = subprocess.Popen(
        [sys.executable, "-m", "client.main", "batch", "wait", batch.id, *options], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert "0/1 jobs" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert f"duquant batch wait {batch.id}" in err
    assert service.http.get(f"/v1/batches/{batch.id}").json()["state"] == "running"


def test_the_asynchronous_client_makes_the_same_calls(service: Any) -> None:
    async def go() -> None:
        async with AsyncClient(service.url, service.token) as client:
            job = await client.run(calls.submit_job("demo:smollm2-135m", "rtn"))
            with pytest.raises(WaitTimeoutError):
                await client.wait(job.id, timeout_s=0.5)
            waiting = asyncio.create_task(client.wait(job.id, timeout_s=60))
            await asyncio.to_thread(work, service)
            ended = await waiting
            assert (ended.id, ended.state) == (job.id, "succeeded")
            artifact = await client.run(calls.get_artifact(job.id))
            await client.run(calls.delete_artifact(artifact.id))
            with pytest.raises(ApiError) as caught:
                await client.run(calls.get_artifact(artifact.id))
            assert caught.value.status == 404
        async with AsyncClient("http://127.0.0.1:9", service.token) as client:
            with pytest.raises(UnavailableError, match="duquant up"):
                await client.run(calls.list_batches())
        with pytest.raises(BadInputError):
            AsyncClient("ftp://x", "k")

    asyncio.run(go())
