"""Starts processes, watches them, starts them again when they die, and stops them all."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from client.errors import ClientError

_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
_STEADY_S = 60.0
"""A process that ran for this long and then died starts with the shortest pause again."""
_TAIL_BYTES = 16_384
_SERIOUS = frozenset({"warning", "error", "critical"})
_SERIOUS_WORDS = re.compile(r"error|warning|critical|exception|fatal", re.I)
_OF_JOBS = frozenset({"job_failed"})
"""Events that tell of a job, and never why a process has ended."""
_OUTSIDE = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT})
"""Signals that come from outside: whatever the process logged before says nothing about them."""
_FRESH_S = 15.0
"""What was logged longer than this before the end is of something else; a part may take so long to stop."""


@dataclass
class Child:
    """One process, and how often it had to be started."""

    name: str
    module: str
    env: Mapping[str, str]
    log: Path
    grace_s: float
    """How long it may take to stop in good order."""
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    restart_at: float | None = None
    pause_s: float = _FIRST_PAUSE_S
    restarts: int = field(default=0)
    _log_start: int = field(default=0, init=False)
    """Where the log of this start begins."""

    def start(self) -> None:
        """Start the process, its output appended to the log."""
        command = [sys.executable, "-m", "client.child", str(os.getpid()), sys.executable, "-m", self.module]
        with self.log.open("ab") as stream:
            self._log_start = stream.tell()
            # Its own session: a Ctrl-C in the terminal reaches us only, and we stop the parts in the right order.
            self.process = subprocess.Popen(
                command,
                env=dict(self.env),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        self.started_at = time.monotonic()
        self.restart_at = None

    @property
    def status(self) -> int | None:
        """Its exit status; None while it runs."""
        return None if self.process is None else self.process.poll()

    @property
    def ending(self) -> str:
        """How it ended, in words.

        A negative status is the signal that killed it, as subprocess has it.
        """
        if self.status is None or self.status >= 0:
            return f"ended with status {self.status}"
        with contextlib.suppress(ValueError):
            return f"was killed by signal {-self.status} ({signal.Signals(-self.status).name})"
        return f"was killed by signal {-self.status}"

    def last_words(self) -> str:
        """Return the last warning or error that it has logged right before its end; empty without any.

        What ends by itself, and was not killed, may say why before it has a log: then any plain line will do.
        """
        if self.status is not None and -self.status in _OUTSIDE:
            return ""
        with contextlib.suppress(OSError), self.log.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(self._log_start, size - _TAIL_BYTES))
            written_at = os.fstat(stream.fileno()).st_mtime
            lines = _fresh(stream.read().decode("utf-8", "replace").splitlines(), written_at, time.time())
            plain = [line.strip() for line in lines if self.status and self.status > 0 and _event(line) is None]
            words = [words for line in lines if (words := _serious(line))] or [line for line in plain if line]
            return _announced(words[-1])[:400] if words else ""
        return ""


def _event(line: str) -> Mapping[str, Any] | None:
    """Read a line of a log; none when it is plain text."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


def _fresh(lines: Sequence[str], written_at: float, now: float) -> list[str]:
    """Return the lines that were logged just now; without a time a line is as old as the next, the last as the file."""
    kept, at = [], written_at
    for line in reversed(lines):
        with contextlib.suppress(KeyError, TypeError, ValueError):
            at = datetime.fromisoformat((_event(line) or {})["timestamp"]).timestamp()
        if now - at <= _FRESH_S:
            kept.append(line)
    return kept[::-1]


def _announced(words: str) -> str:
    """Leave out what only announces the lines after it, which are not shown.

    >>> _announced("error: the store ended with status -9; its last words:")
    'error: the store ended with status -9'
    """
    return words.rpartition(";")[0] or words.rstrip(":") if words.endswith(":") else words


def _serious(line: str) -> str:
    """Return what a line of a log says if it is a warning or an error, else nothing.

    >>> _serious('{"level": "error", "event": "not_started", "error": "no GPU"}')
    'not_started: no GPU'
    >>> _serious('{"level": "info", "event": "http_request"}')
    ''
    """
    event = _event(line)
    if event is None:
        return line.strip() if _SERIOUS_WORDS.search(line) else ""
    if event.get("level") not in _SERIOUS or event.get("event") in _OF_JOBS:
        return ""
    # Of a traceback the last line says what happened.
    cause = str(event.get("exception") or event.get("error") or event.get("detail") or "").strip()
    return ": ".join(part for part in (str(event.get("event", "")), cause.rpartition("\n")[2]) if part)


class Supervisor:
    """Keeps a list of processes running, in the order in which they need each other."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._children: list[Child] = []

    @property
    def pids(self) -> dict[str, int]:
        """The processes that run."""
        return {each.name: each.process.pid for each in self._children if each.process and each.status is None}

    def start(self, child: Child) -> None:
        """Start a process and watch it from now on."""
        child.start()
        self._children.append(child)

    def require_running(self) -> None:
        """Raise ClientError if any process has ended; before everything is up that is an error and no accident."""
        for child in self._children:
            if child.status is not None:
                words = child.last_words() or "no last words"
                raise ClientError(f"{child.name} {child.ending}: {words} (log: {child.log})")

    def tend(self) -> None:
        """Start again what has died, each after a pause that grows while it keeps dying."""
        now = time.monotonic()
        for child in self._children:
            if child.status is None:
                continue
            if child.restart_at is None:
                child.pause_s = _FIRST_PAUSE_S if now - child.started_at > _STEADY_S else child.pause_s
                child.restart_at = now + child.pause_s
                words = child.last_words()
                self._say(
                    f"{child.name} {child.ending}{f' ({words})' if words else ''}; "
                    f"starting it again in {child.pause_s:g} s"
                )
                child.pause_s = min(child.pause_s * 2, _LONGEST_PAUSE_S)
            elif now >= child.restart_at:
                child.restarts += 1
                child.start()
                self._say(f"{child.name} is started again, pid {child.process.pid if child.process else '?'}")

    def stop(self) -> None:
        """Stop all processes, last started first, and wait until each is gone."""
        for child in reversed(self._children):
            _stop(child, self._say)


def _stop(child: Child, say: Callable[[str], None]) -> None:
    process = child.process
    if process is None:
        return
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(child.grace_s)
        except subprocess.TimeoutExpired:
            say(f"{child.name} did not stop within {child.grace_s:g} s; killing it")
    # It leads a session of its own; whatever it has left in there goes with it.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_once(command: Sequence[str], env: Mapping[str, str], what: str) -> None:
    """Run a program to its end.

    Raises:
        ClientError: it failed; the message is its last line.
    """
    done = subprocess.run(command, env=dict(env), capture_output=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise ClientError(f"{what} failed: {lines[-1] if lines else f'status {done.returncode}'}")
