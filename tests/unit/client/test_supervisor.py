"""What the supervisor says of a process that has ended: real processes, which write what is asked of them."""

import os
import signal
import time
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
