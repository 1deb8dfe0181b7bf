"""The SDK and the command line against the service."""

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.commands import data

from client import download
from client.errors import ApiError, BadInputError, DownloadError, UnavailableError, WaitTimeoutError
from client.main import run
from client.models import Job
from client.partial import part_name
from client.sdk import Client
from infra.artifact_keys import ArtifactKeys
from infra.jobs import CardRevision

pytestmark = pytest.mark.integration


def in_background(work: Any) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_a_job_is_submitted_followed_and_pulled(service: Any, tmp_path: Path) -> None:
    seen: list[Job] = []
    with service.client() as client:
        job = client.submit("demo:smollm2-135m", "duquant", calibration={"samples": 4})
        assert (job.state, job.reused) == ("queued", False)

        def work() -> None:
            claim = service.claim()
            service.do_layers(claim, 3)
            service.finish(claim)

        worker = in_background(work)
        ended = client.wait(job.id, timeout_s=60, on_update=seen.append)
        worker.join()
        assert ended.state == "succeeded"
        assert seen[-1] == ended
        assert [event.type for event in client.events(job.id)][-1] == "succeeded"
        summary = client.pull(job.id, tmp_path / "out")
    assert summary.fetched_bytes == summary.size_bytes
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "manifest.json",
        "config.json",
        "model-extra.safetensors",
        *(f"model-layer-000{n}.safetensors" for n in range(3)),
    }


def test_pulling_again_fetches_nothing_and_mends_what_is_damaged(service: Any, tmp_path: Path) -> None:
    job = service.finished_job()
    with service.client() as client:
        client.pull(job.id, tmp_path / "out")
        assert client.pull(job.id, tmp_path / "out").fetched_bytes == 0
        shard = tmp_path / "out" / "model-layer-0001.safetensors"
        whole = shard.read_bytes()
        shard.write_bytes(whole[:-1] + b"!")
        assert client.pull(job.id, tmp_path / "out").fetched_bytes == len(whole)
        assert shard.read_bytes() == whole


def test_a_pull_that_was_cut_off_goes_on_where_it_was(service: Any, tmp_path: Path) -> None:
    job = service.finished_job(layers=1)
    out = tmp_path / "out"
    with service.client() as client:
        client.pull(job.id, out)
        shard = out / "model-layer-0000.safetensors"
        whole = shard.read_bytes()
        file = next(file for file in client.artifact(job.id).files if file.name == shard.name)
        shard.unlink()
        (out / ".duquant-partial").mkdir()
        (out / ".duquant-partial" / part_name(file)).write_bytes(whole[:1_000_000])
        assert client.pull(job.id, out).fetched_bytes == len(whole) - 1_000_000
    assert shard.read_bytes() == whole
    assert not (out / ".duquant-partial").exists()


def test_a_folder_with_something_else_in_it_is_refused_untouched(service: Any, cli: Any, tmp_path: Path) -> None:
    one, other = service.finished_job(layers=1), service.finished_job(layers=2)
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("years of work")
    status, _, err = cli("artifact", "pull", one.id, "--out", str(out))
    assert (status, "not this artifact" in err) == (2, True)
    assert {path.name: path.read_text() for path in out.iterdir()} == {"config.json": "years of work"}
    (out / "config.json").unlink()
    with service.client() as client:
        client.pull(one.id, out)
        with pytest.raises(BadInputError, match="not this artifact"):
            client.pull(other.id, out)
        assert client.pull(one.id, out).fetched_bytes == 0
        (out / "manifest.json").write_text("{}")
        with pytest.raises(BadInputError, match="not this artifact"):
            client.pull(one.id, out)


def test_no_manifest_stands_while_files_are_replaced(service: Any, tmp_path: Path) -> None:
    one, other = service.finished_job(layers=1), service.finished_job(layers=2)
    out = tmp_path / "out"
    with service.client() as client:
        client.pull(one.id, out)
        shard = out / "model-layer-0000.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1] + b"!")

        def break_off(present: int, total: int) -> None:
            if present > total - shard.stat().st_size:  # some of the shard has come
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            client.pull(one.id, out, on_bytes=break_off)
        assert not (out / "manifest.json").exists()
        with pytest.raises(BadInputError, match="half fetched"):
            client.pull(other.id, out)
        assert client.pull(one.id, out).fetched_bytes <= shard.stat().st_size
        assert (out / "manifest.json").exists()
        assert not (out / ".duquant-partial").exists()


PULL = """
import sys, pathlib
from client.sdk import Client
url, key, job, out = sys.argv[1:]
with Client(url, key) as client:
    for _ in range(5):
        client.pull(job, pathlib.Path(out))
"""


def test_two_pulls_do_not_fill_one_folder_at_once(service: Any, cli: Any, tmp_path: Path) -> None:
    job = service.finished_job(layers=1)
    out = tmp_path / "out"
    refused: list[tuple[int, str, str]] = []

    def pull_again(present: int, total: int) -> None:
        if not refused:
            refused.append(cli("artifact", "pull", job.id, "--out", str(out)))

    with service.client() as client:
        client.pull(job.id, out, on_bytes=pull_again)
        ((status, _, err),) = refused
        assert (status, "another pull fills" in err) == (2, True)
        assert not (out / ".duquant-partial").exists()
        assert client.pull(job.id, out).fetched_bytes == 0
        # Many at once: each is whole or refused, and what is left is whole.
        racers = [
            subprocess.Popen(
                [sys.executable, "-c", PULL, service.url, service.token, job.id, str(tmp_path / "race")],
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(4)
        ]
        said = [racer.communicate(timeout=60)[1] for racer in racers]
        assert all(
            racer.returncode == 0 or "another pull fills" in words for racer, words in zip(racers, said, strict=True)
        ), said
        assert any(racer.returncode == 0 for racer in racers)
        assert not (tmp_path / "race" / ".duquant-partial").exists()
        assert client.pull(job.id, tmp_path / "race").fetched_bytes == 0


def test_a_large_file_comes_in_pieces_and_what_has_arrived_is_kept(service: Any, tmp_path: Path) -> None:
    job = service.finished_job(layers=1)
    out = tmp_path / "out"
    with service.client() as client:

        def read() -> Any:
            return client.artifact(job.id)

        def break_off(present: int, total: int) -> None:
            if present > total // 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            download.pull(read, out, parallel=3, on_bytes=break_off, piece_bytes=200_000)
        left = {path.suffix for path in (out / ".duquant-partial").iterdir()}
        assert left >= {".part", ".pieces"}
        assert not (out / "manifest.json").exists()
        summary = download.pull(read, out, parallel=3, piece_bytes=200_000)
        assert 0 < summary.fetched_bytes < summary.size_bytes * 3 // 4
        assert not (out / ".duquant-partial").exists()
        assert client.pull(job.id, out).fetched_bytes == 0, "a file differs"


def test_a_damaged_piece_costs_its_file_only(service: Any, tmp_path: Path) -> None:
    job = service.finished_job(layers=1)
    out = tmp_path / "out"
    with service.client() as client:
        files = {file.name: file for file in client.artifact(job.id).files}
        file = files["model-layer-0000.safetensors"]
        (out / ".duquant-partial").mkdir(parents=True)
        part = out / ".duquant-partial" / part_name(file)
        part.write_bytes(b"x" * file.size_bytes)
        part.with_suffix(".pieces").write_text(json.dumps({"piece_bytes": 400_000, "done": [0, 1]}))
        summary = download.pull(lambda: client.artifact(job.id), out, parallel=2, piece_bytes=400_000)
        assert summary.fetched_bytes == summary.size_bytes + file.size_bytes - 2 * 400_000
        assert client.pull(job.id, out).fetched_bytes == 0


def test_a_damaged_part_is_fetched_anew(service: Any, tmp_path: Path) -> None:
    job = service.finished_job(layers=1)
    out = tmp_path / "out"
    with service.client() as client:
        file = client.artifact(job.id).files[0]
        (out / ".duquant-partial").mkdir(parents=True)
        (out / ".duquant-partial" / part_name(file)).write_bytes(b"x" * 1000)
        client.pull(job.id, out)
        assert (out / file.name).stat().st_size == file.size_bytes


def test_an_object_that_was_changed_is_never_accepted(service: Any, tmp_path: Path) -> None:
    job = service.finished_job(layers=1)
    row = service.jobs.layers(job.id)[1]
    service.storage.put_bytes(row.key, b"y" * row.size_bytes)
    with service.client() as client, pytest.raises(DownloadError, match="model-layer-0000"):
        client.pull(job.id, tmp_path / "out")
    assert not (tmp_path / "out" / "model-layer-0000.safetensors").exists()
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_expired_links_are_renewed(service: Any, tmp_path: Path) -> None:
    job = service.finished_job(layers=1)
    with service.client() as client:
        fresh = client.artifact
        stale = fresh(job.id)
        broken = [httpx.URL(file.url).copy_set_param("X-Amz-Signature", "0" * 64) for file in stale.files]
        calls = []

        def artifact(job_id: str) -> Any:
            calls.append(job_id)
            if len(calls) > 1:
                return fresh(job_id)
            files = tuple(
                type(file)(name=file.name, sha256=file.sha256, size_bytes=file.size_bytes, url=str(url))
                for file, url in zip(stale.files, broken, strict=True)
            )
            return type(stale)(**{**stale.__dict__, "files": files})

        client.artifact = artifact  # type: ignore[method-assign]
        client.pull(job.id, tmp_path / "out")
    assert len(calls) > 1


def measure_anew(service: Any, job: Any, words: bytes) -> None:
    """Give a job's artifact another model card, as an evaluation of it does."""
    answer = service.http.post("/v1/evaluations", json={"artifact": job.id, "force": True})
    assert answer.status_code == 201, answer.text
    claim = service.claim()
    artifact = service.app.state.context.artifacts.get(job.id, "default")
    manifest = json.loads(service.storage.get_bytes(artifact.manifest_key))
    keys = ArtifactKeys("default", job.id)
    card, key = (keys.card(name, job_id=claim.job.id, fence=1, attempt=1) for name in ("README.md", "manifest.json"))
    info = service.storage.put_bytes(card, words)
    entry = {"name": "README.md", "key": card, "sha256": info.sha256, "size_bytes": info.size_bytes}
    files = [*(file for file in manifest["files"] if file["name"] != "README.md"), entry]
    service.storage.put_bytes(key, json.dumps({**manifest, "files": files}).encode())
    card_of = CardRevision(
        artifact_id=artifact.id,
        replaces=artifact.manifest_key,
        manifest_key=key,
        size_bytes=sum(file["size_bytes"] for file in files),
    )
    result = {"artifact_job_id": job.id, "metrics": {"perplexity": 9.0}, "seconds": 1.0}
    service.jobs.complete(claim, result, card=card_of)


def test_numbers_measured_since_come_with_the_next_pull_and_nothing_else(service: Any, tmp_path: Path) -> None:
    job = service.finished_job(layers=1)
    out = tmp_path / "out"
    with service.client() as client:
        client.pull(job.id, out)
        measure_anew(service, job, b"perplexity 9")
        again = client.pull(job.id, out)
        assert (out / "README.md").read_bytes() == b"perplexity 9"
        assert again.fetched_bytes == len(b"perplexity 9") + (out / "manifest.json").stat().st_size
        assert client.pull(job.id, out).fetched_bytes == 0
        assert client.artifact(job.id).size_bytes == again.size_bytes


def test_a_pull_goes_on_with_the_card_of_a_measurement_that_ended_meanwhile(service: Any, tmp_path: Path) -> None:
    job = service.finished_job(layers=1)
    measure_anew(service, job, b"old card")
    out = tmp_path / "out"
    listed = []
    with service.client() as client:

        def read() -> Any:
            artifact = client.artifact(job.id)
            listed.append(artifact)
            if len(listed) > 1:
                return artifact
            measure_anew(service, job, b"new card")
            gone = tuple(replace(file, url=re.sub("Signature=.", "Signature=0", file.url)) for file in artifact.files)
            return replace(artifact, files=gone)

        download.pull(read, out, parallel=2)
    assert (out / "README.md").read_bytes() == b"new card"
    assert not (out / ".duquant-partial").exists()
    manifest = json.loads((out / "manifest.json").read_bytes())
    hashes = {file["name"]: file["sha256"] for file in manifest["files"]}
    assert hashes["README.md"] == hashlib.sha256(b"new card").hexdigest()


def test_a_file_name_that_leads_out_is_refused_before_anything_is_written(service: Any, tmp_path: Path) -> None:
    service.enqueue()
    claim = service.claim()
    service.do_layers(claim, 1)
    row = service.jobs.layers(claim.job.id)[0]
    evil = {"name": "../evil", "sha256": row.sha256, "size_bytes": row.size_bytes, "key": row.key}
    job = service.finish(claim, extra_files=(evil,))
    with service.client() as client, pytest.raises(BadInputError, match="evil"):
        client.pull(job.id, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "evil").exists()


def test_waiting_times_out_and_says_that_the_job_goes_on(service: Any) -> None:
    job = service.submit()
    with service.client() as client, pytest.raises(WaitTimeoutError, match="goes on"):
        client.wait(job["id"], timeout_s=1.0)


def test_waiting_works_without_the_event_stream(service: Any) -> None:
    job = service.submit()

    class NoStreams(httpx.HTTPTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            if request.url.path.endswith("/events"):
                return httpx.Response(502, text="a proxy that knows no streams")
            return super().handle_request(request)

    def work() -> None:
        time.sleep(1.0)
        service.jobs.fail(service.claim(), "error", "on purpose")

    worker = in_background(work)
    with Client(service.url, service.token, transport=NoStreams()) as client:
        assert client.wait(job["id"], timeout_s=30).detail == "on purpose"
    worker.join()


def test_errors_carry_the_problem(service: Any) -> None:
    with service.client() as client, pytest.raises(ApiError) as caught:
        client.submit("demo:smollm2-135m", {"weight": {"bits": 3}})
    assert caught.value.errors[0]["pointer"] == "/recipe/weight/bits"
    assert caught.value.exit_code == 2
    with Client("http://127.0.0.1:9", service.token) as client, pytest.raises(UnavailableError, match="duquant up"):
        client.get("job_1")


def test_every_job_command_gives_one_line_of_json(service: Any, cli: Any, tmp_path: Path) -> None:
    job = data(cli("job", "submit", "demo:smollm2-135m", "--recipe", "rtn", "--samples", "3", "--json"))
    assert job["recipe"]["calibration"]["samples"] == 3
    assert data(cli("job", "submit", "demo:smollm2-135m", "--recipe", "rtn", "--samples", "3", "--json"))["reused"]
    assert data(cli("job", "get", job["id"], "--json"))["state"] == "queued"
    assert [item["id"] for item in data(cli("job", "list", "--json"))["items"]] == [job["id"]]
    claim = service.claim()
    service.do_layers(claim, 1)
    service.finish(claim)
    assert data(cli("job", "wait", job["id"], "--json"))["state"] == "succeeded"
    pulled = data(cli("artifact", "pull", job["id"], "--out", str(tmp_path / "out"), "--json"))
    assert (pulled["files"], pulled["out"]) == (4, str(tmp_path / "out"))
    other = data(cli("job", "submit", "demo:smollm2-135m", "--recipe", "duquant", "--json"))
    assert data(cli("job", "cancel", other["id"], "--json"))["state"] == "cancelled"
    assert data(cli("job", "wait", other["id"], "--json"), status=1)["state"] == "cancelled"


def test_people_get_text(service: Any, cli: Any) -> None:
    job = service.submit()
    status, out, _ = cli("job", "get", job["id"])
    assert status == 0
    assert job["id"] in out
    assert "queued" in out
    assert job["id"] in cli("job", "list")[1].replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("job", "get", "job_absent"), 4, "no job"),
        (("job", "get", "../x"), 2, "no job id"),
        (("job", "get", "job_absent", "--key", "dq_live_wrong"), 3, "not valid"),
        (("job", "get", "job_absent", "--key", "\u00e9"), 2, "API key"),
        (("job", "get", "job_absent", "--url", "http://127.0.0.1:9"), 5, "duquant up"),
        (("job", "get", "job_absent", "--url", "ftp://x"), 2, "no service URL"),
        (("job", "submit", "smollm2"), 2, "demo:NAME"),
        (("job", "submit", "demo:absent"), 2, "/model/name"),
        (("job", "submit", "local:../x"), 2, "/model/name"),
        (("job", "submit", "demo:smollm2-135m", "--recipe", "absent"), 2, "presets are"),
        (("job", "submit", "demo:smollm2-135m", "--recipe", "absent.json"), 2, "absent.json"),
        (("job", "submit", "demo:smollm2-135m", "--samples", "0"), 2, "--samples: calibration.samples is 0"),
        (("job", "submit", "demo:smollm2-135m", "--calibration", "/etc/passwd"), 2, "--calibration: text file"),
        (("job", "list", "--state", "lost"), 2, "--state: "),
        (("job", "list", "--limit", "0"), 2, "limit"),
        (("job", "nothing"), 2, "nothing"),
        (("job", "wait", "job_absent"), 4, "no job"),
        (("artifact", "pull", "job_absent"), 4, "no job"),
    ],
)
def test_bad_input_is_one_line_and_its_exit_code(cli: Any, arguments: tuple[str, ...], status: int, words: str) -> None:
    found, out, err = cli(*arguments, "--json")
    assert (found, out) == (status, ""), err
    assert len(err.strip().splitlines()) == 1, err
    assert words in err
    assert "Traceback" not in err


def test_a_key_that_is_missing_or_lacks_a_scope_has_its_exit_code(
    service: Any, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DUQUANT_API_KEY")
    status, out, err = cli("job", "list", "--json")
    assert (status, out, len(err.strip().splitlines())) == (2, "", 1)
    assert "no API key" in err
    status, out, err = cli("job", "submit", "demo:smollm2-135m", "--key", service.key("jobs:read"), "--json")
    assert (status, out, len(err.strip().splitlines())) == (3, "", 1)
    assert "jobs:write" in err


def test_a_recipe_over_the_body_limit_is_refused_by_name(service: Any, cli: Any, tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    for size, words in ((999_990, "1000000 bytes"), (2_000_000, str(path))):
        path.write_text(json.dumps({"skip_linears": ["x" * size]})[: size - 4] + '"]}')
        status, out, err = cli("job", "submit", "demo:smollm2-135m", "--recipe", str(path), "--json")
        assert (status, out, len(err.strip().splitlines())) == (2, "", 1), err
        assert words in err
    with service.client() as client, pytest.raises(ApiError) as caught:
        client.submit("demo:smollm2-135m", {"skip_linears": ["x" * 3_000_000]})
    assert caught.value.type == "urn:duquant:problem:body-too-large"
    assert service.http.get("/v1/jobs").json()["items"] == []


@pytest.mark.parametrize("set_service", [{"s3_public_endpoint": "http://127.0.0.1:9"}], indirect=True)
def test_an_object_store_that_does_not_answer_is_named_by_the_pull(
    set_service: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = set_service.finished_job(1)
    options = ["--url", set_service.url, "--key", set_service.token, "--out", str(tmp_path / "out"), "--json"]
    assert run(["artifact", "pull", job.id, *options]) == 5
    said = capsys.readouterr()
    assert (said.out, len(said.err.strip().splitlines())) == ("", 1)
    assert "the object store does not answer for " in said.err


def test_a_failed_job_and_a_time_out_have_their_exit_codes(service: Any, cli: Any) -> None:
    job = service.submit()
    assert cli("job", "wait", job["id"], "--timeout", "0.5")[0] == 124
    service.jobs.fail(service.claim(), "bad_input", "the text is too short")
    status, out, err = cli("job", "wait", job["id"], "--json")
    assert (status, json.loads(out)["reason"]) == (1, "bad_input")
    assert "the text is too short" in err


def test_an_unfinished_artifact_cannot_be_pulled(service: Any, cli: Any) -> None:
    assert cli("artifact", "pull", service.submit()["id"])[0] == 1


def test_a_folder_that_cannot_be_written_is_named(service: Any, cli: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    status, _, err = cli("artifact", "pull", service.finished_job(1).id, "--out", str(tmp_path / "file"))
    assert (status, "cannot write to" in err) == (2, True)


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs a small file system of its own")
def test_a_full_disk_is_named_and_the_pull_goes_on_later(service: Any, tmp_path: Path) -> None:
    job = service.finished_job(3)
    program = (
        "import subprocess, sys;"
        "subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=2m', 'x', sys.argv[1]], check=True);"
        "from client.main import main; main(sys.argv[2:])"
    )
    (tmp_path / "small").mkdir()
    where = str(tmp_path / "small")
    options = ["--url", service.url, "--key", service.token]
    command = [sys.executable, "-c", program, where, "artifact", "pull", job.id, "--out", f"{where}/out", *options]
    done = subprocess.run(["unshare", "-rm", *command], capture_output=True, text=True, timeout=60)
    if "unshare" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 1
    assert "the disk is full" in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr


def test_ctrl_c_on_wait_detaches(service: Any) -> None:
    job = service.submit()
    command = [sys.executable, "-m", "client.main", "job", "wait", job["id"], "--url", service.url]
    with subprocess.Popen([*command, "--key", service.token], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert "queued" in process.stderr.readline()
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 130
    assert f"duquant job wait {job['id']}" in err
    assert "Traceback" not in err
    assert service.jobs.get(job["id"]).state == "queued"
