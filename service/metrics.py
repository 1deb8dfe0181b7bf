"""What the API process counts."""

from prometheus_client import Counter, Gauge, Histogram

from infra.metrics import REGISTRY

REQUESTS = Counter("duquant_http_requests", "Answered requests", ["method", "route", "status"], registry=REGISTRY)
REQUEST_SECONDS = Histogram(
    "duquant_http_request_seconds",
    "Time to the end of the answer; event streams are left out",
    ["method", "route"],
    registry=REGISTRY,
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
RATE_LIMITED = Counter("duquant_http_rate_limited", "Requests refused by a key's rate limit", registry=REGISTRY)
STREAMS = Gauge("duquant_http_streams", "Event streams that are open", registry=REGISTRY, multiprocess_mode="livesum")
