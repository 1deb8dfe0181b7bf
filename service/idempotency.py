"""Idempotency-Key: a POST that is sent again with the same key is done once and answered the same.

    def make_thing(caller: Writer, body: ThingRequest, once: Once) -> Response:
        return once.answer(caller, lambda: check(body), lambda checked: Made(store(checked), location="/v1/things/1"))

The work and the kept answer are one transaction: there is never one without the other, whenever the server dies. Only
what was made is kept; a request that was refused leaves its key free. Of two at once, the second waits for the first.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, TypeVar

from fastapi import Depends, Header, Request, Response
from pydantic import BaseModel

from infra.database import transaction
from infra.errors import InfraError
from infra.idempotency import Answer, KeyedRequest
from service.auth import Caller
from service.context import Context, context_of
from service.errors import FieldProblem, ProblemError
from service.openapi import header

_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_REPLAYED = "Idempotent-Replayed"

PreparedT = TypeVar("PreparedT")

OptionalKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="Up to 255 printable ASCII characters, such as a UUID; the same key again gives the same answer",
        json_schema_extra={"pattern": "^[!-~]{1,255}$"},
        examples=["7f0c6a52-2a4e-4c8f-9a53-0d6f6b0f3c11"],
    ),
]

HEADERS = {
    "Location": header("The path of what was made"),
    _REPLAYED: header("true when this is the answer to an earlier request"),
}
"""For the description of an answer in OpenAPI."""
PROBLEMS = ("idempotency-key-reused", "validation-failed")


@dataclass(frozen=True)
class Made:
    """What a request made, as it is answered."""

    view: BaseModel
    status: int = 201
    location: str | None = None
    kept: BaseModel | None = None
    """What a replay shows, where the view holds a secret that the database must not."""


class IdempotentRequest:
    """One POST, with its key if it has one."""

    def __init__(self, service: Context, key: str | None, route: str, body_hash: str) -> None:
        self._service = service
        self._key = key
        self._route = route
        self._body_hash = body_hash

    def answer(
        self,
        caller: Caller,
        prepare: Callable[[], PreparedT],
        make: Callable[[PreparedT], Made],
        *,
        look_first: bool = False,
    ) -> Response:
        """Answer as before, or do the work.

        Args:
            caller: Whose key it is.
            prepare: Checks that may be slow; no transaction is open.
            make: Changes, made in one transaction with the kept answer; only database work belongs here.
            look_first: Look for a kept answer before `prepare`, which does more than check.

        Raises:
            IdempotencyMismatch: the key was used for another request.
        """
        if self._key is None:
            prepared = prepare()
            with transaction(self._service.engine):
                made = make(prepared)
            return _response(_answer(made, made.view))
        request = KeyedRequest(caller.tenant_id, self._key, self._route, self._body_hash)
        if look_first and (known := self._service.idempotency.find(request)) is not None:
            return _response(known, replayed=True)
        try:
            prepared = prepare()
        except (ProblemError, InfraError):
            # What was made once may be refused by now: its model may be gone.
            if (known := self._service.idempotency.find(request)) is not None:
                return _response(known, replayed=True)
            raise
        with transaction(self._service.engine):
            if (known := self._service.idempotency.take(request)) is not None:
                return _response(known, replayed=True)
            made = make(prepared)
            self._service.idempotency.keep(request, _answer(made, made.kept or made.view))
        return _response(_answer(made, made.view))


def _answer(made: Made, view: BaseModel) -> Answer:
    headers = {} if made.location is None else {"Location": made.location}
    return Answer(status=made.status, headers=headers, body=view.model_dump_json())


def _response(answer: Answer, *, replayed: bool = False) -> Response:
    headers = {**answer.headers, **({_REPLAYED: "true"} if replayed else {})}
    return Response(answer.body, status_code=answer.status, headers=headers, media_type="application/json")


async def _idempotent_request(request: Request, key: OptionalKey = None) -> IdempotentRequest:
    if key is not None and not _KEY.fullmatch(key):
        detail = "Idempotency-Key must be 1 to 255 printable ASCII characters without spaces"
        raise ProblemError(
            "validation-failed", detail, [FieldProblem(location="header", pointer="/Idempotency-Key", detail=detail)]
        )
    body_hash = hashlib.sha256(await request.body()).hexdigest()
    route = f"{request.method} {request.scope['path']}"[:200]
    return IdempotentRequest(context_of(request), key, route, body_hash)


async def _keyed_request(
    request: Annotated[IdempotentRequest, Depends(_idempotent_request)], key: OptionalKey = None
) -> IdempotentRequest:
    if key is None:
        raise ProblemError("idempotency-key-required", "Send an Idempotency-Key, such as a fresh UUID.")
    return request


Once = Annotated[IdempotentRequest, Depends(_idempotent_request)]
OnceRequired = Annotated[IdempotentRequest, Depends(_keyed_request)]
"""As Once, for calls that are refused without a key."""
