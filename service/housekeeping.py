"""What the API process does now and then, beside answering."""

import asyncio
from collections.abc import Callable

import anyio
import structlog

from infra.batch_endings import note_finished_batches
from infra.errors import InfraError
from service.context import Context

log = structlog.get_logger(__name__)


async def keep_house(service: Context) -> None:
    """Do the chores, each at its pace, until the service stops."""
    async with anyio.create_task_group() as group:
        for seconds, chore in _CHORES:
            group.start_soon(_repeat, service, seconds, chore)


async def _repeat(service: Context, seconds: float, chore: Callable[[Context], None]) -> None:
    while not service.stopping.is_set():
        try:
            async with asyncio.timeout(seconds):
                await service.stopping.wait()
        except TimeoutError:
            await anyio.to_thread.run_sync(_try, service, chore)


def _try(service: Context, chore: Callable[[Context], None]) -> None:
    """Do it once; a database that does not answer is tried again next time."""
    try:
        chore(service)
    except InfraError as error:
        log.warning("housekeeping_failed", chore=chore.__name__, error=str(error))


def forget_answers(service: Context) -> None:
    """Forget answers kept by Idempotency-Key for longer than they need be."""
    if count := service.idempotency.purge():
        log.info("idempotency_keys_forgotten", count=count)


def note_endings(service: Context) -> None:
    """Notice the batches that have ended, and have webhooks told of it."""
    if count := note_finished_batches(service.engine):
        log.info("batches_finished", count=count)


_CHORES: tuple[tuple[float, Callable[[Context], None]], ...] = ((600.0, forget_answers), (2.0, note_endings))
"""Seconds between two times, and what is done."""
