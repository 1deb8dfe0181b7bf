"""A check of our own for schemathesis: what the description allows is not refused for its form."""

import schemathesis
from schemathesis.core.failures import Failure
from schemathesis.generation import GenerationMode

DECIDED_LATER = {"/If-Match", "/cursor", "/since", "/deadline_at", "/expires_at", "/queue", ""}
"""Fields whose rules a schema cannot say: an ETag or cursor of an earlier answer, times to come, one of two."""
RULES_IN_WORDS = ("/recipe", "/calibration", "/evaluate", "/text", "/perplexity", "/tasks", "/speed")
"""Recipes, texts and plans, which check themselves: their rules stand in the descriptions of the fields."""


schemathesis.serializer.alias("application/x-ndjson", "text/plain")


@schemathesis.check
def requests_as_described_are_well_formed(ctx, response, case):
    """Take a 400 or 422 for a described request only when it says that something is not there or not allowed."""
    if case.meta is None or case.meta.generation.mode is not GenerationMode.POSITIVE:
        return
    if response.status_code not in (400, 422):
        return
    problem = response.json()
    name = problem["type"].rpartition(":")[2]
    # JSON Schema counts 2.0 among the integers; this API does not, so that what was sent is what is shown.
    errors = [error for error in problem["errors"] if "valid integer" not in error["detail"]]
    if problem["errors"] and not errors:
        return
    pointers = {error["pointer"] for error in errors}
    unexpected = {each for each in pointers - DECIDED_LATER if not each.startswith(RULES_IN_WORDS)}
    if name in ("malformed-request", "validation-failed") and (unexpected or not pointers):
        raise Failure(
            operation=case.operation.label, title="A described request was refused", message=problem["detail"]
        )
