"""Builds the dispatcher from its settings and runs it until a signal.

What is heavy (torch, Ray) is imported when the settings, the database and the object store have turned out well: a
mistyped variable is told at once, and a dispatcher without Ray does not load it.
"""

import os
import signal
import socket
import sys
from types import FrameType
from typing import TYPE_CHECKING

from duquant.errors import DuQuantError
from infra.database import make_engine
from infra.errors import InfraError, TransientError
from infra.jobs import JobStore
from infra.logging import EXIT_UNAVAILABLE, fail_with, setup_logging
from infra.migrate import upgrade_engine
from infra.storage import ObjectStore
from infra.tracing import flush, setup_tracing
from workers.settings import WorkerSettings

if TYPE_CHECKING:
    from workers.tasks import Executor


def build_executor(settings: WorkerSettings, storage: ObjectStore) -> "Executor":
    """Return the executor that the settings ask for.

    Raises:
        TransientError: the Ray cluster cannot be reached.
        DuQuantError: the device is not there.
    """
    if settings.executor == "local":
        from workers.executors.local import LocalExecutor
        from workers.layer_worker import LayerWorker

        return LocalExecutor(LayerWorker(storage, threads=settings.threads_per_slot))
    return _build_ray_executor(settings)


def _build_ray_executor(settings: WorkerSettings) -> "Executor":
    from ray.exceptions import RayError

    from duquant.models.devices import resolve_device
    from workers.executors.on_ray import RayExecutor

    # On a cluster this machine may have no GPU although the workers do: only "auto" looks at it.
    cuda = settings.device.startswith("cuda") or (
        settings.device == "auto" and resolve_device(settings.device).type == "cuda"
    )
    try:
        return RayExecutor(
            slots=settings.slots,
            threads_per_slot=settings.threads_per_slot,
            gpus_per_slot=1.0 if cuda else 0.0,
            address=settings.ray_address,
        )
    except (RayError, ConnectionError) as err:
        raise TransientError(f"the Ray cluster cannot be used: {err}") from err


def main() -> None:
    """Run a dispatcher. Exit status: 0 after a signal, 2 for bad settings, 5 when something it needs is down."""
    try:
        settings = WorkerSettings.load()
        secrets = (settings.s3_access_key, settings.s3_secret_key, settings.key_pepper)
        log = setup_logging("workers", level=settings.log_level, fmt=settings.log_format, secrets=secrets)
        setup_tracing("workers", settings.otel_endpoint)
        engine = make_engine(settings.database_url, plan_once=True)
        upgrade_engine(engine)
        storage = ObjectStore.from_settings(settings)
    except InfraError as err:
        fail_with(err)
    from workers.dispatcher import Dispatcher

    try:
        executor = build_executor(settings, storage)
    except (TransientError, DuQuantError) as err:
        log.error("executor_not_started", executor=settings.executor, error=str(err))
        sys.exit(EXIT_UNAVAILABLE)
    owner = f"{socket.gethostname()}-{os.getpid()}"
    dispatcher = Dispatcher(JobStore(engine), storage, executor, settings, owner=owner)

    def stop(_number: int, _frame: FrameType | None) -> None:
        dispatcher.stop()

    # After the executor: ray.init puts a SIGTERM handler of its own in place.
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    log.info("dispatcher_started", owner=owner, executor=settings.executor, slots=executor.slots)
    try:
        dispatcher.run()
    except InfraError as err:
        fail_with(err)
    finally:
        flush()
        engine.dispose()
