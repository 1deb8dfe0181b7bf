"""`duquant up`: the whole service on this machine, as child processes.

The object store, the API with the dashboard, and the dispatcher run as processes of their own, configured by their
environment alone, exactly as in production. `up` starts them in order, waits until /readyz says so, restarts what dies,
and stops everything on SIGTERM, SIGINT or SIGHUP. When it is killed, the kernel stops them (see client.child).
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Annotated

import httpx
import typer

from client.connection import default_home
from client.errors import EXIT_OK, BadInputError, UnavailableError
from client.home import Secrets, load_secrets, locked, private_files, remove_address, storage_environment, write_address
from client.output import Format, note, print_text, show, with_output
from client.supervisor import Child, Supervisor, run_once

HOST = "127.0.0.1"
_START_SECONDS = 120.0
_POLL_SECONDS = 0.2
_PASSED_ON = frozenset(
    {
        "DUQUANT_ALLOW_HUB",
        "DUQUANT_LOG_FORMAT",
        "DUQUANT_LOG_LEVEL",
        "DUQUANT_MAX_EVENT_STREAMS",
        "DUQUANT_MAX_TEXT_BYTES",
        "DUQUANT_METRICS_ACCESS",
        "DUQUANT_OTEL_ENDPOINT",
        "DUQUANT_RATE_LIMIT_BURST",
        "DUQUANT_RATE_LIMIT_PER_SECOND",
        "DUQUANT_WEBHOOK_NETWORKS",
    }
)
"""Settings that reach the parts as they are. Whatever else is set is for another service than the one started here."""


class Executor(StrEnum):
    """Where layers are computed."""

    LOCAL = "local"
    RAY = "ray"


@dataclass(frozen=True)
class Setup:
    """What `up` was asked for."""

    home: Path
    port: int
    executor: Executor
    workers: int
    threads: int | None
    model_roots: tuple[Path, ...]
    text_roots: tuple[Path, ...]

    @property
    def url(self) -> str:
        """Where the service will be."""
        return f"http://{HOST}:{self.port}"


@with_output
def up(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the API and the dashboard.")] = 8000,
    home: Annotated[Path | None, typer.Option(help="Folder for data. [default: ~/.local/share/duquant]")] = None,
    executor: Annotated[Executor, typer.Option(help="In one process, or over Ray workers.")] = Executor.LOCAL,
    workers: Annotated[int, typer.Option(min=1, max=256, help="Layers at a time.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of each worker. [default: its share]")] = None,
    model_root: Annotated[
        list[Path] | None, typer.Option(help="Folder that local models may come from; repeat for more.")
    ] = None,
    text_root: Annotated[
        list[Path] | None, typer.Option(help="Folder that calibration texts may come from; repeat for more.")
    ] = None,
    *,
    output: Format,
) -> int:
    """Start everything on this machine; stop it with Ctrl-C."""
    setup = Setup(
        home=(home or default_home()).expanduser().resolve(),
        port=port,
        executor=executor,
        workers=workers,
        threads=threads,
        model_roots=_folders(model_root or [], "--model-root"),
        text_roots=_folders(text_root or [], "--text-root"),
    )
    secrets = load_secrets(setup.home)
    with private_files(setup.home), locked(setup.home):
        _check_port(setup.port)
        with _stop_on_signals() as stop:
            _run(setup, secrets, stop, output)
    return EXIT_OK


def _folders(paths: list[Path], option: str) -> tuple[Path, ...]:
    for path in paths:
        if not path.expanduser().is_dir():
            raise BadInputError(f"{option} {path} is no folder")
    return tuple(path.expanduser().resolve() for path in paths)


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise BadInputError(
                f"port {port} on {HOST} cannot be used ({error.strerror}); choose another --port"
            ) from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    stop = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def environment(setup: Setup, secrets: Secrets, s3_port: int) -> dict[str, str]:
    """Return the environment that the parts read their settings from."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("DUQUANT_") or name in _PASSED_ON
    }
    threads = setup.threads or max(1, (os.cpu_count() or 1) // setup.workers)
    return {
        **inherited,
        **storage_environment(setup.home, secrets, f"http://{HOST}:{s3_port}"),
        "DUQUANT_KEY_PEPPER": secrets.key_pepper,
        "DUQUANT_BOOTSTRAP_KEY": secrets.api_key,
        "DUQUANT_HOST": HOST,
        "DUQUANT_PORT": str(setup.port),
        "DUQUANT_EXECUTOR": setup.executor.value,
        "DUQUANT_SLOTS": str(setup.workers),
        "DUQUANT_THREADS_PER_SLOT": str(threads),
        "DUQUANT_MODEL_ROOTS": json.dumps([str(path) for path in setup.model_roots]),
        "DUQUANT_TEXT_ROOTS": json.dumps([str(path) for path in setup.text_roots]),
        "PYTHONUNBUFFERED": "1",
        # Logs have one event a line: no bars of the libraries that load models.
        "TQDM_DISABLE": "1",
    }


def _run(setup: Setup, secrets: Secrets, stop: threading.Event, output: Format) -> None:
    s3_port = _free_port()
    env = environment(setup, secrets, s3_port)
    logs = setup.home / "logs"
    logs.mkdir(exist_ok=True)

    def child(name: str, module: str, grace_s: float) -> Child:
        return Child(name=name, module=module, env=env, log=logs / f"{name}.log", grace_s=grace_s)

    supervisor = Supervisor(note)
    try:
        note(f"starting in {setup.home}")
        supervisor.start(child("storage", "infra.embedded", 15.0))
        _wait_for_port(s3_port, supervisor, stop)
        run_once([sys.executable, "-m", "infra.migrate"], env, "preparing the database")
        supervisor.start(child("service", "service", 10.0))
        supervisor.start(child("workers", "workers", 30.0))
        _wait_until_ready(setup.url, supervisor, stop)
        if stop.is_set():
            return
        write_address(setup.home, setup.url, env["DUQUANT_S3_ENDPOINT"])
        _announce(setup, secrets, supervisor.pids, output)
        while not stop.wait(_POLL_SECONDS):
            supervisor.tend()
    finally:
        note("stopping")
        remove_address(setup.home)
        supervisor.stop()


def _wait_for_port(port: int, supervisor: Supervisor, stop: threading.Event) -> None:
    def answers() -> str | None:
        with socket.socket() as probe:
            probe.settimeout(1.0)
            return None if probe.connect_ex((HOST, port)) == 0 else "the object store does not answer"

    _wait(answers, supervisor, stop)


def _wait_until_ready(url: str, supervisor: Supervisor, stop: threading.Event) -> None:
    def ready() -> str | None:
        try:
            # Without TLS; to read the certificates for it each time would slow down what is starting.
            checks = httpx.get(f"{url}/readyz", timeout=5.0, verify=False).json()["checks"]  # noqa: S501  as told above
        except (httpx.HTTPError, ValueError, KeyError):
            return "the service does not answer"
        return "; ".join(f"{name}: {check['detail']}" for name, check in checks.items() if not check["ok"]) or None

    _wait(ready, supervisor, stop)


def _wait(problem_of: Callable[[], str | None], supervisor: Supervisor, stop: threading.Event) -> None:
    """Wait until nothing is wrong any more."""
    deadline = time.monotonic() + _START_SECONDS
    while not stop.is_set():
        supervisor.require_running()
        problem = problem_of()
        if problem is None:
            return
        if time.monotonic() > deadline:
            raise UnavailableError(f"not ready after {_START_SECONDS:g} s: {problem}")
        stop.wait(_POLL_SECONDS)


def _announce(setup: Setup, secrets: Secrets, pids: Mapping[str, int], output: Format) -> None:
    def people() -> None:
        print_text(f"service    {setup.url}")
        print_text(f"dashboard  {setup.url}/ (log in with the API key)")
        print_text(f"API key    {secrets.api_key}")
        note("Ctrl-C stops everything.")

    facts = {"url": setup.url, "dashboard": f"{setup.url}/", "api_key": secrets.api_key, "home": str(setup.home)}
    show({**facts, "pid": os.getpid(), "pids": dict(pids)}, output, people)
