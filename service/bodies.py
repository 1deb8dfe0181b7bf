"""What every request body has to be."""

from fastapi import Depends, Request

from service.errors import ProblemError


async def _require_json(request: Request) -> None:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ProblemError(
            "unsupported-media-type", f"The body's content type is {media_type!r}; send application/json."
        )


async def _require_json_if_any(request: Request) -> None:
    headers = request.headers
    if headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
        await _require_json(request)


JSON_BODY = Depends(_require_json)
"""For routes with a body: another content type is refused before anything is read."""
JSON_BODY_OR_NONE = Depends(_require_json_if_any)
"""For routes whose body may be left out."""
BODY_PROBLEMS = ("malformed-request", "body-too-large", "unsupported-media-type", "validation-failed")
