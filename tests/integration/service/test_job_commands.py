"""`duquant job` beside the rest of the API: when a job runs, what happens to it, and what keeps it waiting."""

import asyncio
import json
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest
import yaml
from support.commands import data

from client.aio import AsyncClient
from client.errors import ApiError, UnavailableError
from client.main import run
from client.models import Event
from client.sdk import Client
from service import stream

pytestmark = pytest.mark.integration

MODEL = "demo:smollm2-135m"


def pairs(answer: tuple[int, str, str]) -> dict[str, str]:
    """Read what a command has printed for people."""
    assert answer[0] == 0, answer
    cut = (line.split("  ", 1) for line in answer[1].splitlines())
    return {name: value.strip() for name, value in cut}


def work(service: Any) -> None:
    claim = service.claim()
    service.do_layers(claim, 2)
    service.finish(claim)


def test_a_job_is_submitted_for_later_and_shows_when_and_why_it_waits(service: Any, cli: Any) -> None:
    options = ["--run-at", "+2h", "--deadline", "2099-01-31", "--label", "team=search", "--label", "run=7=a"]
    job = data(cli("job", "submit", MODEL, "--recipe", "rtn", *options, "--priority", "5", "--json"))
    assert (job["state"], job["priority"]) == ("scheduled", 5)
    assert job["labels"] == {"team": "search", "run": "7=a"}
    assert job["deadline_at"].startswith("2099-01-31T00:00:00")
    shown = pairs(cli("job", "get", job["id"]))
    assert shown["not before"].endswith("(in 1 h)")
    assert shown["deadline"].startswith("2099-01-31 00:00:00 UTC")
    assert (shown["priority"], shown["labels"]) == ("5", "run=7=a, team=search")
    assert "held by" not in shown
    cli("queue", "pause", "default")
    assert pairs(cli("job", "get", job["id"]))["held by"] == "queue default, which is paused"
    cli("project", "pause", "default")
    both = "queue default and project default, which are paused"
    assert pairs(cli("job", "get", job["id"]))["held by"] == both
    assert data(cli("queue", "get", "default", "--json"))["paused"] is True
    assert pairs(cli("quota"))["state"] == "paused"


def test_a_bound_that_is_reached_is_named(service: Any, cli: Any) -> None:
    service.submit()
    waiting, later = service.submit()["id"], data(cli("job", "submit", MODEL, "--run-at", "+2h", "--force", "--json"))
    cli("project", "set", "default", "--max-running", "1")
    assert "held by" not in pairs(cli("job", "get", waiting)), "nothing runs yet"
    service.claim()
    held = "project default, which has 1 of 1 GPU slot taken"
    assert pairs(cli("job", "get", waiting))["held by"] == held
    assert "held by" not in pairs(cli("job", "get", later["id"])), "its time keeps it"
    cli("queue", "pause", "default")
    assert pairs(cli("job", "get", waiting))["held by"] == f"queue default, which is paused; {held}"


def test_an_artifact_that_was_deleted_is_told(service: Any, cli: Any) -> None:
    job = service.submit()["id"]
    work(service)
    assert pairs(cli("job", "get", job))["artifact"].startswith("5 files, ")
    assert "files" in pairs(cli("job", "get", job, "--key", service.key("jobs:read")))["artifact"]
    cli("artifact", "delete", job)
    assert pairs(cli("job", "get", job))["artifact"] == "deleted"


def test_what_is_usual_is_not_shown(service: Any, cli: Any) -> None:
    shown = pairs(cli("job", "get", service.submit()["id"]))
    assert shown.keys().isdisjoint({"queue", "priority", "labels", "deadline", "not before", "held by", "after"})


def test_a_key_for_one_purpose_still_sees_its_jobs(service: Any, cli: Any) -> None:
    job = service.submit()
    assert pairs(cli("job", "get", job["id"], "--key", service.key("jobs:read")))["state"] == "queued"


def test_a_job_is_changed_and_not_over_somebody_elses_change(service: Any, cli: Any) -> None:
    job = data(cli("job", "submit", MODEL, "--run-at", "+2h", "--deadline", "+1d", "--json"))
    changed = data(cli("job", "change", job["id"], "--priority", "7", "--deadline", "none", "--json"))
    assert (changed["priority"], changed["deadline_at"], changed["state"]) == (7, None, "scheduled")
    status, out, err = cli("job", "change", job["id"], "--run-at", "now", "--version", str(job["version"]))
    assert (status, out, "has changed since" in err) == (1, "", True)
    now = data(cli("job", "change", job["id"], "--run-at", "now", "--version", str(changed["version"]), "--json"))
    assert (now["state"], now["priority"]) == ("queued", 7)
    status, _, err = cli("job", "change", job["id"])
    assert (status, "--priority" in err) == (2, True)
    status, _, err = cli("job", "change", job["id"], "--run-at", "soon")
    assert (status, "--run-at" in err, len(err.splitlines())) == (2, True, 1)
    with service.client() as client, pytest.raises(ApiError) as caught:
        client.change(job["id"], version=job["version"], priority=8)
    assert caught.value.status == 412


def test_labels_of_a_job_are_replaced(service: Any, cli: Any) -> None:
    job = data(cli("job", "submit", MODEL, "--label", "team=a", "--label", "x=1", "--json"))
    changed = data(cli("job", "change", job["id"], "--label", "team=b", "--label", "y=2", "--json"))
    assert changed["labels"] == {"team": "b", "y": "2"}
    service.jobs.fail(service.claim(), "bad_input", "on purpose")
    assert data(cli("job", "change", job["id"], "--label", "none", "--json"))["labels"] == {}
    events = cli("job", "events", job["id"])[1]
    assert "changes=labels:team:b,y:2" in events
    assert "changes=labels:none" in events
    status, _, err = cli("job", "change", job["id"], "--label", "none", "--label", "a=1")
    assert (status, "give it alone" in err) == (2, True)
    assert cli("job", "change", job["id"], "--label", "a=1", "--label", "a=2")[0] == 2


def test_jobs_are_found_by_all_that_the_api_finds_them_by(service: Any, cli: Any) -> None:
    one = data(cli("job", "submit", MODEL, "--recipe", "rtn", "--label", "team=a", "--label", "x=1", "--json"))
    two = data(cli("job", "submit", MODEL, "--recipe", "duquant", "--label", "team=a", "--json"))
    service.jobs.fail(service.claim(), "bad_input", "on purpose")

    def found(*options: str) -> list[str]:
        return [each["id"] for each in data(cli("job", "list", *options, "--json"))["items"]]

    assert found("--label", "team=a") == [two["id"], one["id"]]
    assert found("--label", "team=a", "--label", "x=1") == [one["id"]]
    assert found("--reason", "bad_input") == [one["id"]]
    assert found("--state", "queued", "--state", "failed") == [two["id"], one["id"]]
    assert found("--state", "queued") == [two["id"]]
    assert (len(found("--queue", "default")), found("--queue", "absent")) == (2, [])
    assert (len(found("--created-from", "-1h")), found("--created-until", "-1h")) == (2, [])
    status, _, err = cli("job", "list", "--label", "team")
    assert (status, "team=search" in err) == (2, True)
    assert cli("job", "submit", MODEL, "--label", "a=1", "--label", "a=2")[0] == 2


def test_events_are_printed_as_they_happen_until_the_job_ends(service: Any, cli: Any) -> None:
    job = service.submit()
    worker = threading.Thread(target=work, args=(service,))
    worker.start()
    status, out, err = cli("job", "events", job["id"], "-o", "json")
    worker.join()
    events = [json.loads(line) for line in out.splitlines()]
    assert (status, err) == (0, "")
    assert (events[0]["type"], events[-1]["type"]) == ("enqueued", "succeeded")
    last = events[-1]["id"]
    assert json.loads(cli("job", "events", job["id"], "--after", str(last - 1), "--json")[1]) == events[-1]
    as_yaml = list(yaml.safe_load_all(cli("job", "events", job["id"], "-o", "yaml")[1]))
    assert as_yaml == events
    lines = cli("job", "events", job["id"])[1].splitlines()
    assert len(lines) == len(events)
    assert "by=key:" in lines[0]
    assert cli("job", "events", "job_absent")[0] == 4


def test_the_facts_of_events_are_written_for_people(service: Any, cli: Any) -> None:
    options = ("--run-at", "2098-01-31T09:30:00+01:00", "--deadline", "2099-01-31", "--json")
    job = data(cli("job", "submit", MODEL, *options))["id"]
    cli("job", "change", job, "--deadline", "none", "--run-at", "2098-01-31T10:30:00+01:00", "--priority", "5")
    cli("job", "cancel", job)
    lines = cli("job", "events", job)[1].splitlines()
    assert "forced=false" in lines[0]
    (changed,) = (part for line in lines for part in line.split() if part.startswith("changes="))
    facts = {"priority:5", "run_at:2098-01-31T09:30:00Z", "deadline_at:none"}
    assert set(changed.removeprefix("changes=").split(",")) == facts


def test_events_go_on_when_the_service_ends_the_stream(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "LONGEST_SECONDS", 0.2)
    job = service.submit()

    async def follow() -> list[Event]:
        async with AsyncClient(service.url, service.token) as client:
            return [event async for event in client.events(job["id"])]

    later = threading.Timer(1.5, work, args=(service,))
    later.start()
    with service.client() as client:
        followed = list(client.events(job["id"]))
    later.join()
    assert followed[-1].type == "succeeded"
    assert [event.id for event in followed] == sorted({event.id for event in followed})
    assert asyncio.run(follow()) == followed


def test_a_service_that_is_not_there_is_told_at_once(service: Any) -> None:
    with Client("http://127.0.0.1:9", service.token) as client, pytest.raises(UnavailableError):
        next(client.events("job_1"))


def test_ctrl_c_detaches_from_events(service: Any) -> None:
    job = service.submit()
    options = ["--url", service.url, "--key", service.token]
    process = subprocess.Popen(
        [sys.executable, "-m", "client.main", "job", "events", job["id"], *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert "enqueued" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert f"duquant job wait {job['id']}" in err
    assert service.jobs.get(job["id"]).state == "queued"


def test_layers_are_listed(service: Any, cli: Any) -> None:
    job = service.finished_job(layers=2)
    lines = [line.split() for line in cli("job", "layers", job.id)[1].splitlines()]
    assert [line[:2] for line in lines[1:]] == [["extra", "done"], ["0", "done"], ["1", "done"]]
    assert len(data(cli("job", "layers", job.id, "--json"))["items"]) == 3


def test_every_display_counts_the_same_files(service: Any, cli: Any, tmp_path: Any) -> None:
    job = service.finished_job(layers=1)
    listed = data(cli("artifact", "files", job.id, "--json"))["files"]
    assert listed[-1]["name"] == "manifest.json"
    assert len(cli("artifact", "files", job.id)[1].splitlines()) == len(listed) + 1
    assert pairs(cli("job", "get", job.id))["artifact"].startswith(f"{len(listed)} files, ")
    assert data(cli("artifact", "pull", job.id, "--out", str(tmp_path / "a"), "--json"))["files"] == len(listed)


def test_a_batch_takes_options_over_what_its_file_says(service: Any, cli: Any, tmp_path: Any) -> None:
    file = tmp_path / "zoo.yaml"
    file.write_text(f"name: day\npriority: 10\nmodels: ['{MODEL}']\nrecipes: [rtn]\n")
    batch = data(cli("batch", "submit", str(file), "--name", "night", "--priority", "300", "--json"))
    assert batch["name"] == "night"
    (job,) = data(cli("job", "list", "--batch", batch["id"], "--json"))["items"]
    assert job["priority"] == 300
    assert cli("batch", "list")[1].splitlines()[1].endswith(" s ago")
    status, _, err = cli("batch", "submit", str(file), "--queue", "absent")
    assert (status, err.startswith("duquant: error: --queue: ")) == (2, True)


def test_an_evaluation_has_a_priority(service: Any, cli: Any) -> None:
    assert data(cli("evaluation", "submit", MODEL, "--priority", "3", "--json"))["priority"] == 3


def test_the_project_and_the_service_are_seen(service: Any, cli: Any) -> None:
    service.submit()
    assert pairs(cli("quota"))["jobs that wait"] == "1, no limit"
    cli("project", "set", "default", "--max-queued", "4")
    assert pairs(cli("quota"))["jobs that wait"] == "1, at most 4"
    audit = data(cli("audit", "list", "--limit", "1", "--json"))
    assert [each["action"] for each in audit["items"]] == ["tenant.changed"]
    status, out, err = cli("audit", "list", "--limit", "1")
    assert (status, "max_queued=4" in out, audit["next_cursor"] in err) == (0, True, True)
    # Nothing works here: these tests are the dispatcher.
    seen = data(cli("status", "--json"), status=5)
    assert (seen["ready"], seen["checks"]["database"]["ok"]) == (False, True)
    assert "dispatcher  DOWN" in cli("status")[1]


def test_texts_show_ages(service: Any, cli: Any, tmp_path: Any) -> None:
    (tmp_path / "a.txt").write_text("It was a dark night.")
    shown = pairs(cli("text", "upload", str(tmp_path / "a.txt")))
    assert shown["made"].endswith(" ago)")
    assert cli("text", "list")[1].splitlines()[1].endswith(" s ago")


def test_what_is_wrong_with_a_whole_request_has_no_field_before_it(cli: Any, tmp_path: Any) -> None:
    (tmp_path / "empty.txt").touch()
    assert cli("text", "upload", str(tmp_path / "empty.txt"))[::2] == (2, "duquant: error: the text is empty\n")


def test_the_state_of_a_service_is_for_everybody(
    service: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    for name in ("DUQUANT_API_KEY", "DUQUANT_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DUQUANT_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("DUQUANT_CONFIG", str(tmp_path / "config.yaml"))
    monkeypatch.setenv("DUQUANT_URL", service.url)
    assert run(["status"]) == 5, "no dispatcher reports"
    assert "dispatcher  DOWN" in capsys.readouterr().out
    assert run(["job", "list"]) == 2
    assert "no API key" in capsys.readouterr().err
    monkeypatch.setenv("DUQUANT_URL", "http://127.0.0.1:9")
    assert run(["status"]) == 5
    said = capsys.readouterr()
    assert (said.out, len(said.err.splitlines())) == ("", 1)
    assert "cannot reach http://127.0.0.1:9" in said.err


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (("queue", "change", "default", "--max-running", "0"), "--max-running: "),
        (("job", "list", "--state", "queued", "--state", "nope"), "--state: "),
        (("job", "submit", MODEL, "--priority", "2000"), "--priority: "),
        (("job", "submit", MODEL, "--label", "team=" + "x" * 500), "--label: "),
        (("job", "submit", MODEL, "--deadline", "-1h"), "--deadline: "),
        (("job", "submit", MODEL, "--samples", "0"), "--samples: "),
        (("job", "submit", MODEL, "--seq-len", "1"), "--seq-len: "),
        (("job", "submit", MODEL, "--evaluate-seq-len", "-1"), "--evaluate-seq-len: "),
        (("job", "submit", MODEL, "--after", "job_absent"), "--after: "),
        (("key", "create", "k", "--scope", "nope"), "--scope: "),
    ],
)
def test_an_option_that_the_service_refuses_is_named(cli: Any, command: tuple[str, ...], named: str) -> None:
    status, _, err = cli(*command)
    assert (status, len(err.splitlines())) == (2, 1)
    assert err.startswith(f"duquant: error: {named}"), err
