"""Following a job by server-sent events."""

import threading
import time
from typing import Any

import httpx
import pytest
from support.receiver import wait_until

from client import sse
from service.limits import OpenStreams

pytestmark = pytest.mark.integration


def read(service: Any, job_id: str, after: str | None = None) -> list[sse.ServerSentEvent]:
    headers = {} if after is None else {"Last-Event-ID": after}
    with service.http.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        return list(sse.parse(answer.iter_lines()))


def test_a_finished_jobs_stream_gives_all_events_and_ends(any_service: Any) -> None:
    job = any_service.finished_job(layers=2)
    events = read(any_service, job.id)
    types = [event.type for event in events]
    assert types[:3] == ["enqueued", "claimed", "planned"]
    assert types[-2:] == ["succeeded", "end"]
    assert types.count("layer_done") == 3
    ids = [int(event.id) for event in events[:-1]]
    assert ids == sorted(set(ids))
    assert all(event.data["job_id"] == job.id for event in events[:-1])


def test_times_in_events_are_written_like_all_others(any_service: Any) -> None:
    job = any_service.submit()
    path = f"/v1/jobs/{job['id']}"
    any_service.http.patch(path, json={"run_at": "2090-01-01T00:00:00Z", "deadline_at": "2091-01-01T00:00:00Z"})
    any_service.http.patch(path, json={"run_at": None, "deadline_at": None, "priority": 5})
    any_service.http.post(f"{path}:cancel")
    changes = [each.data["data"]["changes"] for each in read(any_service, job["id"]) if each.type == "changed"]
    assert changes == [
        {"run_at": "2090-01-01T00:00:00.000Z", "deadline_at": "2091-01-01T00:00:00.000Z"},
        {"run_at": None, "deadline_at": None, "priority": 5},
    ]


def test_a_reader_that_comes_back_gets_only_what_it_missed(any_service: Any) -> None:
    job = any_service.finished_job(layers=1)
    everything = read(any_service, job.id)
    middle = everything[3]
    assert [event.id for event in read(any_service, job.id, middle.id)][:-1] == [e.id for e in everything[4:-1]]


def test_more_events_than_one_read_takes_all_arrive(service: Any) -> None:
    job = service.enqueue()
    claim = service.claim()
    for done in range(1100):
        service.jobs.progress(claim, phase="sweep", done=done, total=1100)
    service.jobs.fail(claim, "error", "enough")
    events = read(service, job.id)
    assert [event.data["data"]["done"] for event in events if event.type == "progress"] == list(range(1100))
    assert events[-1].type == "end"


def test_events_arrive_while_the_job_runs(any_service: Any) -> None:
    job = any_service.enqueue()
    claim = any_service.claim()

    def work() -> None:
        time.sleep(1.0)
        any_service.jobs.progress(claim, phase="sweep", done=1, total=2)
        time.sleep(1.0)
        any_service.jobs.fail(claim, "error", "on purpose")

    worker = threading.Thread(target=work)
    worker.start()
    seen = {event.type: time.monotonic() for event in stamped(any_service, job.id)}
    worker.join()
    assert seen["failed"] - seen["progress"] > 0.4  # not collected and sent at the end


def stamped(service: Any, job_id: str) -> Any:
    with service.http.stream("GET", f"/v1/jobs/{job_id}/events") as answer:
        yield from sse.parse(answer.iter_lines())


def test_a_quiet_stream_gives_signs_of_life(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.stream.KEEP_ALIVE_SECONDS", 0.2)
    job = service.enqueue()
    with service.http.stream("GET", f"/v1/jobs/{job.id}/events") as answer:
        assert any(line == ": keep-alive" for line in answer.iter_lines())


def test_an_id_that_is_no_number_is_refused(service: Any) -> None:
    job = service.enqueue()
    answer = service.http.get(f"/v1/jobs/{job.id}/events", headers={"Last-Event-ID": "x"})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"] == "/Last-Event-ID"


def test_open_streams_hold_no_database_connection(any_service: Any) -> None:
    any_service.app.state.context.streams = OpenStreams(30)
    job = any_service.enqueue()
    pool = any_service.app.state.context.engine.pool
    with httpx.Client(base_url=any_service.url, headers=any_service.http.headers, timeout=20) as http:
        streams = [http.stream("GET", f"/v1/jobs/{job.id}/events") for _ in range(30)]
        answers = [stream.__enter__() for stream in streams]
        try:
            readers = [answer.iter_lines() for answer in answers]
            for reader in readers:
                assert next(reader) == "retry: 3000"
            # More streams than the pool has connections, and requests still get one.
            assert any_service.http.get(f"/v1/jobs/{job.id}").status_code == 200
            counts = []
            for _ in range(20):
                counts.append(pool.checkedout())
                time.sleep(0.05)
            assert min(counts) == 0
        finally:
            for stream in streams:
                stream.__exit__(None, None, None)


def test_a_reader_that_goes_away_leaves_nothing_running(service: Any) -> None:
    job = service.enqueue()
    with service.http.stream("GET", f"/v1/jobs/{job.id}/events") as answer:
        next(answer.iter_lines())
    time.sleep(2.5)
    assert event_reads_within(service, 1.5) == 0


def test_a_key_has_so_many_streams_open_and_no_more(service: Any) -> None:
    service.app.state.context.streams = OpenStreams(2)
    job = service.enqueue()
    path = f"/v1/jobs/{job.id}/events"
    with service.http.stream("GET", path) as first:
        assert first.status_code == 200
        with service.http.stream("GET", path) as second:
            assert second.status_code == 200
            refused = service.http.get(path)
            assert (refused.status_code, refused.json()["type"]) == (429, "urn:duquant:problem:too-many-streams")
            assert int(refused.headers["Retry-After"]) > 0
            other = {"Authorization": f"Bearer {service.key('jobs:read')}"}
            with service.http.stream("GET", path, headers=other) as third:
                assert third.status_code == 200
            assert service.http.get(f"/v1/jobs/{job.id}").status_code == 200
    # What a reader that goes away held is free soon, what was refused or not found never held anything.
    wait_until(lambda: service.app.state.context.streams.has_room(first_key(service)), 10)
    for _ in range(3):
        assert service.http.get("/v1/jobs/job_0/events").status_code == 404
    service.jobs.cancel(job.id, tenant_id="default", actor="test")
    for _ in range(3):
        assert service.http.get(path).status_code == 200


def first_key(service: Any) -> str:
    return service.keys.authenticate(service.token).id


def event_reads_within(service: Any, seconds: float) -> int:
    from sqlalchemy import event

    count = 0

    def seen(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        nonlocal count
        count += "job_events" in statement

    engine = service.app.state.context.engine
    event.listen(engine, "before_cursor_execute", seen)
    time.sleep(seconds)
    event.remove(engine, "before_cursor_execute", seen)
    return count
