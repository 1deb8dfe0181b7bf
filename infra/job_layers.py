"""The layers of a job: the unit of resume. A finished layer's row is the commit point of its object in storage."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, insert, select, update

from infra.database import read, write
from infra.errors import JobConflict
from infra.job_model import Claim, EventType, LayerRow
from infra.job_results import UNKNOWN_DEVICE, charge_usage
from infra.job_rows import JobRows, clean
from infra.schema import job_layers


class JobLayers(JobRows):
    """Fenced writes to the layers of a claimed job."""

    def plan(self, claim: Claim, layers: Sequence[int]) -> list[LayerRow]:
        """Make sure that each of `layers` has a row; return all rows of the job in order.

        Rows that an earlier claim left unfinished are pending again, with their count of attempts.

        Raises:
            LeaseLost: the claim is stale.
        """
        job_id = claim.job.id
        with write(self._engine) as connection:
            self._held(connection, claim)
            connection.execute(
                update(job_layers)
                .where(job_layers.c.job_id == job_id, job_layers.c.state != "done", job_layers.c.fence < claim.fence)
                .values(state="pending", node=None, started_at=None, finished_at=None)
            )
            known = {row.layer for row in self._layer_rows(connection, job_id)}
            missing = [layer for layer in dict.fromkeys(layers) if layer not in known]
            if missing:
                rows = [
                    {"job_id": job_id, "layer": layer, "state": "pending", "attempt": 0, "fence": 0, "metrics": {}}
                    for layer in missing
                ]
                connection.execute(insert(job_layers), rows)
            rows_now = self._layer_rows(connection, job_id)
            done = sum(row.state == "done" for row in rows_now)
            self._event(connection, job_id, EventType.PLANNED, claim.owner, {"layers": len(rows_now), "done": done})
            return rows_now

    def start_layer(self, claim: Claim, layer: int, node: str) -> LayerRow:
        """Count one more attempt at a layer; return the row, whose fence and attempt belong into the object's key.

        Raises:
            LeaseLost: the claim is stale.
            JobConflict: the layer was not planned, or is done.
        """
        changes = {"state": "running", "fence": claim.fence, "node": node, "detail": None, "finished_at": None}
        with write(self._engine) as connection:
            self._held(connection, claim)
            statement = (
                update(job_layers)
                .where(job_layers.c.job_id == claim.job.id, job_layers.c.layer == layer, job_layers.c.state != "done")
                .values(attempt=job_layers.c.attempt + 1, started_at=self._now(), **changes)
                .returning(job_layers)
            )
            row = connection.execute(statement).mappings().one_or_none()
            if row is None:
                raise JobConflict(f"layer {layer} of {claim.job.id} is not planned, or done", layer=layer)
            started = LayerRow.from_row(row)
            data = {"layer": layer, "attempt": started.attempt, "node": node}
            self._event(connection, claim.job.id, EventType.LAYER_STARTED, claim.owner, data)
            return started

    def commit_layer(self, claim: Claim, row: LayerRow, *, device: str = UNKNOWN_DEVICE) -> LayerRow:
        """Record a finished layer whose object is stored, and bill its time. Committing the same again changes nothing.

        Args:
            claim: The claim that the layer was started under.
            row: What `start_layer` returned, with key, sha256, size_bytes, metrics and seconds filled in.
            device: What it ran on, for the bill.

        Raises:
            LeaseLost: the claim is stale.
            JobConflict: this attempt is not the layer's latest, or the layer is done with other bytes.
        """
        with write(self._engine) as connection:
            job = self._held(connection, claim)
            current = self._layer_row(connection, claim, row.layer)
            if current.state == "done" and current.sha256 == row.sha256:
                return current
            done = self._finish(
                connection,
                claim,
                row,
                state="done",
                key=row.key,
                sha256=row.sha256,
                size_bytes=row.size_bytes,
                metrics=row.metrics,
                seconds=row.seconds,
                node=row.node,
            )
            fence, seconds, now = claim.fence, row.seconds or 0.0, self._now()
            charge_usage(connection, job, layer=row.layer, fence=fence, seconds=seconds, device=device, now=now)
            # Numbers only: what a shard is made of is a long list, and in the layer's row.
            numbers = {name: value for name, value in row.metrics.items() if isinstance(value, int | float)}
            data = {"layer": row.layer, "attempt": row.attempt, "seconds": row.seconds, "metrics": numbers}
            self._event(connection, claim.job.id, EventType.LAYER_DONE, claim.owner, data)
            return done

    def charge(self, claim: Claim, *, slot: int, seconds: float, device: str = UNKNOWN_DEVICE) -> None:
        """Bill work that commits no layer. `slot` is a number that this claim has billed nothing under yet.

        Raises:
            LeaseLost: the claim is stale.
        """
        with write(self._engine) as connection:
            job = self._held(connection, claim)
            charge_usage(
                connection, job, layer=slot, fence=claim.fence, seconds=seconds, device=device, now=self._now()
            )

    def fail_layer(self, claim: Claim, layer: int, detail: str) -> LayerRow:
        """Record that the latest attempt at a layer failed; it may be started again.

        Raises:
            LeaseLost: the claim is stale.
            JobConflict: the layer is not running under this claim.
        """
        with write(self._engine) as connection:
            self._held(connection, claim)
            row = self._layer_row(connection, claim, layer)
            failed = self._finish(connection, claim, row, state="failed", detail=clean(detail))
            data = {"layer": layer, "attempt": row.attempt, "detail": failed.detail}
            self._event(connection, claim.job.id, EventType.LAYER_FAILED, claim.owner, data)
            return failed

    def reopen_layer(self, claim: Claim, layer: int, detail: str) -> LayerRow:
        """Undo a commit whose object turned out to be missing or damaged, so that the layer is done again.

        Raises:
            LeaseLost: the claim is stale.
            JobConflict: the layer is not done.
        """
        with write(self._engine) as connection:
            self._held(connection, claim)
            statement = (
                update(job_layers)
                .where(job_layers.c.job_id == claim.job.id, job_layers.c.layer == layer, job_layers.c.state == "done")
                .values(state="pending", detail=clean(detail), key=None, sha256=None, size_bytes=None, finished_at=None)
                .returning(job_layers)
            )
            row = connection.execute(statement).mappings().one_or_none()
            if row is None:
                raise JobConflict(f"layer {layer} of {claim.job.id} is not done", layer=layer)
            data = {"layer": layer, "detail": row["detail"]}
            self._event(connection, claim.job.id, EventType.LAYER_REOPENED, claim.owner, data)
            return LayerRow.from_row(row)

    def layers(self, job_id: str) -> list[LayerRow]:
        """Return the layers of a job in order; empty until a worker has planned them."""
        with read(self._engine) as connection:
            return self._layer_rows(connection, job_id)

    def _finish(self, connection: Connection, claim: Claim, row: LayerRow, **changes: Any) -> LayerRow:
        statement = (
            update(job_layers)
            .where(job_layers.c.job_id == claim.job.id, job_layers.c.layer == row.layer)
            .where(job_layers.c.state == "running", job_layers.c.fence == claim.fence)
            .where(job_layers.c.attempt == row.attempt)
            .values(finished_at=self._now(), **changes)
            .returning(job_layers)
        )
        finished = connection.execute(statement).mappings().one_or_none()
        if finished is None:
            raise JobConflict(
                f"attempt {row.attempt} at layer {row.layer} of {claim.job.id} is not the running one",
                layer=row.layer,
                attempt=row.attempt,
            )
        return LayerRow.from_row(finished)

    def _layer_row(self, connection: Connection, claim: Claim, layer: int) -> LayerRow:
        query = select(job_layers).where(job_layers.c.job_id == claim.job.id, job_layers.c.layer == layer)
        row = connection.execute(query).mappings().one_or_none()
        if row is None:
            raise JobConflict(f"layer {layer} of {claim.job.id} is not planned", layer=layer)
        return LayerRow.from_row(row)

    def _layer_rows(self, connection: Connection, job_id: str) -> list[LayerRow]:
        query = select(job_layers).where(job_layers.c.job_id == job_id).order_by(job_layers.c.layer)
        return [LayerRow.from_row(row) for row in connection.execute(query).mappings()]
