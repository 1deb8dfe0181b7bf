"""Recipes and other dataclasses as plain JSON types, and back, strictly."""

import functools
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from duquant.config.checks import check_choice
from duquant.errors import ConfigError

_T = TypeVar("_T")


def from_plain(cls: type[_T], values: object, *, what: str) -> _T:
    """Build a dataclass from JSON types; `what` is its name in messages.

    Raises:
        ConfigError: a field is unknown, has the wrong type or is out of range; the message names it.
    """
    built = _build(cls, values, "", what)
    assert isinstance(built, cls)
    return built


def _build(cls: type, values: object, path: str, what: str) -> object:
    """Build dataclass `cls` from a mapping, checking names and JSON types strictly."""
    if not isinstance(values, Mapping):
        name = path.removesuffix(".") or what
        raise ConfigError(f"{name} must be an object, not {type(values).__name__}", field=name)
    known = _types_of(cls)
    for name in values:
        if name not in known:
            raise ConfigError(
                f"unknown {what} field {path}{name}; fields here: {', '.join(sorted(known))}", field=f"{path}{name}"
            )
    for each in fields(cls):
        if each.name not in values and each.default is MISSING and each.default_factory is MISSING:
            raise ConfigError(f"{what} field {path}{each.name} is missing", field=f"{path}{each.name}")
    return cls(**{name: _coerce(known[name], value, f"{path}{name}", what) for name, value in values.items()})


def counted(config: Any) -> dict[str, Any]:
    """Return the fields that count in a digest, in plain JSON types: all but LATER ones that have their default."""
    plain: dict[str, Any] = {}
    for each in fields(config):
        value = getattr(config, each.name)
        default = each.default if each.default_factory is MISSING else each.default_factory()
        if each.metadata.get("later") and value == default:
            continue
        plain[each.name] = counted(value) if is_dataclass(value) else value  # a tuple is a list in JSON
    return plain


@functools.cache
def _types_of(cls: type) -> dict[str, Any]:
    # Asking for them costs more than all of the rest, and a service asks on every request.
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def _coerce(hint: Any, value: Any, path: str, what: str) -> Any:
    """Check `value` against `hint`; turn lists into tuples and mappings into dataclasses."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        # A mapping where there may be one, else whatever comes first.
        wanted = [a for a in arguments if a is not type(None)]
        mappings = [a for a in wanted if get_origin(a) is dict]
        return _coerce(mappings[0] if mappings and isinstance(value, Mapping) else wanted[0], value, path, what)
    if is_dataclass(hint):
        return _build(hint, value, f"{path}.", what)  # type: ignore[arg-type]  # is_dataclass also admits instances
    if origin is Literal:
        check_choice(what, path, value, arguments)
        return value
    if origin is dict:
        return {str(name): _coerce(arguments[1], item, f"{path}.{name}", what) for name, item in value.items()}
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path} must be a list", field=path)
        return tuple(_coerce(arguments[0], item, path, what) for item in value)
    accepted = (int, float) if hint is float else (hint,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{path} is {value!r}; it must be {hint.__name__}", field=path)
    try:
        return float(value) if hint is float else value
    except OverflowError as err:
        raise ConfigError(f"{path} is too large for a number with a fraction", field=path) from err
