"""JobRun: takes one claimed quantize job from plan to manifest, whatever was done before."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from duquant.artifact.layout import MANIFEST
from duquant.artifact.shards import json_bytes
from duquant.config import Recipe
from duquant.errors import DuQuantError
from duquant.models.references import resolve_model
from duquant.pipeline import ModelRun, ShardOutcome, StepId
from infra import tracing
from infra.artifact_keys import ArtifactKeys
from infra.errors import ObjectExists, ObjectNotFound
from infra.jobs import LayerRow
from workers.claimed_run import COLLECT_S, ClaimedRun
from workers.endings import JobFailed, JobStopped
from workers.inputs import find_text, model_reference
from workers.metrics import LAYER_SECONDS
from workers.schedule import Schedule
from workers.tasks import Completion, RunSpec, Task

_FIRST_STEP_SLOT = -1_000_000
"""On the bill, far below the numbers of layers and of the parts of an evaluation."""


class JobRun(ClaimedRun):
    """One claim of one quantize job, layer by layer; every finished layer is committed."""

    def __init__(self, *parts: Any, **more_parts: Any) -> None:
        super().__init__(*parts, **more_parts)
        self._keys = ArtifactKeys(self._claim.job.tenant_id, self._claim.job.id)
        self._rows: dict[int, LayerRow] = {}
        self._attempts: dict[StepId, int] = {}
        self._billed_steps = 0

    def run(self) -> dict[str, Any]:
        """Do every layer that is not done yet and publish; return the job's result."""
        try:
            spec = self._spec()
            run = self._model_run(spec)
        except DuQuantError as err:
            raise JobFailed("bad_input", str(err)) from err
        layers = run.source.layers
        self._store.progress(self._claim, phase="plan", done=0, total=run.quantizations)
        rows = self._store.plan(self._claim, [-1, *range(layers)])
        self._rows = {row.layer: self._checked(row) for row in rows}
        self._reopen_lost(run)
        finished = frozenset(layer for layer, row in self._rows.items() if row.state == "done")
        total = run.quantizations
        self._drive(spec, run, Schedule(run.steps(finished)), total)
        self._store.progress(self._claim, phase="finish", done=total, total=total)
        return self._publish(run)

    def _spec(self) -> RunSpec:
        job, settings = self._claim.job, self._settings
        # The artifact does not know of its gate: with it and without the bytes are the same.
        recipe = replace(Recipe.from_dict(job.spec["recipe"]), quality_gate=None)
        text = find_text(job, recipe.calibration.source, settings, self._storage)
        return RunSpec(
            job_id=job.id,
            model=model_reference(job, settings),
            recipe=recipe.to_dict(),
            work_dir=self._work_dir,
            model_cache=settings.models,
            allow_hub=settings.allow_hub,
            device=settings.device,
            text_key=text.key,
            text_file=text.file,
        )

    def _model_run(self, spec: RunSpec) -> ModelRun:
        path = resolve_model(spec.model, cache=spec.model_cache, allow_hub=spec.allow_hub)
        recipe = Recipe.from_dict(spec.recipe)
        # For looking and for the small files: the dispatcher's machine need not have the workers' device.
        return ModelRun(path, recipe, spec.work_dir, device=torch.device("cpu"))

    def _checked(self, row: LayerRow) -> LayerRow:
        """Return a layer's row, reopened when its object is not what was committed."""
        if row.state != "done":
            return row
        assert row.key is not None
        try:
            info = self._storage.head(row.key)
        except ObjectNotFound:
            return self._store.reopen_layer(self._claim, row.layer, "its object is gone")
        if (info.sha256, info.size_bytes) != (row.sha256, row.size_bytes):
            return self._store.reopen_layer(self._claim, row.layer, "its object has other bytes")
        return row

    def _reopen_lost(self, run: ModelRun) -> None:
        """Reopen the finished layers when those that are left cannot be made to go with them."""
        lost = run.lost
        if lost is None or all(row.state == "done" for row in self._rows.values()):
            return
        for row in self._rows.values():
            if row.state == "done":
                self._rows[row.layer] = self._store.reopen_layer(self._claim, row.layer, lost)

    def _drive(self, spec: RunSpec, run: ModelRun, schedule: Schedule, total: int) -> None:
        """Keep the executor busy until every step is done."""
        while not schedule.is_over:
            if self._must_stop:
                raise JobStopped
            while self._executor.has_room() and (step := schedule.next_ready()) is not None:
                self._executor.submit(self._task(spec, run, step))
                if step.kind == "distill":
                    left = schedule.count_left("draft", "quantize")
                    self._store.progress(self._claim, phase="distill", done=total - left, total=total)
            # What went well is committed first: a failure beside it may end the job.
            for completion in sorted(self._executor.collect(COLLECT_S), key=lambda ended: ended.kind != "ok"):
                step = completion.task.step
                if completion.kind != "ok":
                    self._handle_failure(completion)
                    schedule.retry(step)
                    continue
                if step.kind in ("quantize", "extra"):
                    self._commit(completion, run)
                else:
                    self._bill(completion)
                schedule.finish(step)
                if step.kind in ("draft", "quantize"):
                    left = schedule.count_left("draft", "quantize")
                    self._store.progress(self._claim, phase="layers", done=total - left, total=total)

    def _task(self, spec: RunSpec, run: ModelRun, step: StepId) -> Task:
        attempt = self._attempts[step] = self._attempts.get(step, 0) + 1
        if run.runs_shard(step):
            return Task(spec, step, key=self._rows[step.layer].key, attempt=attempt)
        if step.kind not in ("quantize", "extra"):
            return Task(spec, step, attempt=attempt)
        row = self._rows[step.layer] = self._store.start_layer(self._claim, step.layer, node=self._claim.owner)
        key = self._keys.layer(step.layer, fence=self._claim.fence, attempt=row.attempt)
        return Task(spec, step, key=key, attempt=attempt)

    def _handle_failure(self, completion: Completion[Task]) -> None:
        """Note a failed attempt; raise when there is no point in another."""
        step = completion.task.step
        where = f"layer {step.layer}: " if step.layer >= 0 else ""
        detail = where + (completion.error or "").removeprefix(where)
        if step.kind in ("quantize", "extra"):
            told = self._settings.told(completion.error or "")
            self._rows[step.layer] = self._store.fail_layer(self._claim, step.layer, told)
        self._check_another_try(completion, detail, self._attempts[step])

    def _commit(self, completion: Completion[Task], run: ModelRun) -> None:
        """Make a finished shard count: object in place, then the row."""
        assert completion.result is not None
        assert completion.task.key is not None
        outcome = ShardOutcome.from_dict(completion.result)
        told = (site.get("output_nmse") for site in outcome.metrics.values())
        errors = [error for error in told if error is not None]
        metrics: dict[str, Any] = {"outcome": completion.result}
        if errors:
            metrics["output_error"] = sum(errors) / len(errors)
        row = replace(
            self._rows[outcome.layer],
            key=completion.task.key,
            sha256=outcome.shard.sha256,
            size_bytes=outcome.shard.size_bytes,
            metrics=metrics,
            seconds=outcome.seconds,
        )
        self._rows[outcome.layer] = self._store.commit_layer(self._claim, row, device=completion.device)
        self.has_progressed = True
        LAYER_SECONDS.observe(outcome.seconds)
        tracing.record("layer", outcome.seconds, {"duquant.layer": outcome.layer, "duquant.attempt": row.attempt})
        if outcome.layer >= 0:
            run.forget(outcome.layer)

    def _bill(self, completion: Completion[Task]) -> None:
        """Put a step that commits nothing on the bill: a job's sweeps take about as long as its layers."""
        self._billed_steps += 1
        slot = _FIRST_STEP_SLOT - self._billed_steps
        self._store.charge(self._claim, slot=slot, seconds=completion.seconds, device=completion.device)

    def _publish(self, run: ModelRun) -> dict[str, Any]:
        """Write the small files and, last, the manifest; return the job's result."""
        outcomes = [ShardOutcome.from_dict(row.metrics["outcome"]) for row in self._rows.values()]
        keys = {outcome.shard.name: self._rows[outcome.layer].key for outcome in outcomes}
        model = self._claim.job.spec["model"]
        with tempfile.TemporaryDirectory(prefix="small-", dir=self._work_dir) as scratch:
            manifest = run.finish(Path(scratch), outcomes, name=f"{model['source']}:{model['name']}")
            for entry in manifest.files:
                if entry.name not in keys:
                    keys[entry.name] = self._keys.file(entry.name, fence=self._claim.fence)
                    self._storage.put_file(keys[entry.name] or "", Path(scratch) / entry.name)
        document = manifest.to_dict()
        document["files"] = [{**asdict(entry), "key": keys[entry.name]} for entry in manifest.files]
        document = self._put_manifest(document)
        return {
            "artifact": {
                "manifest_key": self._keys.manifest,
                "files": len(document["files"]) + 1,
                "size_bytes": sum(entry["size_bytes"] for entry in document["files"]),
                "fingerprint": document["fingerprint"],
                "summary": document["summary"],
            },
            "layers": run.source.layers,
            "seconds": sum(outcome.seconds for outcome in outcomes),
        }

    def _put_manifest(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """Put the manifest unless an earlier claim already did; return the one that counts."""
        data = json_bytes(document)
        try:
            self._storage.put_bytes(self._keys.manifest, data, if_none_match=True)
        except ObjectExists:
            existing: dict[str, Any] = json.loads(self._storage.get_bytes(self._keys.manifest))
            if existing["fingerprint"] != document["fingerprint"]:
                detail = f"{MANIFEST} of this job exists with another fingerprint"
                raise JobFailed("error", detail) from None
            return existing
        return dict(document)
