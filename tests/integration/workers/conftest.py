"""A whole workers' side: store, storage, settings, a tiny model under a model root."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine
from support.tiny_models import make_tiny_model, tiny_text

from duquant.config import (
    ALGORITHM_VERSION,
    ActivationConfig,
    CalibrationConfig,
    KVCacheConfig,
    Recipe,
    TextSource,
    TransformConfig,
    WeightConfig,
)
from infra.artifacts import ArtifactStore
from infra.database import make_engine
from infra.fingerprints import gate_settings
from infra.job_measures import measured_fingerprint
from infra.jobs import Job, JobStore, NewJob
from infra.models import ModelCatalog, ModelRef
from infra.storage import ObjectStore
from workers.dispatcher import Dispatcher
from workers.executors.local import LocalExecutor
from workers.layer_worker import LayerWorker
from workers.settings import WorkerSettings
from workers.tasks import Executor


@dataclass
class Side:
    """What a test needs to submit jobs and run dispatchers on them."""

    settings: WorkerSettings
    engine: Engine
    store: JobStore
    storage: ObjectStore
    recipe: Recipe

    def submit(
        self,
        recipe: Recipe | None = None,
        *,
        model: str = "tiny",
        spec: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> Job:
        """Enqueue a job; `spec` replaces parts of it with what the service would have refused."""
        chosen = recipe or self.recipe
        reference = ModelRef(source="local", name=model)
        identity = ModelCatalog.from_settings(self.settings).check(reference)
        whole = {
            "kind": "quantize",
            "model": {"source": "local", "name": model, "revision": None},
            "model_identity": identity,
            "recipe": chosen.to_dict(),
            **changes,
            **(spec or {}),
        }
        if chosen.quality_gate is not None:
            whole["quality_gate"] = {"evaluation": gate_settings(chosen.quality_gate)}
        fingerprint = hashlib.sha256(f"{identity}-{chosen.digest()}-{ALGORITHM_VERSION}".encode()).hexdigest()
        job, _ = self.store.enqueue(
            NewJob(tenant_id="default", kind="quantize", spec=whole, fingerprint=fingerprint), force=True, actor="test"
        )
        return job

    def submit_evaluation(self, made_by: Job | None = None, *, force: bool = True, **changes: Any) -> Job:
        """Enqueue a job that measures what a job has made, or the tiny model as it is; `...` takes a setting away."""
        model = {"source": "local", "name": "tiny", "revision": None}
        settings = {"text": {"kind": "file", "name": "text.txt", "part": "evaluation"}, "seq_len": 32, "windows": 4}
        spec = {
            "kind": "evaluate",
            "model": model,
            "model_identity": ModelCatalog.from_settings(self.settings).check(ModelRef(source="local", name="tiny")),
            "artifact_job_id": None if made_by is None else made_by.id,
            "evaluation": {name: value for name, value in (settings | changes).items() if value is not ...},
        }
        fingerprint = measured_fingerprint(spec, spec["artifact_job_id"])
        new = NewJob(tenant_id="default", kind="evaluate", spec=spec, fingerprint=fingerprint)
        return self.store.enqueue(new, force=force, actor="test")[0]

    def executor(self) -> Executor:
        return LocalExecutor(LayerWorker(self.storage, threads=1))

    def dispatcher(self, executor: Executor | None = None, **changes: Any) -> Dispatcher:
        settings = self.settings.model_copy(update=changes)
        return Dispatcher(self.store, self.storage, executor or self.executor(), settings, owner="test-1")

    def run_one(self, executor: Executor | None = None) -> Job:
        """Claim and run one job to its end, in this thread."""
        dispatcher = self.dispatcher(executor)
        claim = self.store.claim("test-1", lease_seconds=60)
        assert claim is not None
        dispatcher.run_job(claim)
        return self.store.get(claim.job.id)


@pytest.fixture(scope="session")
def model_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("roots")
    make_tiny_model(root / "tiny", num_hidden_layers=4)
    (root / "text.txt").write_text(tiny_text(), encoding="utf-8")
    # Each question with both answers for the right one: whatever a model says, half of it is right.
    questions = [
        {"goal": f"to open {thing}", "sol1": f"turn {thing}", "sol2": f"eat {thing}", "label": label}
        for thing in ("a door", "a box")
        for label in (0, 1)
    ]
    (root / "quiz.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions), encoding="utf-8")
    return root


@pytest.fixture
def side(migrated_sqlite_url: str, object_store: ObjectStore, model_root: Path, tmp_path: Path) -> Iterator[Side]:
    endpoint = object_store.endpoint
    settings = WorkerSettings(
        home=tmp_path,
        database_url=migrated_sqlite_url,
        s3_endpoint=endpoint,
        s3_bucket=object_store.bucket,
        s3_access_key=SecretStr("unused"),
        s3_secret_key=SecretStr("unused"),
        key_pepper=SecretStr("unused"),
        model_roots=(model_root,),
        text_roots=(model_root,),
        executor="local",
        threads_per_slot=1,
        device="cpu",
        retry_seconds=0,
        poll_seconds=0.05,
        beat_seconds=0.2,
        lease_seconds=30,
    )
    recipe = Recipe(
        name="tiny",
        transform=TransformConfig(
            smooth_alpha=0.5, rotation="greedy", permutation="zigzag", block_size=16, greedy_steps=8
        ),
        weight=WeightConfig(clip="search"),
        activation=ActivationConfig(clip_ratio=0.9),
        kv_cache=KVCacheConfig(bits=4, rotate=True),
        calibration=CalibrationConfig(
            source=TextSource(kind="file", name="text.txt"),
            samples=6,
            seq_len=32,
            shards=3,
            micro_batch=2,
            search_tokens=48,
        ),
    )
    engine = make_engine(migrated_sqlite_url)
    yield Side(settings, engine, JobStore(engine), object_store, recipe)
    engine.dispose()


Pull = Callable[[Job, Path], Path]


@pytest.fixture
def pull(object_store: ObjectStore, side: Side) -> Pull:
    """Fetch an artifact as the client does, by the keys of its present manifest."""

    def fetch(job: Job, target: Path) -> Path:
        raw = object_store.get_bytes(ArtifactStore(side.engine).get(job.id, "default").manifest_key)
        target.mkdir()
        for entry in json.loads(raw)["files"]:
            sha256, size = object_store.get_file(entry["key"], target / entry["name"])
            assert (sha256, size) == (entry["sha256"], entry["size_bytes"])
        (target / "manifest.json").write_bytes(raw)
        return target

    return fetch
