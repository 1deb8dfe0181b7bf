"""Every problem the API can answer with. The errors page of the documentation is generated from this table."""

from typing import NamedTuple


class ProblemKind(NamedTuple):
    """What is the same for every problem of one type."""

    status: int
    title: str
    when: str
    """What brings it about."""
    remedy: str
    """What the caller should do."""


CATALOGUE: dict[str, ProblemKind] = {
    "malformed-request": ProblemKind(
        400, "The request could not be read", "the body is no JSON, or a header cannot be read", "mend the request"
    ),
    "idempotency-key-required": ProblemKind(
        400,
        "This call needs an Idempotency-Key",
        "a batch came without the header that makes sending it again safe",
        "send `Idempotency-Key` with a fresh UUID, and the same one when trying again",
    ),
    "unauthorized": ProblemKind(
        401,
        "The API key is missing or not valid",
        "no key, or one that is misspelt, revoked or expired",
        "send `Authorization: Bearer dq_live_...`",
    ),
    "missing-scope": ProblemKind(
        403,
        "The API key does not allow this",
        "the key is valid and does not allow this",
        "use a key with the scope that `detail` names",
    ),
    "cross-site-request": ProblemKind(
        403,
        "The request came from another site",
        "a dashboard form came from another site",
        "use the dashboard's own pages",
    ),
    "not-found": ProblemKind(404, "There is nothing here", "no such path", "see `/openapi.json`"),
    "job-not-found": ProblemKind(
        404, "There is no such job", "no such job, or it is another project's", "check the id"
    ),
    "queue-not-found": ProblemKind(404, "There is no such queue", "no queue has this name", "see `GET /v1/queues`"),
    "artifact-not-found": ProblemKind(
        404, "There is no such artifact", "no such artifact, or it is another project's or deleted", "check the id"
    ),
    "evaluation-not-found": ProblemKind(
        404,
        "There is no such evaluation",
        "no such evaluation, or it is another project's, or its job has measured nothing yet",
        "check the id, or read the job",
    ),
    "batch-not-found": ProblemKind(
        404, "There is no such batch", "no such batch, or it is another project's", "check the id"
    ),
    "text-unknown": ProblemKind(
        404, "There is no such text", "no uploaded text has this id, or it is another project's", "check the id"
    ),
    "key-not-found": ProblemKind(
        404, "There is no such API key", "no such key, or it is another project's", "check the id"
    ),
    "tenant-not-found": ProblemKind(404, "There is no such project", "no project has this id", "see `GET /v1/tenants`"),
    "webhook-not-found": ProblemKind(
        404, "There is no such webhook", "no such webhook or delivery, or it is another project's", "check the id"
    ),
    "method-not-allowed": ProblemKind(
        405,
        "This method is not allowed here",
        "the path exists, not with this method",
        "see the `Allow` header",
    ),
    "job-conflict": ProblemKind(
        409,
        "The job's state does not allow this",
        "the job's state does not allow this, such as cancelling a finished one or joining one that is being cancelled",
        "read the job",
    ),
    "dependency-failed": ProblemKind(
        409,
        "A job that this one depends on has not succeeded",
        "a job in `depends_on` has failed or was cancelled, so this one would never start",
        "retry that job first",
    ),
    "artifact-not-ready": ProblemKind(
        409,
        "The job has no artifact",
        "the job has not succeeded, or its artifact was deleted",
        "wait, or submit again with `force`",
    ),
    "artifact-conflict": ProblemKind(
        409,
        "The artifact is in use",
        "it has tags, or a job that has not ended needs it",
        "take the tags away or use `force`; wait for the job, or cancel it",
    ),
    "report-not-ready": ProblemKind(
        409,
        "The evaluation has no report",
        "not all of its parts have been measured",
        "wait for its job; one that failed says which part did",
    ),
    "text-conflict": ProblemKind(
        409,
        "The text is in use",
        "a job that has not ended reads the text",
        "wait for the job, or cancel it",
    ),
    "queue-conflict": ProblemKind(
        409,
        "The queue cannot be deleted",
        "a job of the queue, of any project, has not ended; or it is the default queue",
        "wait for its jobs, or cancel them; the default queue stays",
    ),
    "key-conflict": ProblemKind(
        409, "The API key's state does not allow this", "a revoked or expired key cannot be rotated", "make a new key"
    ),
    "tenant-exists": ProblemKind(409, "There is such a project already", "the id is taken", "choose another id"),
    "precondition-failed": ProblemKind(
        412,
        "It has changed since it was read",
        "`If-Match` names another version than the present one, or `If-None-Match: *` came for what is there already",
        "read it again and decide anew",
    ),
    "body-too-large": ProblemKind(
        413,
        "The request body is too large",
        "the body is over `DUQUANT_MAX_BODY_BYTES`, a text over `DUQUANT_MAX_TEXT_BYTES`",
        "send less",
    ),
    "unsupported-media-type": ProblemKind(
        415,
        "The body is of a kind that this call does not take",
        "the body is not `application/json`, or for a text not `text/plain` or `application/x-ndjson`",
        "set `Content-Type`",
    ),
    "validation-failed": ProblemKind(
        422,
        "A field has a value that is not allowed",
        "a field is unknown, missing, of the wrong type or out of range",
        "see `errors`",
    ),
    "model-forbidden": ProblemKind(
        422,
        "This model may not be used",
        "the model lies outside the model roots, has only pickled weights, or the hub is off",
        "use an allowed model",
    ),
    "model-not-found": ProblemKind(
        422,
        "The model was not found",
        "there is no such model, or it has no `config.json` or safetensors",
        "check the name",
    ),
    "text-forbidden": ProblemKind(
        422,
        "This calibration text may not be used",
        "the text file lies outside the text roots, or the source is switched off",
        "use an allowed text",
    ),
    "text-not-found": ProblemKind(
        422, "The calibration text was not found", "there is no such text file or object", "check the name"
    ),
    "dependency-not-found": ProblemKind(
        422,
        "A job to depend on was not found",
        "a job in `depends_on` does not exist, or is another project's",
        "check the ids",
    ),
    "idempotency-key-reused": ProblemKind(
        422,
        "This Idempotency-Key was used for another request",
        "the same key came with another body or to another path",
        "use a fresh key for another request",
    ),
    "webhook-forbidden": ProblemKind(
        422,
        "Webhooks may not be sent to this address",
        "the URL is not https, or leads to an address that is not public",
        "use an https URL of a public server, or have the operator open its network (`DUQUANT_WEBHOOK_NETWORKS`)",
    ),
    "rate-limited": ProblemKind(
        429,
        "Too many requests with this key",
        "the key sent more requests than its rate limit allows",
        "wait for `Retry-After`; the `RateLimit` header says how much is left",
    ),
    "too-many-streams": ProblemKind(
        429,
        "Too many open streams with this key",
        "the key has as many event streams (`DUQUANT_MAX_EVENT_STREAMS`) or uploads open as it may",
        "close one, or wait for one; poll the job with `Prefer: wait`",
    ),
    "quota-exceeded": ProblemKind(
        429,
        "A quota of the project is used up",
        "the project has as many waiting jobs, bytes, texts, keys or webhooks as it may, or the server as many queues",
        "wait for jobs to end, delete what is not needed, or ask for a larger quota; `GET /v1/quota` shows them",
    ),
    "internal-error": ProblemKind(
        500, "Something went wrong on the server", "a fault of ours", "report it with the `request_id`"
    ),
    "service-unavailable": ProblemKind(
        503,
        "A part of the service is down",
        "the database or the object store does not answer",
        "try again after `Retry-After`; `/readyz` names it",
    ),
}
"""Problem name to what is known of it."""
