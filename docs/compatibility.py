"""Says what of a new API description would break a client written for the old one.

A request may only become laxer and an answer only stricter: parameters and fields of requests may be added when they
are optional, values that were allowed stay allowed; answers may gain fields and lose none.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Direction = Literal["request", "response"]
_BOUNDS = {
    "maximum": 1,
    "exclusiveMaximum": 1,
    "maxLength": 1,
    "maxItems": 1,
    "minimum": -1,
    "exclusiveMinimum": -1,
    "minLength": -1,
    "minItems": -1,
}
"""Keywords that bound a value, and whether a larger number allows more (1) or less (-1)."""


def breaking_changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return a sentence for each change that a client would notice.

    >>> operation = {"operationId": "a", "responses": {"200": {}}}
    >>> breaking_changes({"paths": {"/a": {"get": operation}}}, {"paths": {}})
    ['GET /a is gone']
    """
    found = []
    for path, operations in old["paths"].items():
        for method, before in operations.items():
            where = f"{method.upper()} {path}"
            after = new["paths"].get(path, {}).get(method)
            if after is None:
                found.append(f"{where} is gone")
            else:
                found += [f"{where}: {change}" for change in _operation(before, after, _Schemas(old), _Schemas(new))]
    return found


class _Schemas:
    """Resolves the references of one description."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document

    def resolve(self, schema: dict[str, Any]) -> dict[str, Any]:
        while "$ref" in schema:
            target: Any = self._document
            for part in schema["$ref"].removeprefix("#/").split("/"):
                target = target[part]
            schema = {**target, **{name: value for name, value in schema.items() if name != "$ref"}}
        return schema


def _operation(old: dict[str, Any], new: dict[str, Any], a: _Schemas, b: _Schemas) -> Iterator[str]:
    if old["operationId"] != new["operationId"]:
        yield f"operationId {old['operationId']} became {new['operationId']}"
    yield from _parameters(old, new, a, b)
    yield from _bodies(old, new, a, b)
    for status, before in old["responses"].items():
        after = new["responses"].get(status)
        if after is None:
            yield f"answer {status} is gone"
            continue
        for media_type, content in before.get("content", {}).items():
            if media_type not in after.get("content", {}):
                yield f"answer {status} is no longer {media_type}"
                continue
            compare = _Comparison("response", a, b)
            schemas = content.get("schema", {}), after["content"][media_type].get("schema", {})
            yield from compare.differences(*schemas, f"answer {status}")
        for header in before.get("headers", {}):
            if header not in after.get("headers", {}):
                yield f"answer {status} lost its header {header}"


def _parameters(old: dict[str, Any], new: dict[str, Any], a: _Schemas, b: _Schemas) -> Iterator[str]:
    before = {(each["in"], each["name"]): each for each in old.get("parameters", [])}
    after = {(each["in"], each["name"]): each for each in new.get("parameters", [])}
    for key, parameter in before.items():
        if key not in after:
            yield f"{key[0]} parameter {key[1]} is gone"
        else:
            compare = _Comparison("request", a, b)
            yield from compare.differences(parameter["schema"], after[key]["schema"], f"parameter {key[1]}")
    for key, parameter in after.items():
        was_required = before.get(key, {}).get("required", False)
        if parameter.get("required") and not was_required:
            yield f"{key[0]} parameter {key[1]} is now required"


def _bodies(old: dict[str, Any], new: dict[str, Any], a: _Schemas, b: _Schemas) -> Iterator[str]:
    before, after = old.get("requestBody"), new.get("requestBody")
    if after is not None and after.get("required") and not (before or {}).get("required"):
        yield "the body is now required"
    if before is None:
        return
    for media_type, content in before["content"].items():
        if after is None or media_type not in after["content"]:
            yield f"a body of {media_type} is no longer taken"
            continue
        compare = _Comparison("request", a, b)
        yield from compare.differences(content["schema"], after["content"][media_type]["schema"], "body")


@dataclass
class _Comparison:
    direction: Direction
    old: _Schemas
    new: _Schemas
    depth: int = 0

    def differences(self, before: dict[str, Any], after: dict[str, Any], where: str) -> Iterator[str]:
        """Yield what breaks between two schemas."""
        if self.depth > 12:  # recursive schemas have been compared by then
            return
        before, after = self.old.resolve(before), self.new.resolve(after)
        self.depth += 1
        yield from self._types(before, after, where)
        before, after = self._plain(before, self.old), self._plain(after, self.new)
        yield from self._enums(before, after, where)
        if self.direction == "request":
            yield from _bounds(before, after, where)
        yield from self._properties(before, after, where)
        if isinstance(before.get("items"), dict) and isinstance(after.get("items"), dict):
            yield from self.differences(before["items"], after["items"], f"{where}[]")
        self.depth -= 1

    def _types(self, before: dict[str, Any], after: dict[str, Any], where: str) -> Iterator[str]:
        # What must go on: every type that was taken, or none that was never given.
        was, now = self._kinds(before, self.old), self._kinds(after, self.new)
        lost = was - now if self.direction == "request" else now - was
        if was and now and lost:
            yield f"{where} was {' or '.join(sorted(was))} and is {' or '.join(sorted(now))}"

    def _kinds(self, schema: dict[str, Any], schemas: _Schemas) -> set[str]:
        variants = [schemas.resolve(each) for each in schema.get("anyOf", schema.get("oneOf", []))]
        if variants:
            return set().union(*(self._kinds(each, schemas) for each in variants))
        kind = schema.get("type", [])
        return {kind} if isinstance(kind, str) else set(kind)

    def _plain(self, schema: dict[str, Any], schemas: _Schemas) -> dict[str, Any]:
        """Return the one variant that is not null, if there is just one; its fields are what matters."""
        variants = [schemas.resolve(each) for each in schema.get("anyOf", [])]
        others = [each for each in variants if each.get("type") != "null"]
        return others[0] if len(others) == 1 else schema

    def _enums(self, before: dict[str, Any], after: dict[str, Any], where: str) -> Iterator[str]:
        # Answers may gain values: the documentation says that enumerations are open.
        if self.direction == "request" and "enum" in after:
            lost = [value for value in before.get("enum", []) if value not in after["enum"]]
            if lost or "enum" not in before:
                yield f"{where} takes only {after['enum']}"

    def _properties(self, before: dict[str, Any], after: dict[str, Any], where: str) -> Iterator[str]:
        had, has = before.get("properties", {}), after.get("properties", {})
        for name, schema in had.items():
            if name in has:
                yield from self.differences(schema, has[name], f"{where}.{name}")
            elif has or had:
                yield f"{where} lost the field {name}"
        needed_before, needed_now = set(before.get("required", [])), set(after.get("required", []))
        if self.direction == "request":
            for name in sorted(needed_now - needed_before):
                yield f"{where} now requires the field {name}"
        else:
            for name in sorted((needed_before - needed_now) & has.keys()):
                yield f"{where} may now leave out the field {name}"


def _bounds(before: dict[str, Any], after: dict[str, Any], where: str) -> Iterator[str]:
    for keyword, sign in _BOUNDS.items():
        if keyword in after and (keyword not in before or (after[keyword] - before[keyword]) * sign < 0):
            yield f"{where} is now bounded by {keyword} {after[keyword]}"
    if "pattern" in after and after["pattern"] != before.get("pattern"):
        yield f"{where} must now match {after['pattern']}"
    if after.get("additionalProperties") is False and before.get("additionalProperties", True) is not False:
        yield f"{where} takes no other fields any more"
