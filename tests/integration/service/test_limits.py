"""Rate limits over HTTP."""

import time
from typing import Any

import httpx
import pytest

from service.limits import RateLimiter

pytestmark = pytest.mark.integration


def test_a_key_that_asks_too_often_is_told_when_to_come_back(service: Any) -> None:
    other = service.key("jobs:read")
    first = service.http.get("/v1/jobs")
    assert first.headers["RateLimit-Policy"].startswith('"key";q=1000;')
    service.app.state.context.limits = RateLimiter(1.0, 3)
    answers = [service.http.get("/v1/jobs") for _ in range(5)]
    assert [answer.status_code for answer in answers][:3] == [200, 200, 200]
    refused = answers[-1]
    assert (refused.status_code, refused.json()["type"]) == (429, "urn:duquant:problem:rate-limited")
    assert refused.headers["RateLimit"].startswith('"key";r=0;')
    # Another key has a limit of its own, and what needs no key has none.
    with httpx.Client(base_url=service.url, headers={"Authorization": f"Bearer {other}"}) as http:
        assert http.get("/v1/jobs").status_code == 200
    assert service.http.get("/healthz").status_code == 200
    time.sleep(int(refused.headers["Retry-After"]))
    assert service.http.get("/v1/jobs").status_code == 200


def test_a_stream_carries_the_limit_as_well(service: Any) -> None:
    job = service.finished_job(layers=1)
    with service.http.stream("GET", f"/v1/jobs/{job.id}/events") as answer:
        assert answer.headers["RateLimit"].startswith('"key";r=')
