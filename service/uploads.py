"""Takes a body that is too large for memory: into a file, checked while it arrives."""

import codecs
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO

import anyio.to_thread
from fastapi import Request
from starlette.requests import ClientDisconnect

from infra.errors import DiskFull
from service.errors import FieldProblem, ProblemError

_WRITE_BYTES = 1 << 20


@asynccontextmanager
async def received_text(request: Request) -> AsyncIterator[Path]:
    """Receive a text; the file is there while the block runs.

    Raises:
        ProblemError: it is empty, or no UTF-8.
        HTTPException: it is over the limit.
        DiskFull: there is no room for it on this machine.
    """
    try:
        with tempfile.NamedTemporaryFile(prefix="duquant-upload-") as file:
            await _receive(request, file)
            yield Path(file.name)
    except OSError as error:
        raise DiskFull(f"an upload cannot be kept: {error.strerror}") from error


async def _receive(request: Request, file: IO[bytes]) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    waiting, size = bytearray(), 0
    try:
        async for chunk in request.stream():
            decoder.decode(chunk)
            size += len(chunk)
            waiting += chunk
            if len(waiting) >= _WRITE_BYTES:
                await anyio.to_thread.run_sync(file.write, bytes(waiting))
                waiting.clear()
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _refused("a text must be UTF-8") from error
    except ClientDisconnect as error:
        raise ProblemError("malformed-request", "The body ended before it was whole.") from error
    if not size:
        raise _refused("the text is empty")
    file.write(waiting)
    file.flush()


def _refused(detail: str) -> ProblemError:
    return ProblemError("validation-failed", detail, [FieldProblem(pointer="", detail=detail)])
