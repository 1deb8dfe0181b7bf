"""What the API process tidies up now and then."""

import asyncio

import anyio.to_thread
import structlog

from infra.errors import InfraError
from service.context import Context

log = structlog.get_logger(__name__)

_EVERY_SECONDS = 600.0


async def keep_house(service: Context) -> None:
    """Forget answers kept by Idempotency-Key for longer than they need be, until the service stops."""
    while not service.stopping.is_set():
        try:
            async with asyncio.timeout(_EVERY_SECONDS):
                await service.stopping.wait()
        except TimeoutError:
            await anyio.to_thread.run_sync(tidy, service)


def tidy(service: Context) -> None:
    """Do it once; a database that does not answer is tried again next time."""
    try:
        count = service.idempotency.purge()
    except InfraError as error:
        log.warning("housekeeping_failed", error=str(error))
        return
    if count:
        log.info("idempotency_keys_forgotten", count=count)
