"""What the OpenAPI description needs beyond what the framework finds out by itself."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from service import errors

_JSON = "application/json"


def header(description: str) -> dict[str, Any]:
    """Describe a header of an answer."""
    return {"description": description, "schema": {"type": "string"}}


def shows(example: Any, description: str = "Successful Response", **more: Any) -> dict[str, Any]:
    """Describe an answer by an example; `more` may hold its headers, model or links."""
    return {"description": description, "content": {_JSON: {"example": example}}, **more}


def build(app: FastAPI) -> dict[str, Any]:
    """Return the app's description; FastAPI's own, and the schema of problems."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        components = schema.setdefault("components", {}).setdefault("schemas", {})
        problem = errors.Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        components.update(problem.pop("$defs"))
        components["Problem"] = problem
        app.openapi_schema = schema
    return app.openapi_schema
