"""Reports on evaluations: a page of HTML with tables and plots, in object storage."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog

from duquant.errors import DuQuantError
from infra.artifact_keys import report_key
from infra.jobs import Claim
from infra.storage import ObjectStore

log = structlog.stdlib.get_logger(__name__)

UNQUANTIZED = "unquantized"


def put_report(
    storage: ObjectStore,
    claim: Claim,
    metrics: Mapping[str, Any],
    *,
    work_dir: Path,
    is_baseline: bool,
    baseline: Mapping[str, Any] | None = None,
) -> str | None:
    """Store a report on what a claim has measured; return its key, or none where no report can be made here.

    The numbers are worth more than the page about them: without the libraries for plots there is none.

    Args:
        storage: Where it goes.
        claim: Of the job that measured.
        metrics: What was measured.
        work_dir: Where its files are made.
        is_baseline: Whether it was measured on the unquantized model.
        baseline: The same of the unquantized model, where it is known.
    """
    job = claim.job
    name = UNQUANTIZED if is_baseline else job.recipe_name or "artifact"
    measured = {name: metrics}
    if baseline is not None and not is_baseline:
        measured = {UNQUANTIZED: baseline, **measured}
    key = report_key(job.tenant_id, job.id, f"{claim.fence}-{'baseline' if is_baseline else 'measured'}.html")
    with tempfile.TemporaryDirectory(prefix="report-", dir=work_dir) as folder:
        try:
            from duquant.evaluation.report import write_report

            page, *_ = write_report(
                Path(folder),
                measured,
                baseline=UNQUANTIZED if UNQUANTIZED in measured else None,
                title=f"{job.model_name}, {name}",
            )
        except DuQuantError as error:
            log.warning("report_not_made", error=str(error))
            return None
        storage.put_file(key, page)
    return key
