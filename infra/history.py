"""What past jobs took: how long they ran and how large their artifacts became. Estimates are made from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine, case, func, select

from infra.database import read
from infra.job_model import JobState
from infra.job_rows import state_is
from infra.schema import artifacts, job_layers, jobs

_MOST = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class PastJob:
    """A quantization that succeeded."""

    recipe: dict[str, Any]
    model_name: str
    seconds: float
    """From its first start to its end, pauses between tries included."""
    gpu_seconds: float
    size_bytes: int
    layers: int
    layer_seconds: float
    """All decoder layers together, one after the other."""
    layer_bytes: int


class History:
    """Reads what has been done."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def quantizations(
        self, tenant_id: str, *, model_name: str | None = None, recipe_name: str | None = None
    ) -> Sequence[PastJob]:
        """Return a tenant's latest successful quantizations of a model, with a recipe of this name, or both."""
        query = (
            select(
                jobs.c.id,
                jobs.c.spec,
                jobs.c.model_name,
                (jobs.c.finished_at - jobs.c.started_at).label("ms"),
                jobs.c.gpu_ms,
                artifacts.c.size_bytes,
            )
            .join(artifacts, artifacts.c.job_id == jobs.c.id)
            .where(jobs.c.tenant_id == tenant_id, state_is(JobState.SUCCEEDED), jobs.c.kind == "quantize")
            .order_by(jobs.c.created_at.desc(), jobs.c.id.desc())
            .limit(_MOST)
        )
        if model_name is not None:
            query = query.where(jobs.c.model_name == model_name)
        if recipe_name is not None:
            query = query.where(jobs.c.recipe_name == recipe_name)
        latest = query.subquery()
        is_decoder_layer = job_layers.c.layer >= 0
        with_layers = (
            select(
                latest,
                func.count(case((is_decoder_layer, 1))).label("layers"),
                func.coalesce(func.sum(case((is_decoder_layer, job_layers.c.seconds))), 0).label("layer_seconds"),
                func.coalesce(func.sum(case((is_decoder_layer, job_layers.c.size_bytes))), 0).label("layer_bytes"),
            )
            .select_from(latest.outerjoin(job_layers, job_layers.c.job_id == latest.c.id))
            .group_by(*latest.c)
        )
        with read(self._engine) as connection:
            rows = connection.execute(with_layers).mappings().all()
        return [
            PastJob(
                recipe=row["spec"].get("recipe", {}),
                model_name=row["model_name"],
                seconds=row["ms"] / 1000,
                gpu_seconds=row["gpu_ms"] / 1000,
                size_bytes=row["size_bytes"],
                layers=row["layers"],
                layer_seconds=float(row["layer_seconds"]),
                layer_bytes=int(row["layer_bytes"]),
            )
            for row in rows
        ]
