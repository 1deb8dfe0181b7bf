"""What a dispatcher counts. The API shows it; see infra.metrics."""

from prometheus_client import Counter, Histogram

from infra.metrics import REGISTRY

CLAIM_SECONDS = Histogram(
    "duquant_claim_seconds",
    "Time to ask the queue for a job, also when there is none",
    registry=REGISTRY,
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5),
)
WAIT_SECONDS = Histogram(
    "duquant_job_wait_seconds",
    "Time from when a job might have run to its first claim",
    registry=REGISTRY,
    buckets=(1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 24 * 3600),
)
LAYER_SECONDS = Histogram(
    "duquant_layer_seconds",
    "Time to quantize a layer",
    registry=REGISTRY,
    buckets=(0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800),
)
STEP_FAILURES = Counter(
    "duquant_step_failures", "Steps of jobs that failed: bad_input, transient, error", ["kind"], registry=REGISTRY
)
ENDINGS = Counter(
    "duquant_claims_ended",
    "How claims of jobs ended: succeeded, failed, retried, cancelled, released, lost",
    ["outcome"],
    registry=REGISTRY,
)
