"""Where the service is and which key to use: options, then the environment, then what `duquant up` left behind."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from client.errors import BadInputError
from client.sdk import Client

DEFAULT_URL = "http://127.0.0.1:8000"
SECRETS_FILE = "secrets.json"
ADDRESS_FILE = "address.json"

UrlOption = Annotated[
    str | None,
    typer.Option("--url", envvar="DUQUANT_URL", help=f"The service. [default: {DEFAULT_URL}]", show_default=False),
]
KeyOption = Annotated[
    str | None,
    typer.Option(
        "--key",
        envvar="DUQUANT_API_KEY",
        help="The API key; on the machine of `duquant up` it is found by itself.",
        show_default=False,
    ),
]


def default_home() -> Path:
    """Return the folder that the embedded service keeps its data in."""
    return Path(os.environ.get("DUQUANT_HOME") or Path.home() / ".local" / "share" / "duquant")


def connect(url: str | None, key: str | None) -> Client:
    """Return a client.

    Raises:
        BadInputError: no key was given and none is found.
    """
    running = _read(default_home() / ADDRESS_FILE).get("url")
    key_found = None
    # The key of the embedded service goes to that service only, never to another address.
    if url is None or url.rstrip("/") == running:
        key_found = _read(default_home() / SECRETS_FILE).get("api_key")
    key = key or key_found
    if not key:
        raise BadInputError("no API key: give --key or set DUQUANT_API_KEY (`duquant up` prints one)")
    return Client(url or running or DEFAULT_URL, key)


def _read(path: Path) -> dict[str, str]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
