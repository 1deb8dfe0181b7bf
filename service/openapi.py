"""What the OpenAPI description needs beyond what the framework finds out by itself."""

import copy
import json
import re
import threading
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

from service import errors

_JSON = "application/json"
_COLLECTION = re.compile(r"/v1/\w+")


def header(description: str) -> dict[str, Any]:
    """Describe a header of an answer."""
    return {"description": description, "schema": {"type": "string"}}


def shows(example: Any, description: str = "Successful Response", **more: Any) -> dict[str, Any]:
    """Describe an answer by an example; `more` may hold its headers, model or links."""
    return {"description": description, "content": {_JSON: {"example": example}}, **more}


def takes(**examples: Any) -> dict[str, Any]:
    """Describe a body by examples, for a route's `openapi_extra`."""
    named = {name: {"value": value} for name, value in examples.items()}
    return {"requestBody": {"content": {_JSON: {"examples": named}}}}


class Description:
    """The app's description, built once, when it is first asked for."""

    def __init__(self, app: FastAPI, routers: Iterable[APIRouter]) -> None:
        self._app, self._routers = app, tuple(routers)
        self._lock = threading.Lock()
        self._built: dict[str, Any] | None = None
        self._written: bytes | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return it."""
        with self._lock:
            if self._built is None:
                self._built = _build(self._app, self._routers)
            return self._built

    def as_json(self) -> bytes:
        """Return it as it is sent."""
        if self._written is None:
            self._written = json.dumps(self.as_dict(), ensure_ascii=False).encode()
        return self._written


def _build(app: FastAPI, routers: Iterable[APIRouter]) -> dict[str, Any]:
    """Return FastAPI's own description, with the schema of problems and the links between calls."""
    schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    components = schema.setdefault("components", {})
    problem = errors.Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    components.setdefault("schemas", {}).update({**problem.pop("$defs"), "Problem": problem})
    _put_nulls_back(routers, schema)
    paths = schema["paths"]
    for path, operations in paths.items():
        for method, operation in operations.items():
            _complete(method, operation)
            if method == "post" and _COLLECTION.fullmatch(path):
                _add_links(operation, _links(paths, path))
            components.setdefault("examples", {}).update(_shared_examples(operation))
    return schema


def _put_nulls_back(routers: Iterable[APIRouter], schema: dict[str, Any]) -> None:
    """Write the examples once more as the routes have them: FastAPI leaves out every null, also those in examples."""
    for route in (route for router in routers for route in router.routes):
        if not isinstance(route, APIRoute) or not route.include_in_schema:
            continue
        for method in route.methods or ():
            operation = schema["paths"][route.path_format][method.lower()]
            given = {str(status): answer for status, answer in route.responses.items()}
            sides = [(operation["responses"][status], answer) for status, answer in given.items()]
            if body := (route.openapi_extra or {}).get("requestBody"):
                sides.append((operation["requestBody"], body))
            for described, original in sides:
                for media_type, content in original.get("content", {}).items():
                    examples = {name: content[name] for name in ("example", "examples") if name in content}
                    described["content"][media_type].update(copy.deepcopy(examples))


def _complete(method: str, operation: dict[str, Any]) -> None:
    names = ["body-too-large"] if method in ("post", "put", "patch") else []
    # Whoever needs a key takes no parameter that is not described.
    if operation.get("parameters") or operation.get("security"):
        names.append("validation-failed")
    if _needs_key(operation):
        next(each for each in operation["parameters"] if each["name"] == "Idempotency-Key")["required"] = True
    for status, answer in errors.responses(*names).items():
        operation["responses"].setdefault(str(status), answer)


def _needs_key(operation: dict[str, Any]) -> bool:
    refused = operation["responses"].get("400", {}).get("content", {}).get(errors.MEDIA_TYPE, {})
    return "idempotency-key-required" in refused.get("examples", {})


def _shared_examples(operation: dict[str, Any]) -> dict[str, Any]:
    """Put references in place of the examples of problems, and return them: each occurs dozens of times."""
    shared = {}
    for answer in operation["responses"].values():
        examples = answer.get("content", {}).get(errors.MEDIA_TYPE, {}).get("examples", {})
        for name, example in examples.items():
            shared[f"problem-{name}"] = example
            examples[name] = {"$ref": f"#/components/examples/problem-{name}"}
    return shared


def _links(paths: Mapping[str, Any], collection: str) -> dict[str, Any]:
    """Return links (OpenAPI) from what was made in a collection to what can be done with it, by the id it got."""
    links = {}
    for path, operations in paths.items():
        found = re.match(re.escape(collection) + r"/\{(\w+)\}(?!.*\{)", path)
        if found is None:
            continue
        for operation in operations.values():
            links[operation["operationId"]] = {
                "operationId": operation["operationId"],
                "parameters": {found[1]: "$response.body#/id"},
            }
    return links


def _add_links(operation: dict[str, Any], links: dict[str, Any]) -> None:
    for status, answer in operation["responses"].items():
        if links and status in ("200", "201"):
            answer["links"] = {**links, **answer.get("links", {})}
