"""What the parts of a recipe have in common: how fields are checked, and which are new."""

from collections.abc import Mapping
from typing import Any

from duquant.errors import ConfigError

STRICT_FIELDS: dict[str, Any] = {"extra": "forbid", "use_attribute_docstrings": True}
"""For pydantic, which reads these dataclasses where they are part of a request."""


LATER: Mapping[str, bool] = {"later": True}
"""Marks a field that older recipes did not have: while it has its default, it does not count in a recipe's digest, so
that artifacts made before are still found."""


def check_range(owner: str, name: str, value: int | float, low: int | float, high: int | float) -> None:
    """Refuse a value outside [low, high].

    Raises:
        ConfigError: it is outside, or NaN; the message names field `owner.name`.
    """
    if not low <= value <= high:  # NaN is not, either
        raise ConfigError(f"{owner}.{name} is {value}; it must be between {low} and {high}", field=f"{owner}.{name}")


def check_choice(owner: str, name: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse a value that is not one of the choices.

    Raises:
        ConfigError: it is not; the message names field `owner.name`.
    """
    if value not in choices:
        allowed = ", ".join(str(choice) for choice in choices)
        raise ConfigError(f"{owner}.{name} is {value!r}; it must be one of: {allowed}", field=f"{owner}.{name}")
