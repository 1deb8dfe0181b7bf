"""The folder of the embedded service: secrets made once, a lock, logs, and the address of what runs."""

import fcntl
import json
import os
import secrets
import string
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from client.errors import BadInputError

SECRETS_FILE = "secrets.json"
ADDRESS_FILE = "address.json"
_ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase


@dataclass(frozen=True)
class Secrets:
    """What the embedded parts share. Made once, kept in a file that only its owner can read."""

    s3_access_key: str
    s3_secret_key: str
    key_pepper: str
    api_key: str


def load_secrets(home: Path) -> Secrets:
    """Read the secrets, or make them.

    Raises:
        BadInputError: the folder or the file cannot be used.
    """
    path = home / SECRETS_FILE
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not path.exists():
            write_private(path, json.dumps(asdict(_new_secrets())))
        path.chmod(0o600)
        return Secrets(**json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise BadInputError(f"cannot use {error.filename or home}: {error.strerror}; choose another --home") from error
    except (ValueError, TypeError) as error:
        raise BadInputError(f"{path} is damaged; move it away and start again, which makes new keys") from error


def storage_environment(home: Path, secrets: Secrets, s3_endpoint: str) -> dict[str, str]:
    """Return the settings of a process that works on the home's database and objects."""
    return {
        "DUQUANT_HOME": str(home),
        "DUQUANT_S3_ENDPOINT": s3_endpoint,
        "DUQUANT_S3_ACCESS_KEY": secrets.s3_access_key,
        "DUQUANT_S3_SECRET_KEY": secrets.s3_secret_key,
    }


@contextmanager
def private_files(home: Path) -> Iterator[None]:
    """Let files that this process and its children make be for their owner only, in a home that others may read, too.

    What an earlier version has left open there is closed.
    """
    for name in ("duquant.db", "duquant.db-wal", "duquant.db-shm", "logs"):
        path = home / name
        if path.exists():
            path.chmod(path.stat().st_mode & 0o700)
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def _new_secrets() -> Secrets:
    return Secrets(
        s3_access_key=secrets.token_hex(10),
        s3_secret_key=secrets.token_urlsafe(30),
        key_pepper=secrets.token_urlsafe(32),
        api_key=_new_api_key(),
    )


def _new_api_key() -> str:
    """Make a key of the form that the service accepts: a prefix, 256 random bits and their CRC-32, in base 62."""
    body = _base62(secrets.randbits(256), 43)
    return f"dq_live_{body}{_base62(zlib.crc32(body.encode()), 6)}"


def _base62(value: int, width: int) -> str:
    digits = ""
    for _ in range(width):
        value, digit = divmod(value, 62)
        digits = _ALPHABET[digit] + digits
    return digits


def write_private(path: Path, text: str) -> None:
    """Write a file that nobody else can read at any moment, whole or not at all."""
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:  # noqa: PTH123  a descriptor
        stream.write(text)
    part.replace(path)


def write_address(home: Path, url: str, s3_endpoint: str) -> None:
    """Let other commands on this machine find the service and its object store."""
    write_private(home / ADDRESS_FILE, json.dumps({"url": url, "s3_endpoint": s3_endpoint, "pid": os.getpid()}))


def read_address(home: Path) -> Mapping[str, Any]:
    """Return what `write_address` has written; nothing when no `duquant up` has."""
    try:
        values = json.loads((home / ADDRESS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def remove_address(home: Path) -> None:
    """Take the address away."""
    (home / ADDRESS_FILE).unlink(missing_ok=True)


@contextmanager
def locked(home: Path) -> Iterator[None]:
    """Hold the folder for this process; the lock goes with the process, however it ends.

    Raises:
        BadInputError: another process holds it.
    """
    with (home / "up.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadInputError(f"another `duquant up` runs in {home}; stop it, or choose another --home") from error
        yield


def is_up(home: Path) -> bool:
    """Tell whether a `duquant up` holds the folder."""
    try:
        with locked(home):
            return False
    except BadInputError:
        return True
    except OSError:  # there is no such folder
        return False
