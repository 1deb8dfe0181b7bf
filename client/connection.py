"""Where the service is and which key to use.

Each is taken from the first that has it: the option, the profile named by --profile, the environment, the profile named
by DUQUANT_PROFILE or the default one, what `duquant up` left behind on this machine.
"""

import functools
import inspect
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.models import OptionInfo

from client.errors import ApiError, BadInputError
from client.home import SECRETS_FILE, read_address
from client.output import Format, JsonFlag, OutputOption, add_options, chosen, show
from client.profiles import Profile, load_profiles
from client.sdk import Client

DEFAULT_URL = "http://127.0.0.1:8000"

UrlOption = Annotated[
    str | None,
    typer.Option("--url", help=f"The service. [env var: DUQUANT_URL] [default: {DEFAULT_URL}]", show_default=False),
]
KeyOption = Annotated[
    str | None,
    typer.Option(
        "--key",
        help="The API key; on the machine of `duquant up` it is found by itself. [env var: DUQUANT_API_KEY]",
        show_default=False,
    ),
]
ProfileOption = Annotated[
    str | None,
    typer.Option("--profile", help="A service by name; see `duquant profile`. [env var: DUQUANT_PROFILE]"),
]


@dataclass(frozen=True)
class Session:
    """What a command that works on a service gets: the connection, and how to print."""

    client: Client
    output: Format

    def show(self, value: object, people: Callable[[], None]) -> None:
        """Print data in the chosen format; `people` prints the table."""
        show(value, self.output, people)


def on_service(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of a service and of printing; it gets a Session as `session`."""
    return _with_session(function, needs_key=True)


def on_open_service(function: Callable[..., Any]) -> Callable[..., Any]:
    """Do what `on_service` does for a command that needs no key: it asks what everybody may."""
    return _with_session(function, needs_key=False)


def _with_session(function: Callable[..., Any], *, needs_key: bool) -> Callable[..., Any]:
    @functools.wraps(function)
    def command(*arguments: Any, **options: Any) -> Any:
        output = chosen(options.pop("output"), as_json=options.pop("as_json"))
        with connect(options.pop("url"), options.pop("key"), options.pop("profile"), needs_key=needs_key) as client:
            try:
                return function(*arguments, **options, session=Session(client, output))
            except ApiError as error:
                error.options = named_options(function, options)
                raise

    kinds = {
        "url": UrlOption,
        "key": KeyOption,
        "profile": ProfileOption,
        "output": OutputOption,
        "as_json": JsonFlag,
    }
    signature = add_options(function, "session", kinds)
    command.__signature__ = signature  # type: ignore[attr-defined]  # what inspect, and so typer, looks at
    command.__annotations__ = {name: each.annotation for name, each in signature.parameters.items()}
    return command


_FIELDS = {
    "after": "depends_on",
    "calibration": "calibration/source",
    "deadline": "deadline_at",
    "evaluate_on": "evaluate/text",
    "evaluate_seq_len": "evaluate/seq_len",
    "evaluate_windows": "evaluate/windows",
    "label": "labels",
    "samples": "calibration/samples",
    "scope": "scopes",
    "until": "expires_at",
}
"""The fields that options with other names fill."""


def named_options(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, str]:
    """Return how the options with a value are written, by the fields of the request that they fill."""
    names = {}
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        kinds = getattr(parameter.annotation, "__metadata__", ())
        option = next((each for each in kinds if isinstance(each, OptionInfo)), None)
        value = given.get(name)
        if option is not None and value is not None and value is not False and value != []:
            written = [each for each in option.param_decls or () if each.startswith("--")]
            field = _FIELDS.get(name, "calibration/seq_len" if name == "seq_len" and "samples" in given else name)
            names[field] = written[0] if written else f"--{name.replace('_', '-')}"
    return names


def default_home() -> Path:
    """Return the folder that the embedded service keeps its data in."""
    return Path(os.environ.get("DUQUANT_HOME") or Path.home() / ".local" / "share" / "duquant")


def connect(
    url: str | None = None, key: str | None = None, profile: str | None = None, *, needs_key: bool = True
) -> Client:
    """Return a client.

    Raises:
        BadInputError: a key is needed, none was given and none is found; or there is no such profile.
    """
    address, key = locate(url, key, profile)
    if needs_key and not key:
        raise BadInputError(
            "no API key: give --key, set DUQUANT_API_KEY, make a profile (`duquant up` prints one), or set "
            "DUQUANT_HOME to the folder of a `duquant up` on this machine"
        )
    return Client(address, key)


def locate(url: str | None = None, key: str | None = None, profile: str | None = None) -> tuple[str, str | None]:
    """Return the address of the service and the key for it, if there is one.

    Raises:
        BadInputError: there is no such profile, or the profiles cannot be read.
    """
    embedded = Profile(
        read_address(default_home()).get("url") or DEFAULT_URL,
        _read(default_home() / SECRETS_FILE).get("api_key"),
    )
    named = load_profiles().get(profile) if profile else None
    from_env = (os.environ.get("DUQUANT_URL"), os.environ.get("DUQUANT_API_KEY"))
    fallback = named or _usual_profile()
    if named is None:
        url, key = url or from_env[0], key or from_env[1]
    address = (url or (fallback or embedded).url).rstrip("/")
    if key is None:
        # A stored key goes to the service it is for, never to another address.
        key = next((each.key for each in (fallback, embedded) if each and each.url.rstrip("/") == address), None)
    return address, key


def _usual_profile() -> Profile | None:
    profiles = load_profiles()
    name = os.environ.get("DUQUANT_PROFILE") or profiles.default
    return None if name is None else profiles.get(name)


def _read(path: Path) -> dict[str, str]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
