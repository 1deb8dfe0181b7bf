"""Every error that leaves the API is an RFC 9457 problem of the catalogue."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Literal

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException

from duquant.errors import ConfigError, DuQuantError
from infra.errors import (
    ArtifactConflict,
    ArtifactNotFound,
    BatchNotFound,
    DependencyFailed,
    DependencyNotFound,
    EvaluationNotFound,
    IdempotencyMismatch,
    InfraError,
    JobChanged,
    JobConflict,
    JobNotFound,
    KeyConflict,
    KeyNotFound,
    ModelForbidden,
    ModelNotFound,
    ObjectNotFound,
    QueueChanged,
    QueueConflict,
    QueueNotFound,
    QuotaExceeded,
    TenantExists,
    TenantNotFound,
    TextConflict,
    TextNotFound,
    TransientError,
    WebhookForbidden,
    WebhookNotFound,
)
from service.catalogue import CATALOGUE, ProblemKind
from service.heads import takes_head

log = structlog.get_logger(__name__)

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:duquant:problem:"

_BY_STATUS = {404: "not-found", 405: "method-not-allowed", 413: "body-too-large", 415: "unsupported-media-type"}


UNION_MARK = "union:"
"""What tags of unions begin with: pydantic names them in the paths of errors, but no request has them."""

RULES = {
    r"^[a-z0-9][a-z0-9_-]{0,63}$": (
        "must be 1 to 64 lower-case letters, digits, hyphens and underscores, and begin with a letter or a digit"
    ),
    r"^[A-Za-z0-9_.-]{1,63}$": "must be 1 to 63 letters without accents, digits, underscores, dots and hyphens",
    r"^[A-Za-z0-9_.-]{1,63}=[^\x00]{1,200}$": (
        "must be NAME=VALUE, the name of 1 to 63 letters without accents, digits, underscores, dots and hyphens, "
        "the value of 1 to 200 characters"
    ),
}
"""What patterns of the API say, in words."""

Location = Literal["body", "query", "path", "header"]


class FieldProblem(BaseModel):
    """One thing that is wrong with one field."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    location: Location = "body"
    """Where the field is."""
    pointer: str
    """A JSON pointer (RFC 6901) to it; for a parameter, a slash and its name."""
    detail: str
    """What is wrong and what would be right."""


class Problem(BaseModel):
    """An error, as RFC 9457 writes it."""

    type: str
    """A URN from the catalogue; programs should branch on it."""
    title: str
    """The same for every problem of this type."""
    status: int
    """The HTTP status again."""
    detail: str
    """What happened this time, and what to do."""
    instance: str
    """The path that was asked for."""
    request_id: str
    """Also in the X-Request-Id header and in the server's log."""
    errors: list[FieldProblem] = []
    """The fields that are wrong."""


@dataclass
class ProblemError(Exception):
    """Raise this to answer with a problem from the catalogue."""

    name: str
    detail: str
    errors: list[FieldProblem] = field(default_factory=list)
    headers: Mapping[str, str] = field(default_factory=dict)


def pointer_of(parts: Iterable[object]) -> str:
    """Return the JSON pointer of a path of keys and indexes.

    >>> pointer_of(["recipe", "a/b", 0])
    '/recipe/a~1b/0'
    """
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


def problem_response(request: Request, problem: ProblemError) -> Response:
    """Write a problem as the response to a request."""
    kind = CATALOGUE[problem.name]
    request_id = str(getattr(request.state, "request_id", ""))
    body = Problem(
        type=TYPE_PREFIX + problem.name,
        title=kind.title,
        status=kind.status,
        detail=problem.detail,
        instance=request.url.path,
        request_id=request_id,
        errors=problem.errors,
    )
    # A client may send text that is no valid UTF-8 when written out (lone surrogates); it must not break the answer.
    content = json.dumps(body.model_dump(), ensure_ascii=False).encode("utf-8", "backslashreplace")
    headers = {"Cache-Control": "no-store", "X-Request-Id": request_id, **problem.headers}
    return Response(content, status_code=kind.status, media_type=MEDIA_TYPE, headers=headers)


def config_problem(error: ConfigError, prefix: str = "") -> ProblemError:
    """Turn a refused recipe or calibration field into a problem that points at it."""
    pointer = prefix + pointer_of(str(error.facts.get("field", "")).split("."))
    return ProblemError("validation-failed", str(error), [FieldProblem(pointer=pointer, detail=str(error))])


def _joined(path: list[Any], field: str) -> list[Any]:
    """Append the field that a recipe's own check names to the place where pydantic met it; they may overlap.

    >>> _joined(["recipe", "weight"], "weight.bits")
    ['recipe', 'weight', 'bits']
    """
    parts = field.split(".") if field else []
    overlap = next(n for n in range(min(len(path), len(parts)), -1, -1) if path[len(path) - n :] == parts[:n])
    return [*path, *parts[overlap:]]


def _field_problem(error: Mapping[str, Any]) -> FieldProblem:
    location, *path = (part for part in error["loc"] if not str(part).startswith(UNION_MARK))
    cause = error.get("ctx", {}).get("error")
    detail = error["msg"]
    if isinstance(cause, ValueError):
        detail = str(cause)
    if isinstance(cause, ConfigError):
        path = _joined(path, str(cause.facts.get("field", "")))
    if error["type"] == "string_pattern_mismatch":
        detail = RULES.get(error.get("ctx", {}).get("pattern", ""), detail)
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        detail = f"unknown field {path[-1]!r}" if path else detail
    place: Location = location if location in ("query", "path", "header") else "body"
    return FieldProblem(location=place, pointer=pointer_of(path), detail=detail)


def _validation_problem(error: RequestValidationError) -> ProblemError:
    details = error.errors()
    if any(each["type"] == "json_invalid" for each in details):
        reason = details[0].get("ctx", {}).get("error", "")
        return ProblemError("malformed-request", f"The body is not JSON: {reason}")
    errors = [_field_problem(each) for each in details][:50]
    summary = "; ".join(f"{each.pointer or 'the body'}: {each.detail}" for each in errors[:3])
    return ProblemError("validation-failed", summary, errors)


def _http_problem(request: Request, error: HTTPException) -> ProblemError:
    name = _BY_STATUS.get(error.status_code)
    if name is None:
        name = "malformed-request" if error.status_code < HTTPStatus.INTERNAL_SERVER_ERROR else "internal-error"
    detail = {
        "not-found": "There is nothing at this path; GET /openapi.json lists what there is.",
        "method-not-allowed": "Use one of the methods in the Allow header.",
    }.get(name, str(error.detail))
    headers = dict(error.headers or {})
    if name == "method-not-allowed":
        headers["Allow"] = ", ".join(_allowed_methods(request)) or headers.get("Allow", "")
    return ProblemError(name, detail, headers=headers)


def _allowed_methods(request: Request) -> list[str]:
    """Return the methods of every route with this path; the framework names those of the first one only."""
    routes = [route for route in request.app.state.routes if route.path_regex.match(request.url.path)]
    methods = {method for route in routes for method in route.methods or ()}
    return sorted(methods | {"HEAD"} if "GET" in methods and takes_head(request.url.path) else methods)


_BY_ERROR: dict[type[Exception], tuple[str, str | None]] = {
    ArtifactConflict: ("artifact-conflict", None),
    ArtifactNotFound: ("artifact-not-found", None),
    BatchNotFound: ("batch-not-found", None),
    DependencyFailed: ("dependency-failed", None),
    DependencyNotFound: ("dependency-not-found", "/depends_on"),
    EvaluationNotFound: ("evaluation-not-found", None),
    IdempotencyMismatch: ("idempotency-key-reused", None),
    JobChanged: ("precondition-failed", None),
    JobConflict: ("job-conflict", None),
    JobNotFound: ("job-not-found", None),
    KeyConflict: ("key-conflict", None),
    KeyNotFound: ("key-not-found", None),
    ModelForbidden: ("model-forbidden", "/model/name"),
    ModelNotFound: ("model-not-found", "/model/name"),
    ObjectNotFound: ("not-found", None),
    QueueChanged: ("precondition-failed", None),
    QueueConflict: ("queue-conflict", None),
    QueueNotFound: ("queue-not-found", None),
    TenantExists: ("tenant-exists", "/id"),
    TextConflict: ("text-conflict", None),
    TextNotFound: ("text-unknown", None),
    TenantNotFound: ("tenant-not-found", None),
    WebhookForbidden: ("webhook-forbidden", "/url"),
    WebhookNotFound: ("webhook-not-found", None),
}
"""Which problem an error of ours is, and the field of the body that it is about."""


def _domain_problem(error: Exception) -> ProblemError:
    if type(error) in _BY_ERROR:
        name, pointer = _BY_ERROR[type(error)]
        errors = [] if pointer is None else [FieldProblem(pointer=pointer, detail=str(error))]
        return ProblemError(name, str(error), errors)
    match error:
        case QuotaExceeded():
            # What can never fit is not worth another try.
            headers = {} if error.facts.get("is_final") else {"Retry-After": "60"}
            return ProblemError("quota-exceeded", str(error), headers=headers)
        case TransientError():
            # The message names hosts and drivers, which is for the operator's log and not for a client.
            log.warning("dependency_unavailable", error=str(error))
            return ProblemError(
                "service-unavailable",
                "A part of the service is down for the moment; GET /readyz names it. Try again.",
                headers={"Retry-After": "5"},
            )
        case ConfigError():
            return config_problem(error)
    if isinstance(error, InfraError | DuQuantError):
        # Others are logged by the server, with where they come from.
        log.error("request_failed", error=str(error), exc_info=error)
    detail = "Something went wrong on the server; its log has the request id."
    # The server drops the connection after a crash: without a word of it, the client's next request would meet that.
    return ProblemError("internal-error", detail, headers={"Connection": "close"})


def install(app: FastAPI) -> None:
    """Answer every error of the app with a problem."""

    async def on_problem(request: Request, error: Exception) -> Response:
        assert isinstance(error, ProblemError)
        return problem_response(request, error)

    async def on_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return problem_response(request, _validation_problem(error))

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return problem_response(request, _http_problem(request, error))

    async def on_domain(request: Request, error: Exception) -> Response:
        return problem_response(request, _domain_problem(error))

    app.add_exception_handler(ProblemError, on_problem)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(InfraError, on_domain)
    app.add_exception_handler(DuQuantError, on_domain)
    app.add_exception_handler(Exception, on_domain)


ALWAYS = ("unauthorized", "missing-scope", "internal-error", "service-unavailable")
"""What every call under /v1 may be answered with."""
COMMON = (*ALWAYS, "validation-failed")
"""The same for calls with parameters, which may be wrong."""


def responses(*names: str) -> dict[int | str, dict[str, Any]]:
    """Describe problems for OpenAPI, with an example of each."""
    described: dict[int | str, dict[str, Any]] = {}
    if "unauthorized" in names:
        names = (*names, "rate-limited")  # whoever asks for a key counts its requests
    for name in dict.fromkeys(names):
        kind = CATALOGUE[name]
        entry = described.setdefault(
            kind.status,
            {
                "description": HTTPStatus(kind.status).phrase,
                "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}, "examples": {}}},
            },
        )
        entry["content"][MEDIA_TYPE]["examples"][name] = {"summary": kind.title, "value": _example(name, kind)}
    return described


def _example(name: str, kind: ProblemKind) -> dict[str, Any]:
    errors = []
    if name == "validation-failed":
        detail = "unknown field 'block_sise'"
        errors = [{"location": "body", "pointer": "/recipe/transform/block_sise", "detail": detail}]
    return {
        "type": TYPE_PREFIX + name,
        "title": kind.title,
        "status": kind.status,
        "detail": errors[0]["detail"] if errors else kind.title + ".",
        "instance": "/v1/jobs",
        "request_id": "5f0c2d8e9a7b4c61",
        "errors": errors,
    }
