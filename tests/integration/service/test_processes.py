"""Several API processes on one port: they share the work and the counters, and stop and come back as they should."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.receiver import wait_until
from support.settings import service_environment

from infra.keys import new_token
from service.supervisor import _LOOK_S, Supervisor

pytestmark = pytest.mark.integration

COUNT = 2
KEY = new_token()
HEADERS = {"Authorization": f"Bearer {KEY}"}


@contextmanager
def running(home: Path, *under: str) -> Iterator[tuple[str, psutil.Process]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = service_environment(home, PORT=port, BOOTSTRAP_KEY=KEY, API_PROCESSES=COUNT)
    with (home / "log").open("w") as log:
        process = subprocess.Popen([*under, sys.executable, "-m", "service"], env=env, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    family = psutil.Process(process.pid)
    try:
        wait_until(lambda: len(family.children()) == COUNT, seconds=30)
        for child in family.children():
            wait_until(partial(answers, url, others_than=child), seconds=60)
        yield url, family
    finally:
        process.kill()
        process.wait()


def answers(url: str, *, others_than: psutil.Process) -> bool:
    """Whether a request is answered while one of the processes stands still: then another one has answered."""
    others_than.suspend()
    try:
        return httpx.get(f"{url}/v1/recipes", headers=HEADERS, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
    finally:
        others_than.resume()


def counted(url: str) -> float:
    """How many times the models were asked for, by what /metrics says."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    samples = (sample for family in families for sample in family.samples)
    return sum(
        sample.value
        for sample in samples
        if sample.name == "duquant_http_requests_total" and sample.labels["route"] == "/v1/models"
    )


def ask(url: str, times: int) -> None:
    for _ in range(times):  # each with a connection of its own
        assert httpx.get(f"{url}/v1/models", headers=HEADERS).status_code == 200


def fresh_children(family: psutil.Process, known: Sequence[psutil.Process]) -> list[psutil.Process]:
    return [child for child in family.children() if child not in known]


def test_they_serve_one_port_share_counters_come_back_and_stop_together(tmp_path: Path) -> None:
    with running(tmp_path) as (url, family):
        ask(url, 10)
        wait_until(lambda: counted(url) == 10)
        killed, kept = family.children()
        killed.kill()
        wait_until(lambda: fresh_children(family, (killed, kept)))
        (fresh,) = fresh_children(family, (killed, kept))
        ask(url, 10)
        # What the dead one counted is not lost, nor counted twice.
        wait_until(lambda: counted(url) == 20)
        wait_until(partial(answers, url, others_than=kept), seconds=60)
        family.send_signal(signal.SIGTERM)
        assert family.wait(20) == 0
        assert not kept.is_running()
        assert not fresh.is_running()
    log = (tmp_path / "log").read_text()
    assert log.count("api_process_started") == COUNT + 1
    assert log.count("api_process_died") == 1
    assert "canary" not in log


def test_a_hangup_that_is_ignored_stops_nothing_and_none_is_left_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    with running(tmp_path, "nohup") as (url, family):
        children = family.children()
        for process in (family, *children):
            process.send_signal(signal.SIGHUP)
        ask(url, 1)
        time.sleep(2 * _LOOK_S)  # by then a signal that was heard has ended it
        assert family.is_running()
        assert family.children() == children
        family.kill()
        _, alive = psutil.wait_procs(children, timeout=20)
        assert alive == []
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/healthz")


def test_processes_that_cannot_start_end_the_service_with_their_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in service_environment(tmp_path, MAX_BODY_BYTES="none").items():
        monkeypatch.setenv(name, value)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    others = psutil.Process().children()  # servers that other tests share
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert Supervisor(listener, 1).run() == 2
    assert {number: signal.getsignal(number) for number in before} == before
    assert psutil.Process().children() == others
