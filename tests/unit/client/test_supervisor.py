"""What the supervisor says of a process that has ended: real processes, which write what is asked of them."""

import json
import os
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from client.errors import ClientError
from client.supervisor import Child, Supervisor


def child_of(folder: Path, program: str) -> Child:
    (folder / "part.py").write_text(program)
    env = {**os.environ, "PYTHONPATH": str(folder)}
    return Child(name="workers", module="part", env=env, log=folder / "workers.log", grace_s=5)


def until_ended(child: Child) -> None:
    deadline = time.monotonic() + 20
    while child.status is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_kill_is_named_and_no_harmless_line_is_quoted(tmp_path: Path) -> None:
    said: list[str] = []
    supervisor = Supervisor(said.append)
    info = '{"level": "info", "event": "http_request", "path": "/readyz"}'
    (tmp_path / "workers.log").write_text('{"level": "error", "event": "of an earlier start"}\n')
    child = child_of(tmp_path, f"import time; print('{info}', flush=True); time.sleep(60)")
    supervisor.start(child)
    deadline = time.monotonic() + 20
    while "/readyz" not in (tmp_path / "workers.log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert child.process is not None
    os.kill(child.process.pid, signal.SIGKILL)
    until_ended(child)
    supervisor.tend()
    supervisor.stop()
    assert said == ["workers was killed by signal 9 (SIGKILL); starting it again in 1 s"]


def words_of_a_death(folder: Path, lines: list[str], status: int) -> str:
    """Return what is said of a process that writes such lines and ends with a status, or by a signal if negative."""
    said: list[str] = []
    supervisor = Supervisor(said.append)
    text = "".join(f"{line}\n" for line in lines)
    end = f"os.kill(os.getpid(), {-status})" if status < 0 else f"os._exit({status})"
    child = child_of(folder, f"import os; os.write(2, {text!r}.encode()); {end}")
    supervisor.start(child)
    until_ended(child)
    supervisor.tend()
    supervisor.stop()
    (line,) = said
    return line.removesuffix("; starting it again in 1 s")


def error(event: str, seconds_ago: float, **facts: object) -> Callable[[], str]:
    """Return what makes the line, since tests are collected long before they run."""

    def line() -> str:
        at = datetime.now(UTC) - timedelta(seconds=seconds_ago)
        return json.dumps({"level": "error", "event": event, "timestamp": at.isoformat(), **facts})

    return line


@pytest.mark.parametrize(
    ("status", "lines", "said"),
    [
        (-signal.SIGKILL, [error("lost", 0)], "was killed by signal 9 (SIGKILL)"),
        (-signal.SIGABRT, [error("lost", 300)], "was killed by signal 6 (SIGABRT)"),
        (-signal.SIGABRT, [error("lost", 0)], "was killed by signal 6 (SIGABRT) (lost)"),
        (-signal.SIGABRT, [error("lost", 300), "Fatal error"], "was killed by signal 6 (SIGABRT) (Fatal error)"),
        (3, ["RuntimeWarning: of long ago", error("lost", 300, detail="no")], "ended with status 3"),
        (
            3,
            [error("lost", 0, detail="gone"), error("job_failed", 0, detail="bad")],
            "ended with status 3 (lost: gone)",
        ),
        (1, [error("job_failed", 0, detail="bad")], "ended with status 1"),
        (
            1,
            ["error: the store ended with status -9; its last words:", "I1123 store.go:343 add volume 13", ""],
            "ended with status 1 (error: the store ended with status -9)",
        ),
    ],
)
def test_only_what_it_said_right_before_its_end_is_quoted(
    tmp_path: Path, status: int, lines: list[str | Callable[[], str]], said: str
) -> None:
    written = [line if isinstance(line, str) else line() for line in lines]
    assert words_of_a_death(tmp_path, written, status) == f"workers {said}"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            [
                '{"level": "error", "event": "executor_not_started", "error": "no GPU"}',
                '{"level": "info", "event": "x"}',
            ],
            "ended with status 5: executor_not_started: no GPU",
        ),
        (
            ['{"level": "error", "event": "x", "exception": "Traceback\\\\n  File\\\\nOSError: gone"}'],
            "status 5: x: OSError: gone",
        ),
        (
            ["Loading weights: 0%", "error: the disk is full", '{"level": "info", "event": "x"}'],
            "error: the disk is full",
        ),
        (["duquant service: cannot listen on it"], "status 5: duquant service: cannot listen on it"),
        ([], "no last words"),
    ],
)
def test_a_part_that_does_not_start_is_quoted(tmp_path: Path, lines: list[str], words: str) -> None:
    supervisor = Supervisor(lambda _: None)
    text = "".join(f"{line}\n" for line in lines)
    child = child_of(tmp_path, f"import sys; sys.stderr.write('''{text}'''); sys.exit(5)")
    supervisor.start(child)
    until_ended(child)
    with pytest.raises(ClientError) as caught:
        supervisor.require_running()
    assert words in str(caught.value)
    supervisor.stop()
