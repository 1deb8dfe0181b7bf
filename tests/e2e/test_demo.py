"""`duquant demo`, with small sizes: the README's first command, run as a newcomer would."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1200)]

_SMALL = ["--samples", "2", "--seq-len", "64", "--windows", "1"]


def _command(home: Path) -> list[str]:
    return [sys.executable, "-m", "client.main", "demo", "--home", str(home), *_SMALL, "--json"]


def _processes_of(home: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("DUQUANT_HOME") == str(home) or str(home) in process.cmdline():
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_demo_proves_itself_and_a_second_run_reuses_the_artifacts(tmp_path: Path):
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    reports = []
    for _ in range(2):
        done = subprocess.run(_command(tmp_path), capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        reports.append((json.loads(done.stdout), done.stderr))
        assert _processes_of(tmp_path) == []
    (first, said), (second, said_again) = reports
    plain, rtn, duquant = first["rows"]
    assert plain["perplexity"] < duquant["perplexity"] < rtn["perplexity"]
    assert duquant["weight_bytes"] < plain["weight_bytes"] / 2
    assert first["text"].strip()
    assert "API key" in said
    assert "reusing" not in said
    assert said_again.count("reusing its artifact") == 2
    assert [row["perplexity"] for row in second["rows"]] == [row["perplexity"] for row in first["rows"]]


def test_demo_that_is_interrupted_says_so_and_leaves_nothing_running(tmp_path: Path):
    with (tmp_path / "said").open("w+") as said:
        process = subprocess.Popen(_command(tmp_path / "home"), stdout=said, stderr=said, start_new_session=True)
        try:
            deadline = time.monotonic() + 120
            while "submitted" not in (tmp_path / "said").read_text():
                assert process.poll() is None, (tmp_path / "said").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            assert process.wait(100) == 130
        finally:
            process.kill()
            process.wait()
    assert "interrupted; nothing is left running" in (tmp_path / "said").read_text()
    assert _processes_of(tmp_path / "home") == []


def test_demo_says_in_one_line_why_the_service_does_not_start(tmp_path: Path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "secrets.json").write_text("{")
    done = subprocess.run(_command(home), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("duquant: error: the service did not start")
    assert "secrets.json" in last
