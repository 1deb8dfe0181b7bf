"""docker-compose.yml as data: read, with its variables filled in as Compose would."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.deploy.make_env import make_env

REPOSITORY = Path(__file__).parents[3]
_VARIABLE = re.compile(r"\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::(?P<kind>[?-])(?P<rest>[^}]*))?\}")


class MissingVariableError(Exception):
    """A ${NAME:?...} has no value; Compose refuses to start then."""


def interpolate(value: Any, variables: Mapping[str, str]) -> Any:
    """Fill in ${NAME}, ${NAME:-default} and ${NAME:?message} everywhere in a YAML value."""
    if isinstance(value, dict):
        return {key: interpolate(item, variables) for key, item in value.items()}
    if isinstance(value, list):
        return [interpolate(item, variables) for item in value]
    if not isinstance(value, str):
        return value

    def fill(match: re.Match[str]) -> str:
        given = variables.get(match["name"], "")
        if given:
            return given
        if match["kind"] == "-":
            return str(match["rest"])
        raise MissingVariableError(match["name"])

    return _VARIABLE.sub(fill, value)


@dataclass(frozen=True)
class ComposeFile:
    """The file's parsed YAML, merge keys resolved."""

    path: Path
    raw: Mapping[str, Any]

    def services(self, variables: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Return the services with their variables filled in."""
        services: dict[str, dict[str, Any]] = interpolate(self.raw["services"], variables)
        return services


@pytest.fixture(scope="session")
def compose_file() -> ComposeFile:
    path = REPOSITORY / "docker-compose.yml"
    return ComposeFile(path, yaml.safe_load(path.read_text(encoding="utf-8")))


@pytest.fixture
def secrets() -> dict[str, str]:
    """A fresh .env."""
    return make_env()
