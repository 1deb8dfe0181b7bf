"""Builds the API: the object graph, the routes, the error handlers. Importing this module does nothing else."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path

import anyio.to_thread
import structlog
from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from fastapi.templating import Jinja2Templates

from infra import migrate, tracing
from infra.artifacts import ArtifactStore
from infra.batches import BatchStore
from infra.database import make_engine
from infra.errors import InfraError, KeyConflict
from infra.evaluations import EvaluationStore
from infra.history import History
from infra.idempotency import IdempotencyStore
from infra.job_search import JobSearch
from infra.jobs import JobStore
from infra.keys import KeyStore
from infra.model_shelf import ModelShelf
from infra.models import ModelCatalog
from infra.queue_metrics import QueueMetrics
from infra.queues import QueueStore
from infra.schema import DEFAULT_TENANT
from infra.storage import ObjectStore
from infra.tenants import TenantStore
from infra.texts import TextStore
from infra.usage import UsageStore
from infra.webhooks.addresses import AddressPolicy, GuardedTransport
from infra.webhooks.sender import WebhookSender
from infra.webhooks.store import WebhookStore
from service import errors
from service.auth import SCOPES
from service.context import Context
from service.heads import HeadAsGet
from service.housekeeping import keep_house
from service.known_keys import KnownKeys
from service.limits import OpenStreams, RateLimiter
from service.middleware import QUIET_PATHS, BodyLimit, RequestContext
from service.openapi import Description
from service.pages import filters
from service.routers import (
    artifacts,
    batches,
    dashboard,
    estimates,
    evaluations,
    health,
    jobs,
    keys,
    metrics,
    queues,
    recipes,
    tenants,
    texts,
    usage,
    webhooks,
)
from service.routers import models as models_routes
from service.settings import ServiceSettings

log = structlog.get_logger(__name__)

_HERE = Path(__file__).parent
ROUTERS = (
    jobs,
    batches,
    estimates,
    queues,
    artifacts,
    evaluations,
    models_routes,
    texts,
    recipes,
    usage,
    keys,
    tenants,
    webhooks,
    health,
    metrics,
    dashboard,
)
"""In the order in which the description lists them."""
_RETRY_SECONDS = 5.0
_LAST_SECONDS = 2.0
_UPLOADS_OF_A_KEY = 2
_DESCRIPTION = """Turns Hugging Face language models into packed INT4 checkpoints.

Every call under `/v1` needs an API key. Every error is an `application/problem+json` document of a documented type.
"""


def create_app(settings: ServiceSettings) -> FastAPI:
    """Build the application. Nothing is connected before it starts, and it starts also when a part is down."""
    service = build_context(settings)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        is_ready = await anyio.to_thread.run_sync(prepare, service)
        retry = None if is_ready else asyncio.create_task(_prepare_later(service))
        housekeeper = asyncio.create_task(keep_house(service))
        service.webhook_sender = sender = asyncio.create_task(_send_webhooks(service))
        yield
        service.stopping.set()
        if retry is not None:
            await retry
        await housekeeper
        # What is cut off here is sent again by the next process.
        await asyncio.wait({sender}, timeout=_LAST_SECONDS)
        sender.cancel()
        service.storage.close()
        service.engine.dispose()
        # Here and not after the server: uvicorn ends the process by the signal that stopped it.
        await anyio.to_thread.run_sync(tracing.flush)

    app = FastAPI(
        title="duquant",
        version=version("duquant"),
        description=_DESCRIPTION,
        lifespan=lifespan,
        # The bundled pages load scripts from elsewhere, which our content policy forbids.
        docs_url=None,
        redoc_url=None,
        openapi_url=None,  # ours is in routers/health.py
        # A path with a slash too many is another path, and a redirect would be built from the Host header.
        redirect_slashes=False,
        telemetry={
            # Asked of each request; what is not set up anyway need not be.
            "tracing": settings.otel_endpoint is not None,
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "exclude": lambda scope: scope["path"].startswith(QUIET_PATHS),
        },
    )
    app.state.context = service
    for resource in ROUTERS:
        app.include_router(resource.router)
    app.mount("/static", StaticFiles(directory=_HERE / "static"), name="static")
    errors.install(app)
    app.add_middleware(HeadAsGet)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes, larger={"/v1/texts": settings.max_text_bytes})
    app.add_middleware(RequestContext)
    described = [resource.router for resource in ROUTERS]
    app.state.routes = [route for router in described for route in router.routes if isinstance(route, APIRoute)]
    app.state.description = Description(app, described)
    app.openapi = app.state.description.as_dict  # type: ignore[method-assign]  # FastAPI's way to extend it
    return app


def build_context(settings: ServiceSettings) -> Context:
    """Build what the endpoints work with."""
    engine = make_engine(settings.database_url)
    job_store = JobStore(engine)
    models = ModelCatalog.from_settings(settings)
    pages = Jinja2Templates(directory=_HERE / "templates")
    pages.env.filters.update(filters())
    rate = settings.rate_limit_per_second
    storage = ObjectStore.from_settings(settings, public_endpoint=settings.s3_public_endpoint)
    return Context(
        settings=settings,
        engine=engine,
        jobs=job_store,
        search=JobSearch(engine),
        keys=KeyStore(engine, settings.key_pepper),
        known_keys=KnownKeys(settings.key_memory_seconds),
        tenants=TenantStore(engine),
        webhooks=WebhookStore(engine, settings.key_pepper),
        webhook_policy=AddressPolicy(settings.webhook_networks),
        queue_metrics=QueueMetrics(engine),
        idempotency=IdempotencyStore(engine, lifetime_ms=settings.idempotency_hours * 3_600_000),
        artifacts=ArtifactStore(engine),
        evaluations=EvaluationStore(engine),
        batches=BatchStore(engine, job_store),
        queues=QueueStore(engine),
        usage=UsageStore(engine),
        history=History(engine),
        models=models,
        shelf=ModelShelf(settings.model_roots, models),
        texts=TextStore(engine, storage),
        storage=storage,
        pages=pages,
        streams=OpenStreams(settings.max_event_streams),
        uploads=OpenStreams(_UPLOADS_OF_A_KEY),
        limits=RateLimiter(rate, settings.rate_limit_burst) if rate else None,
    )


def prepare(service: Context) -> bool:
    """Bring the database up to date, make the bucket and the bootstrap key; return whether all of it worked."""
    parts = {
        "database": lambda: migrate.upgrade_engine(service.engine),
        "bootstrap_key": lambda: _make_bootstrap_key(service),
        "storage": service.storage.ensure_bucket,
    }
    failed = []
    for part, make in parts.items():
        try:
            make()
        except InfraError as error:
            failed.append(part)
            log.warning("part_not_ready", part=part, error=str(error))
    return not failed


async def _prepare_later(service: Context) -> None:
    """Try again until all parts are there: a service that starts before its database must not need a restart."""
    while not service.stopping.is_set():
        try:
            async with asyncio.timeout(_RETRY_SECONDS):
                await service.stopping.wait()
        except TimeoutError:
            if await anyio.to_thread.run_sync(prepare, service):
                return


async def _send_webhooks(service: Context) -> None:
    """Send webhooks until the service stops."""
    async with GuardedTransport(service.webhook_policy) as transport:
        try:
            await WebhookSender(service.webhooks, transport).run(service.stopping)
        except Exception:
            # /readyz tells that it is gone; nobody else would notice before the service stops.
            log.exception("webhook_sender_died")
            raise


def _make_bootstrap_key(service: Context) -> None:
    if service.settings.bootstrap_key is None:
        return
    token = service.settings.bootstrap_key.get_secret_value()
    known = service.keys.authenticate(token)
    if known is None or known.scopes != set(SCOPES):
        # A newer version may know scopes that the key was made without.
        try:
            service.keys.create(DEFAULT_TENANT, "bootstrap", SCOPES, token=token, actor="service")
        except KeyConflict as error:
            # Somebody revoked it, and meant it: the service works without.
            log.warning("bootstrap_key_refused", error=str(error))
        else:
            service.known_keys.forget()
            log.info("bootstrap_key_created", tenant=DEFAULT_TENANT)
