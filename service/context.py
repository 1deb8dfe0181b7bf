"""The service's object graph, built once in create_app and handed to endpoints."""

import asyncio
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request
from fastapi.templating import Jinja2Templates
from sqlalchemy import Engine

from infra.artifacts import ArtifactStore
from infra.batches import BatchStore
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
from infra.storage import ObjectStore
from infra.tenants import TenantStore
from infra.texts import TextStore
from infra.usage import UsageStore
from infra.webhooks.addresses import AddressPolicy
from infra.webhooks.store import WebhookStore
from service.known_keys import KnownKeys
from service.limits import OpenStreams, RateLimiter, Remembered
from service.schemas.health import Check
from service.settings import ServiceSettings


@dataclass
class Context:
    """What endpoints work with."""

    settings: ServiceSettings
    engine: Engine
    jobs: JobStore
    search: JobSearch
    keys: KeyStore
    known_keys: KnownKeys
    tenants: TenantStore
    webhooks: WebhookStore
    webhook_policy: AddressPolicy
    queue_metrics: QueueMetrics
    idempotency: IdempotencyStore
    artifacts: ArtifactStore
    evaluations: EvaluationStore
    batches: BatchStore
    queues: QueueStore
    usage: UsageStore
    history: History
    models: ModelCatalog
    shelf: ModelShelf
    texts: TextStore
    storage: ObjectStore
    pages: Jinja2Templates
    streams: OpenStreams
    uploads: OpenStreams
    limits: RateLimiter | None = None
    """Counts requests by key; none when the limit is switched off."""
    readiness: Remembered[dict[str, Check]] = field(default_factory=lambda: Remembered(1.0))
    """What /readyz has found a moment ago: anybody may ask, and each asks the database and the object store."""
    webhook_sender: asyncio.Task[None] | None = None
    """Sends webhooks while the service runs."""
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the server shuts down, so that open event streams end."""


def context_of(request: Request) -> Context:
    """Return the object graph of the app that answers a request."""
    service = request.app.state.context
    assert isinstance(service, Context)
    return service


async def _context(request: Request) -> Context:
    # A plain function would be sent to a thread, which costs more than it does.
    return context_of(request)


Service = Annotated[Context, Depends(_context)]
"""The object graph, as endpoints ask for it."""
