"""Sends what waits in the outbox, signed as Standard Webhooks say (https://www.standardwebhooks.com)."""

import asyncio
import json
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import httpx
import structlog
from prometheus_client import Counter
from standardwebhooks.webhooks import Webhook as Signer

from infra.errors import InfraError, WebhookForbidden
from infra.metrics import REGISTRY
from infra.webhooks.addresses import GuardedTransport
from infra.webhooks.store import Outgoing, WebhookStore

log = structlog.stdlib.get_logger(__name__)

DELIVERIES = Counter(
    "duquant_webhook_attempts",
    "Attempts to deliver a webhook: delivered, retried, given_up",
    ["outcome"],
    registry=REGISTRY,
)

RETRY_SECONDS = (5, 30, 300, 1800, 7200, 6 * 3600, 14 * 3600)
"""Pauses after each failed attempt: the eighth comes about a day after the first."""
DISABLE_AFTER_S = 3 * 86_400
"""A webhook that has only failed for this long is switched off."""
KEEP_S = 30 * 86_400
"""How long the log of deliveries goes back."""

_SEND_S = 10.0
_LEASE_S = 60.0
_AT_ONCE = 16
_POLL_S = 1.0
_PRUNE_EVERY_S = 3600.0
_MAX_RETRY_AFTER_S = 86_400
_GONE = 410


class WebhookSender:
    """Claims messages and sends them until told to stop. Several may run, in one process or many."""

    def __init__(
        self,
        store: WebhookStore,
        transport: GuardedTransport,
        *,
        clock: Callable[[], float] = time.time,
        send_seconds: float = _SEND_S,
    ) -> None:
        self._store = store
        self._transport = transport
        self._clock = clock
        self._send_seconds = send_seconds
        self._prune_at = 0.0

    async def run(self, stopping: asyncio.Event) -> None:
        """Send what is due, again and again. Database trouble is waited out."""
        while not stopping.is_set():
            try:
                sent = await self.turn()
            except InfraError as error:
                log.warning("webhook_outbox_unreachable", error=str(error))
                sent = 0
            if not sent:
                # A little jitter keeps the processes that share an outbox from asking in step.
                await _wait(stopping, _POLL_S * random.uniform(0.8, 1.2))  # noqa: S311  no secret

    async def turn(self) -> int:
        """Send what is due now, all at once; return how many messages that was.

        Raises:
            InfraError: the database does not answer.
        """
        claimed = await asyncio.to_thread(self._store.claim, limit=_AT_ONCE, lease_seconds=_LEASE_S)
        await asyncio.gather(*(self._deliver(outgoing) for outgoing in claimed))
        if self._clock() >= self._prune_at:
            self._prune_at = self._clock() + _PRUNE_EVERY_S
            await asyncio.to_thread(self._store.prune, older_than_seconds=KEEP_S)
        return len(claimed)

    async def _deliver(self, outgoing: Outgoing) -> None:
        facts = {"delivery_id": outgoing.delivery.id, "webhook_id": outgoing.delivery.webhook_id}
        try:
            status, retry_after, error = await self._post(outgoing)
            if error is None:
                await asyncio.to_thread(self._store.delivered, outgoing, status or 0)
                DELIVERIES.labels("delivered").inc()
                log.info("webhook_delivered", status=status, job_id=outgoing.delivery.job_id, **facts)
                return
            pause = _pause(outgoing.delivery.attempt, retry_after)
            is_gone = status == _GONE
            is_off = await asyncio.to_thread(
                self._store.failed,
                outgoing,
                status=status,
                error=error,
                retry_in_seconds=None if is_gone else pause,
                disable_after_seconds=0 if is_gone else DISABLE_AFTER_S,
            )
            DELIVERIES.labels("given_up" if is_gone or pause is None else "retried").inc()
            log.warning("webhook_failed", status=status, error=error, switched_off=is_off, **facts)
        except InfraError as error:
            # The verdict is lost; the lease runs out and the message is sent again.
            log.warning("webhook_verdict_not_written", error=str(error), **facts)

    async def _post(self, outgoing: Outgoing) -> tuple[int | None, str | None, str | None]:
        """Return the receiver's status, its Retry-After, and what was wrong, if anything."""
        body = _body(outgoing)
        try:
            async with asyncio.timeout(self._send_seconds):
                request = httpx.Request("POST", outgoing.url, content=body, headers=self._headers(outgoing, body))
                answer = await self._transport.handle_async_request(request)
                # What it says beyond the status is not read: nobody needs it, and it may be endless.
                await answer.aclose()
        except TimeoutError:
            return None, None, f"no answer within {self._send_seconds:g} s"
        except WebhookForbidden as error:
            return None, None, str(error)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return None, None, str(error) or type(error).__name__
        status = answer.status_code
        if answer.is_success:
            return status, None, None
        wrong = "redirects are not followed" if answer.is_redirect else f"answered {status}"
        return status, answer.headers.get("retry-after"), wrong

    def _headers(self, outgoing: Outgoing, body: str) -> dict[str, str]:
        now = datetime.fromtimestamp(self._clock(), UTC)
        message_id = outgoing.delivery.id
        signatures = [
            Signer(secret.get_secret_value()).sign(message_id, now, body) for secret in outgoing.signing_secrets
        ]
        return {
            "Content-Type": "application/json",
            "User-Agent": f"duquant-webhooks/{version('duquant')}",
            "webhook-id": message_id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": " ".join(signatures),
        }


def _body(outgoing: Outgoing) -> str:
    """Write a message; moments are RFC 3339, as everywhere in the API."""
    facts: dict[str, Any] = outgoing.payload["data"]
    data = {
        name: _moment(value) if name.endswith("_at") and isinstance(value, int) else value
        for name, value in facts.items()
    }
    message = {"type": outgoing.delivery.event, "timestamp": _moment(outgoing.delivery.created_at), "data": data}
    return json.dumps(message, separators=(",", ":"))


def _moment(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _pause(attempt: int, retry_after: str | None) -> float | None:
    """Return the seconds until the next attempt, with jitter; none when there shall be none.

    >>> _pause(8, None) is None
    True
    >>> 24 <= _pause(2, None) <= 36, _pause(1, "600"), _pause(1, "Wed, 21 Oct 2015 07:28:00 GMT") <= 6
    (True, 600.0, True)
    """
    if attempt > len(RETRY_SECONDS):
        return None
    pause = RETRY_SECONDS[attempt - 1] * random.uniform(0.8, 1.2)  # noqa: S311  spreads load, guards nothing
    asked = int(retry_after) if retry_after is not None and retry_after.isdecimal() and len(retry_after) < 9 else 0
    return float(max(pause, min(asked, _MAX_RETRY_AFTER_S)))


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return
