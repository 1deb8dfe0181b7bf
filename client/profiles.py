"""`duquant profile`: services by name, in a file that only its owner can read."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from client.errors import BadInputError
from client.home import write_private
from client.output import Format, note, print_table, show, with_output

app = typer.Typer(help="Services by name.", no_args_is_help=True)

_SHOWN = len("dq_live_") + 4


@dataclass(frozen=True)
class Profile:
    """One service, and the key for it."""

    url: str
    key: str | None = None


@dataclass(frozen=True)
class Profiles:
    """What the file holds."""

    default: str | None
    by_name: Mapping[str, Profile]

    def get(self, name: str) -> Profile:
        """Return the profile of that name.

        Raises:
            BadInputError: there is none.
        """
        if name not in self.by_name:
            known = ", ".join(self.by_name) or "none; `duquant profile set` makes one"
            raise BadInputError(f"there is no profile {name!r} in {config_file()}; there is: {known}")
        return self.by_name[name]


def config_file() -> Path:
    """Return where profiles are kept."""
    if given := os.environ.get("DUQUANT_CONFIG"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "duquant" / "config.yaml"


def load_profiles() -> Profiles:
    """Read the profiles; without a file there are none.

    Raises:
        BadInputError: the file cannot be read or understood, or others can read the keys in it.
    """
    path = config_file()
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        mode = path.stat().st_mode & 0o777
    except FileNotFoundError:
        return Profiles(None, {})
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise BadInputError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    profiles = _parse(values, path)
    if mode & 0o077 and any(each.key for each in profiles.by_name.values()):
        raise BadInputError(f"{path} holds keys and others may read it; run: chmod 600 {path}")
    return profiles


def _parse(values: Any, path: Path) -> Profiles:
    try:
        by_name = {str(name): Profile(**facts) for name, facts in (values.get("profiles") or {}).items()}
        default = values.get("default")
        if not all(isinstance(text, str) for each in by_name.values() for text in (each.url, each.key or "")):
            raise TypeError("a url and a key are text")
    except (AttributeError, TypeError) as error:
        example = "default: NAME, profiles: {NAME: {url: ..., key: ...}}"
        raise BadInputError(f"{path} is no profile file ({error}); it looks like {example}") from error
    return Profiles(None if default is None else str(default), by_name)


def _save(profiles: Profiles) -> None:
    path = config_file()
    entries = {
        name: {"url": each.url, **({} if each.key is None else {"key": each.key})}
        for name, each in profiles.by_name.items()
    }
    text = yaml.safe_dump({"default": profiles.default, "profiles": entries}, sort_keys=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_private(path, text)
    except OSError as error:
        raise BadInputError(f"cannot write {path}: {error.strerror}") from error


@app.command("list")
@with_output
def list_profiles(output: Format) -> None:
    """List the profiles. Keys are shown by their beginnings."""
    profiles = load_profiles()
    items = [
        {
            "name": name,
            "url": each.url,
            "key": None if each.key is None else f"{each.key[:_SHOWN]}...",
            "is_default": name == profiles.default,
        }
        for name, each in profiles.by_name.items()
    ]
    rows = [(f"{each['name']}{' (default)' if each['is_default'] else ''}", each["url"], each["key"]) for each in items]
    show({"items": items}, output, lambda: print_table(("profile", "url", "key"), rows))


@app.command("set")
def set_profile(
    name: Annotated[str, typer.Argument(help="Its name.")],
    url: Annotated[str, typer.Option("--url", help="The service.")],
    key: Annotated[
        str | None, typer.Option("--key", help="The API key; - reads it from the first line of stdin.")
    ] = None,
) -> None:
    """Make a profile, or change one. The first becomes the default."""
    if not url.startswith(("http://", "https://")):
        raise BadInputError(f"{url!r} is no service URL; it looks like http://127.0.0.1:8000")
    if key == "-":
        # Not in the list of processes, nor in the shell's history.
        key = sys.stdin.readline().strip()
        if not key:
            raise BadInputError("--key - found no key: the first line of standard input is empty")
    profiles = load_profiles()
    entry = Profile(url.rstrip("/"), key or None)
    _save(Profiles(profiles.default or name, {**profiles.by_name, name: entry}))
    note(f"profile {name} is saved in {config_file()}")


@app.command()
def use(name: Annotated[str, typer.Argument(help="Its name.")]) -> None:
    """Make a profile the default."""
    profiles = load_profiles()
    profiles.get(name)
    _save(Profiles(name, profiles.by_name))


@app.command()
def remove(name: Annotated[str, typer.Argument(help="Its name.")]) -> None:
    """Forget a profile and its key."""
    profiles = load_profiles()
    profiles.get(name)
    rest = {other: each for other, each in profiles.by_name.items() if other != name}
    _save(Profiles(None if profiles.default == name else profiles.default, rest))
