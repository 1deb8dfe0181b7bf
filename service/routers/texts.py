"""/v1/texts: what jobs calibrate and measure on."""

from collections.abc import AsyncIterator
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Depends, Path, Query, Request, Response

from service.api_route import ApiRoute
from service.auth import Reader, Writer
from service.context import Service
from service.errors import COMMON, ProblemError, responses
from service.openapi import header, shows
from service.paging import Cursor, Limit, cut, read_cursor
from service.schemas.texts import TextPage, TextUploaded, TextView, text_view
from service.uploads import received_text

router = APIRouter(prefix="/v1", tags=["texts"], route_class=ApiRoute)

TextId = Annotated[str, Path(examples=["text_0199a1b2c3d47e5f8a9b0c1d2e3f4a5b"])]

_ONE = (*COMMON, "text-unknown")
_SUFFIXES = {"text/plain": ".txt", "application/x-ndjson": ".jsonl", "application/jsonl": ".jsonl"}
"""By media type; workers tell JSON Lines from plain text by them."""
_TEXT = {
    "id": "text_0199a1b2c3d47e5f8a9b0c1d2e3f4a5b",
    "name": "march",
    "source": {"kind": "object", "name": "texts/default/text_0199a1b2c3d47e5f8a9b0c1d2e3f4a5b.txt"},
    "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "size_bytes": 1_048_576,
    "created_at": "2026-01-05T09:30:00.000Z",
}
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "text/plain": {"schema": {"type": "string", "minLength": 1}, "example": "It was a bright cold day."},
            "application/x-ndjson": {"schema": {"type": "string", "minLength": 1}, "example": '{"text": "It was."}\n'},
        },
    }
}


async def _suffix(request: Request) -> str:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in _SUFFIXES:
        detail = f"The body's content type is {media_type!r}; texts are {' or '.join(_SUFFIXES)}."
        raise ProblemError("unsupported-media-type", detail)
    return _SUFFIXES[media_type]


async def _one_upload(service: Service, caller: Writer) -> AsyncIterator[None]:
    if not service.uploads.has_room(caller.key_id):
        detail = f"This key has {service.uploads.most} uploads under way, which is as many as it may; wait for one."
        raise ProblemError("too-many-streams", detail, headers={"Retry-After": "5"})
    with service.uploads.one(caller.key_id):
        yield


@router.post(
    "/texts",
    operation_id="uploadText",
    summary="Upload a text",
    status_code=201,
    response_model=TextUploaded,
    dependencies=[Depends(_one_upload)],
    responses={
        200: shows({**_TEXT, "reused": True}, "The same bytes were there under this name", model=TextUploaded),
        201: shows({**_TEXT, "reused": False}, "It is stored", headers={"Location": header("The path of the text")}),
        **responses(
            *COMMON,
            "malformed-request",
            "body-too-large",
            "unsupported-media-type",
            "quota-exceeded",
            "too-many-streams",
        ),
    },
    openapi_extra=_BODY,
)
async def upload_text(
    service: Service,
    caller: Writer,
    request: Request,
    response: Response,
    suffix: Annotated[str, Depends(_suffix)],
    name: Annotated[
        str, Query(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$", description="A name for people")
    ],
) -> TextUploaded:
    """Store a text to calibrate or measure on: UTF-8, plain or as JSON Lines. Sending it again changes nothing."""
    async with received_text(request) as path:

        def add() -> TextUploaded:
            text, is_new = service.texts.add(caller.tenant_id, name, path, suffix=suffix, actor=caller.actor)
            return TextUploaded(**text_view(text).model_dump(), reused=not is_new)

        uploaded = await anyio.to_thread.run_sync(add)
    response.status_code = 200 if uploaded.reused else 201
    response.headers["Location"] = f"/v1/texts/{uploaded.id}"
    return uploaded


@router.get(
    "/texts",
    operation_id="listTexts",
    summary="List texts, newest first",
    responses={200: shows({"items": [_TEXT], "next_cursor": None}), **responses(*COMMON)},
)
def list_texts(service: Service, caller: Reader, limit: Limit = 50, cursor: Cursor = None) -> TextPage:
    """List this project's texts by pages."""
    rows = service.texts.page(caller.tenant_id, limit=limit + 1, before=read_cursor(cursor, "text_"))
    page, next_cursor = cut(rows, limit)
    return TextPage(items=[text_view(text) for text in page], next_cursor=next_cursor)


@router.get(
    "/texts/{text_id}",
    operation_id="getText",
    summary="Read what is known of a text",
    responses={200: shows(_TEXT), **responses(*_ONE)},
)
def get_text(service: Service, caller: Reader, text_id: TextId) -> TextView:
    """Read a text's name, size and hash, and how a job names it."""
    return text_view(service.texts.get(text_id, caller.tenant_id))


@router.delete(
    "/texts/{text_id}",
    operation_id="deleteText",
    summary="Delete a text",
    status_code=204,
    response_class=Response,
    responses={204: {"description": "It is gone"}, **responses(*_ONE, "text-conflict")},
)
def delete_text(service: Service, caller: Writer, text_id: TextId) -> Response:
    """Delete a text. What was made with it stays; making it again needs another."""
    service.texts.delete(text_id, caller.tenant_id, actor=caller.actor)
    return Response(status_code=204)
