"""The API on a real port, over a real database and a real S3 server, with a stand-in for nothing."""

import hashlib
import json
import logging
import random
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
import uvicorn
from pydantic import SecretStr
from sqlalchemy import insert

from client.home import load_secrets
from client.main import run
from client.sdk import Client
from duquant.config import preset
from infra.artifact_keys import ArtifactKeys
from infra.database import write
from infra.jobs import Claim, Job, JobStore, NewJob
from infra.keys import KeyStore
from infra.schema import tenants
from infra.storage import ObjectStore
from service.app import create_app
from service.settings import ServiceSettings

OWNER = "dispatcher-1"
SUBMIT = {"model": {"source": "demo", "name": "smollm2-135m"}, "recipe": "duquant"}


@dataclass
class Harness:
    """A running service, and the other side of its database and bucket: what a dispatcher would do."""

    url: str
    token: str
    http: httpx.Client
    jobs: JobStore
    keys: KeyStore
    storage: ObjectStore
    settings: ServiceSettings
    app: Any

    def client(self, token: str | None = None) -> Client:
        return Client(self.url, token or self.token)

    def submit(self, **changes: Any) -> dict[str, Any]:
        answer = self.http.post("/v1/jobs", json={**SUBMIT, "force": True, **changes})
        assert answer.status_code == 201, answer.text
        return answer.json()

    def enqueue(self, tenant: str = "default", **changes: Any) -> Job:
        spec = {
            "kind": "quantize",
            "model": {"source": "demo", "name": "smollm2-135m", "revision": None},
            "model_identity": "demo:smollm2-135m",
            "recipe": preset("duquant").to_dict(),
        }
        names = {"model_name": "smollm2-135m", "recipe_name": "duquant"}
        new = NewJob(tenant_id=tenant, kind="quantize", spec=spec, fingerprint="f" * 64, **{**names, **changes})
        return self.jobs.enqueue(new, force=True, actor="test")[0]

    def claim(self) -> Claim:
        claim = self.jobs.claim(OWNER, lease_seconds=600)
        assert claim is not None
        return claim

    def do_layers(self, claim: Claim, layers: int, upto: int | None = None) -> None:
        self.jobs.plan(claim, [-1, *range(layers)])
        for layer in [-1, *range(layers if upto is None else upto)]:
            row = self.jobs.start_layer(claim, layer, "node-1")
            key = ArtifactKeys(claim.job.tenant_id, claim.job.id).layer(layer, fence=row.fence, attempt=row.attempt)
            # Seeded by layer: large enough to be fetched in several chunks, and not compressible.
            info = self.storage.put_bytes(key, random.Random(layer).randbytes(1_500_000))
            metrics = {} if layer < 0 else {"mlp_in": {"output_nmse": 0.01 * (layer + 1)}}
            done = replace(
                row, key=key, sha256=info.sha256, size_bytes=info.size_bytes, metrics=metrics, seconds=1.5 + layer
            )
            self.jobs.commit_layer(claim, done)
            self.jobs.progress(claim, phase="layers", done=layer + 2, total=layers + 1)

    def finish(self, claim: Claim, *, extra_files: tuple[dict[str, Any], ...] = ()) -> Job:
        keys = ArtifactKeys(claim.job.tenant_id, claim.job.id)
        files = [
            {
                "name": f"model-layer-{row.layer:04d}.safetensors" if row.layer >= 0 else "model-extra.safetensors",
                "sha256": row.sha256,
                "size_bytes": row.size_bytes,
                "key": row.key,
            }
            for row in self.jobs.layers(claim.job.id)
        ]
        config = b'{"model_type": "llama"}'
        self.storage.put_bytes(keys.file("config.json", fence=claim.fence), config)
        files.append(
            {
                "name": "config.json",
                "sha256": hashlib.sha256(config).hexdigest(),
                "size_bytes": len(config),
                "key": keys.file("config.json", fence=claim.fence),
            }
        )
        manifest = {"schema_version": 1, "format": "duquant", "files": [*files, *extra_files], "evaluation": {}}
        self.storage.put_bytes(keys.manifest, json.dumps(manifest).encode(), if_none_match=True)
        artifact = {
            "manifest_key": keys.manifest,
            "files": len(files) + 1,  # the manifest counts
            "fingerprint": claim.job.fingerprint,
            "size_bytes": sum(file["size_bytes"] for file in files),
            "summary": {},
        }
        return self.jobs.complete(claim, {"artifact": artifact, "seconds": 3.0, "layers": len(files) - 2})

    def finished_job(self, layers: int = 2) -> Job:
        self.enqueue()
        claim = self.claim()
        self.do_layers(claim, layers)
        return self.finish(claim)

    def key(self, *scopes: str, tenant: str = "default") -> str:
        return self.keys.create(tenant, "test", scopes)[1]


def make_settings(home: Path, database_url: str, storage: ObjectStore, s3: Any, **changes: Any) -> ServiceSettings:
    for name in ("models", "texts"):
        (home / name).mkdir(exist_ok=True)
    values = {
        "home": home,
        "database_url": database_url,
        "s3_endpoint": s3.endpoint,
        "s3_bucket": storage.bucket,
        "s3_access_key": SecretStr(s3.access_key),
        "s3_secret_key": SecretStr(s3.secret_key),
        "key_pepper": SecretStr("pepper of the tests"),
        "bootstrap_key": SecretStr(load_secrets(home).api_key),
        "model_roots": (home / "models",),
        "text_roots": (home / "texts",),
        "webhook_networks": ("127.0.0.0/8",),
    }
    return ServiceSettings(**{**values, **changes})


class Served:
    """An app on a real socket, in a thread."""

    def __init__(self, app: Any) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setsockopt(
            socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
        )  # as service.__main__ does, and why is told there
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._listener = listener
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]})

    def __enter__(self) -> "Served":
        self._thread.start()
        deadline = time.monotonic() + 20
        while not self._server.started:
            assert time.monotonic() < deadline, "the service did not start"
            assert self._thread.is_alive(), "the service ended while starting"
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        self._listener.close()


def run_service(tmp_path: Path, database_url: str, storage: ObjectStore, s3: Any, **changes: Any) -> Iterator[Harness]:
    settings = make_settings(tmp_path, database_url, storage, s3, **changes)
    app = create_app(settings)
    token = settings.bootstrap_key.get_secret_value() if settings.bootstrap_key else ""
    # There is no TLS, and reading the certificates for it would take longer than most tests.
    with Served(app) as served, httpx.Client(base_url=served.url, timeout=20, verify=False) as http:
        http.headers["Authorization"] = f"Bearer {token}"
        engine = app.state.context.engine
        keys = KeyStore(engine, settings.key_pepper)
        yield Harness(served.url, token, http, JobStore(engine), keys, storage, settings, app)


@pytest.fixture(scope="session", autouse=True)
def _quiet_logs() -> Iterator[None]:
    """Keep the service's log lines out of the output of the commands that run in the same process."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.configure(**before)


@pytest.fixture(scope="session")
def shared_bucket(s3: Any) -> Iterator[ObjectStore]:
    """One bucket for all of these tests: every job has a prefix of its own, and buckets are slow to make."""
    with s3.store("service-tests") as store:
        yield store


@pytest.fixture
def service(tmp_path: Path, migrated_sqlite_url: str, shared_bucket: ObjectStore, s3: Any) -> Iterator[Harness]:
    """The service on SQLite."""
    yield from run_service(tmp_path, migrated_sqlite_url, shared_bucket, s3)


@pytest.fixture
def set_service(
    request: pytest.FixtureRequest, tmp_path: Path, migrated_sqlite_url: str, shared_bucket: ObjectStore, s3: Any
) -> Iterator[Harness]:
    """The service on SQLite, with the settings that are its parameter."""
    yield from run_service(tmp_path, migrated_sqlite_url, shared_bucket, s3, **request.param)


@pytest.fixture(scope="module")
def shared_service(
    tmp_path_factory: pytest.TempPathFactory, _sqlite_template: Path, shared_bucket: ObjectStore, s3: Any
) -> Iterator[Harness]:
    """One service on SQLite for all tests of a module, which leave nothing behind that another would mind."""
    home = tmp_path_factory.mktemp("shared")
    shutil.copy(_sqlite_template, home / "duquant.db")
    yield from run_service(home, f"sqlite:///{home / 'duquant.db'}", shared_bucket, s3)


@pytest.fixture
def unlimited_service(
    tmp_path: Path, migrated_sqlite_url: str, shared_bucket: ObjectStore, s3: Any
) -> Iterator[Harness]:
    """The service on SQLite, without a rate limit: for tests that send thousands of requests with one key."""
    yield from run_service(tmp_path, migrated_sqlite_url, shared_bucket, s3, rate_limit_per_second=0)


@pytest.fixture
def any_service(tmp_path: Path, database_url: str, shared_bucket: ObjectStore, s3: Any) -> Iterator[Harness]:
    """The service on each kind of database."""
    yield from run_service(tmp_path, database_url, shared_bucket, s3)


@pytest.fixture
def postgres_service(
    tmp_path: Path, migrated_postgres_url: str, shared_bucket: ObjectStore, s3: Any
) -> Iterator[Harness]:
    """The service on PostgreSQL."""
    yield from run_service(tmp_path, migrated_postgres_url, shared_bucket, s3)


@pytest.fixture
def other_tenant(service: Harness) -> str:
    """A second tenant."""
    with write(service.app.state.context.engine) as connection:
        connection.execute(insert(tenants).values(id="other", name="other", created_at=0))
    return "other"


@pytest.fixture
def cli(service: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Run a command; give back its exit code, stdout and stderr."""
    monkeypatch.setenv("DUQUANT_URL", service.url)
    monkeypatch.setenv("DUQUANT_API_KEY", service.token)
    monkeypatch.setenv("DUQUANT_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("DUQUANT_CONFIG", str(tmp_path / "config.yaml"))

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = run(arguments)
        out = capsys.readouterr()
        return status, out.out, out.err

    return call
