"""Lists of batches by what people look for. A batch's state is what its jobs say, here as in `infra.batch_progress`."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, case, exists, literal_column, or_

from infra.batch_progress import BatchState
from infra.job_model import JobState
from infra.job_rows import state_is
from infra.listing import between
from infra.schema import batch_items, batches, jobs


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchFilter:
    """What a listed batch must be; what is left out does not matter. Times are milliseconds since 1970."""

    states: Sequence[BatchState] = ()
    """It is in one of these."""
    name: str | None = None
    model_name: str | None = None
    """It has work on the model of this name; with `recipe_name`, on this model with that recipe."""
    recipe_name: str | None = None
    created_from: int | None = None
    created_until: int | None = None
    """It is older than this."""

    def conditions(self) -> list[ColumnElement[bool]]:
        """Return what a row of the batches table must fulfil: what costs a look at its items comes last."""
        found: list[ColumnElement[bool]] = []
        if self.name is not None:
            found.append(batches.c.name == self.name)
        found += between(batches.c.created_at, self.created_from, self.created_until)
        work = [
            batch_items.c[name] == value
            for name in ("model_name", "recipe_name")
            if (value := getattr(self, name)) is not None
        ]
        if work:
            found.append(_has_item(*work))
        if self.states:
            found.append(_STATE.in_(self.states))
        return found


def _has_item(*conditions: ColumnElement[bool]) -> ColumnElement[bool]:
    return exists().where(batch_items.c.batch_id == batches.c.id, *conditions).correlate(batches)


def _has_job(condition: ColumnElement[bool]) -> ColumnElement[bool]:
    return _has_item(jobs.c.id == batch_items.c.job_id, condition)


_succeeded = _has_job(state_is(JobState.SUCCEEDED))
# What was refused counts as failed. Without a reason it is work whose job has been forgotten, and counts for nothing.
_failed = or_(
    _has_job(state_is(JobState.FAILED)),
    _has_item(batch_items.c.job_id.is_(None), batch_items.c.detail.is_not(None)),
)
_cancelled = _has_job(state_is(JobState.CANCELLED))


def _is(state: BatchState) -> ColumnElement[str]:
    return literal_column(f"'{state}'")


_STATE = case(
    (_has_job(jobs.c.finished_at.is_(None)), _is("running")),
    (and_(~_failed, ~_cancelled), _is("succeeded")),
    (_succeeded, _is("partial")),
    (_failed, _is("failed")),
    else_=_is("cancelled"),
)
"""As `BatchProgress.state`."""
