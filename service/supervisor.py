"""Several API processes on one port: starts them, starts them again when they die, and stops them.

    python -m service                            # with DUQUANT_API_PROCESSES=4: the supervisor, which serves nothing
    python -m service --listener 3 --lifeline 4  # what it starts, four times

All of them accept from the listening socket that they inherit, so the port is taken once, before anything else starts.
Each also inherits one end of a pipe whose other end only the supervisor holds: when the supervisor is gone, however it
went, the pipe closes and they stop. Their counters lie in files of a folder that they share, so that any of them can
show the sums (prometheus_client's multi-process mode).
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import structlog
from prometheus_client.multiprocess import mark_process_dead

from infra.logging import EXIT_FAILED
from infra.metrics import SHARED_FOLDER

log = structlog.get_logger(__name__)

_LOOK_S = 0.2
_SOON_S = 5.0
"""A process that is killed earlier than this after its start is followed by the next after a pause."""
_PAUSE_S = 1.0
_MOST_IN_A_ROW = 5
_STOP_S = 20.0
"""Longer than a process takes to finish its open requests."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass
class _Child:
    process: subprocess.Popen[bytes]
    started: float


class Supervisor:
    """Keeps a number of API processes running until it is told to stop."""

    def __init__(self, listener: socket.socket, count: int) -> None:
        self._listener = listener
        self._count = count
        self._is_stopping = False
        self._deaths_in_a_row = 0
        self._children: list[_Child] = []

    def run(self) -> int:
        """Serve until a signal says to stop; return the exit status: 0 then, else that of a process that cannot work.

        A process that is killed is replaced, but not again and again as soon as it has started. One that ends with a
        status of its own ends the service: it refuses its settings, or could not start, and so would the next.
        """
        with tempfile.TemporaryDirectory(prefix="duquant-metrics-") as folder, _pipe() as lifeline, self._signals():
            try:
                return self._keep(folder, lifeline)
            finally:
                self._stop()

    def _keep(self, folder: str, lifeline: int) -> int:
        while not self._is_stopping:
            while len(self._children) < self._count:
                self._children.append(self._start(folder, lifeline))
            # Short looks, and no wait that a signal ends: its handler may touch no lock.
            time.sleep(_LOOK_S)
            for child in [each for each in self._children if each.process.poll() is not None]:
                self._children.remove(child)
                mark_process_dead(child.process.pid, folder)  # type: ignore[no-untyped-call]  # the library's omission
                if not self._is_stopping and (status := self._judge(child)) is not None:
                    return status
        return 0

    def _start(self, folder: str, lifeline: int) -> _Child:
        descriptors = (self._listener.fileno(), lifeline)
        command = [sys.executable, "-m", "service", "--listener", str(descriptors[0]), "--lifeline", str(lifeline)]
        environment = {**os.environ, SHARED_FOLDER: folder}  # noqa: TID251  the settings are handed on as they are
        process = subprocess.Popen(command, env=environment, pass_fds=descriptors)  # noqa: S603  our own program
        log.info("api_process_started", pid=process.pid)
        return _Child(process, time.monotonic())

    def _judge(self, child: _Child) -> int | None:
        """Note that a process has ended; return the status to end with where another one would not do better."""
        status: int = child.process.returncode
        log.error("api_process_died", pid=child.process.pid, status=status)
        was_soon = time.monotonic() - child.started < _SOON_S
        self._deaths_in_a_row = self._deaths_in_a_row + 1 if was_soon else 0
        if status > 0 or self._deaths_in_a_row >= _MOST_IN_A_ROW:
            log.error("api_processes_do_not_start", status=status)
            return max(status, EXIT_FAILED)
        if was_soon:
            time.sleep(_PAUSE_S)
        return None

    def _stop(self) -> None:
        for child in self._children:
            child.process.terminate()
        deadline = time.monotonic() + _STOP_S
        for child in self._children:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.error("api_process_killed", pid=child.process.pid)
                child.process.kill()
                child.process.wait()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def on_stop(_number: int, _frame: FrameType | None) -> None:
            self._is_stopping = True

        # A signal that is ignored stays ignored, here and in the processes: nohup does so with SIGHUP.
        heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, on_stop) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _pipe() -> Iterator[int]:
    """Give the end of a pipe to hand on; the other end stays open here for as long as this process lives."""
    theirs, ours = os.pipe()
    try:
        yield theirs
    finally:
        os.close(theirs)
        os.close(ours)


def end_with(lifeline: int) -> None:
    """Stop this process, in good order, when the supervisor that holds the other end of the pipe is gone."""

    def watch() -> None:
        os.read(lifeline, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
