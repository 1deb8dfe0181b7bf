"""Jobs on input that is wrong, and on servers that go away: each tells its reason and loses nothing finished."""

import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, make_url, text
from support.broken_models import fill, only_pickle, shard_of, truncate
from support.tiny_models import make_tiny_model

from duquant.config import TextSource
from infra.database import make_engine
from infra.embedded import EmbeddedStorage
from infra.jobs import JobState, JobStore
from infra.storage import ObjectStore

pytestmark = pytest.mark.integration

LAYERS = 6


def fail_one(side: Any, *words: str) -> Any:
    """Run one job that must fail for its input; return it."""
    job = side.run_one()
    assert (job.state, job.reason) == (JobState.FAILED, "bad_input"), job.detail
    for word in words:
        assert word in job.detail
    assert "\n" not in job.detail
    return job


@pytest.fixture
def own_model(model_root: Path) -> Iterator[Path]:
    """A sharded model under the root that the test may damage."""
    path = make_tiny_model(model_root / "own", num_hidden_layers=3, shard_size="60KB")
    yield path
    shutil.rmtree(path)


UP_PROJ = "model.layers.2.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"wieght": {}}, "unknown recipe field wieght"),
        ({"weight": {"bits": 5}}, "weight.bits is 5"),
        ({"activation": {"bits": 1}}, "activation.bits is 1"),
        ("duqant", "recipe must be an object"),
    ],
)
def test_a_stored_recipe_that_is_wrong_fails_the_job_and_names_the_field(side, recipe, words):
    side.submit(spec={"recipe": recipe})
    fail_one(side, words)


@pytest.mark.parametrize("name", ["../outside", "/etc", "link-out"])
def test_a_stored_model_outside_the_roots_fails_the_job(side, model_root, name):
    link = model_root / "link-out"
    link.symlink_to("/etc")
    try:
        side.submit(spec={"model": {"source": "local", "name": name, "revision": None}})
        fail_one(side, name, "allowed folder")
    finally:
        link.unlink()


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/passwd", "link-out.txt"])
def test_a_stored_text_outside_the_roots_fails_the_job(side, model_root, name):
    link = model_root / "link-out.txt"
    link.symlink_to("/etc/passwd")
    try:
        source = TextSource(kind="file", name=name)
        side.submit(replace(side.recipe, calibration=replace(side.recipe.calibration, source=source)))
        fail_one(side, "calibration text", name, "allowed folder")
    finally:
        link.unlink()


@pytest.mark.parametrize("content", ["", " \n\n", "too short"])
def test_a_text_that_is_empty_or_too_short_fails_the_job_and_is_named(side, model_root, content):
    (model_root / "little.txt").write_text(content, encoding="utf-8")
    source = TextSource(kind="file", name="little.txt")
    side.submit(replace(side.recipe, calibration=replace(side.recipe.calibration, source=source)))
    fail_one(side, "little.txt", "9 tokens" if content.strip() else "is empty")


@pytest.mark.parametrize(
    ("damage", "is_late", "words"),
    [
        # After the service has looked, which refuses them itself.
        (only_pickle, True, ("own", "pytorch_model.bin", "pickled")),
        (lambda model: [file.unlink() for file in model.glob("*.safetensors")], True, ("own", "no .safetensors")),
        (lambda model: truncate(shard_of(model, UP_PROJ)), True, ("own", "has changed since the job was submitted")),
        (lambda model: truncate(shard_of(model, UP_PROJ)), False, (".safetensors is truncated",)),
        (lambda model: shard_of(model, UP_PROJ).unlink(), False, (".safetensors is missing", "the index names it")),
    ],
)
def test_a_model_without_whole_safetensors_fails_the_job(side, own_model, damage, is_late, words):
    if is_late:
        side.submit(model="own")
    damage(own_model)
    if not is_late:
        side.submit(model="own")
    fail_one(side, *words)
    assert not (own_model / "exploded").exists(), "a pickle was loaded"


def test_activations_that_overflow_fail_the_job_once_and_keep_what_was_finished(side, own_model):
    fill(own_model, UP_PROJ, 3e38)
    side.submit(model="own")
    job = fail_one(side, "layer 2: activations at site mlp_out are NaN or Inf")
    assert job.detail.count("layer 2") == 1
    finished = [row for row in side.store.layers(job.id) if row.state == "done"]
    assert finished
    for row in finished:
        assert side.storage.head(row.key).sha256 == row.sha256


def done(side: Any, job_id: str) -> dict[int, tuple[int, str]]:
    return {row.layer: (row.fence, row.key) for row in side.store.layers(job_id) if row.state == "done"}


def cut_off(side: Any, model_root: Path, cut: Callable[[], None], **settings: float) -> Any:
    """Submit a job that takes some seconds, call `cut` in its middle, and wait until its dispatcher has let go."""
    if not (model_root / "longer").exists():
        make_tiny_model(model_root / "longer", num_hidden_layers=LAYERS)
    recipe = replace(side.recipe, transform=replace(side.recipe.transform, greedy_steps=256))
    job = side.submit(recipe, model="longer")
    dispatcher = side.dispatcher(**settings)
    claim = side.store.claim("test-1", lease_seconds=settings.get("lease_seconds", 60))
    running = threading.Thread(target=dispatcher.run_job, args=(claim,))
    running.start()
    deadline = time.monotonic() + 120
    while len(done(side, job.id)) < 2:
        assert time.monotonic() < deadline
        assert running.is_alive()
        time.sleep(0.02)
    cut()
    running.join(120)
    assert not running.is_alive()
    return job


def test_an_object_store_that_goes_away_costs_no_finished_layer(side, model_root, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    keys = {"access_key": "access", "secret_key": "secret-0123456789"}
    server = EmbeddedStorage(tmp_path / "objects", port=port, **keys)
    with server, ObjectStore(endpoint=server.endpoint, region="us-east-1", bucket="away", **keys) as storage:
        storage.ensure_bucket()
        side = replace(side, storage=storage)
        job = cut_off(side, model_root, server.stop)
        committed = done(side, job.id)
        assert 2 <= len(committed) < LAYERS + 1
        retry = next(event for event in side.store.events(job.id) if event.type == "retry_scheduled")
        assert "the object store" in retry.data["detail"]
        server.start()
        ended = side.run_one()
        assert ended.state is JobState.SUCCEEDED, ended.detail
        assert {layer: entry for layer, entry in done(side, job.id).items() if layer in committed} == committed


def test_a_database_that_goes_away_costs_no_finished_layer(side, model_root, migrated_postgres_url, postgres_server):
    engine = make_engine(migrated_postgres_url)
    side = replace(side, engine=engine, store=JobStore(engine))
    name = make_url(migrated_postgres_url).database
    server = make_url(postgres_server).set(drivername="postgresql+psycopg")
    desk = create_engine(server, isolation_level="AUTOCOMMIT")

    def allow(word: str) -> None:
        with desk.connect() as connection:
            connection.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS {word}"))
            if word == "false":
                gone = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"
                connection.execute(text(gone), {"name": name})

    try:
        job = cut_off(side, model_root, lambda: allow("false"), lease_seconds=4, beat_seconds=0.5)
        allow("true")
        committed = done(side, job.id)
        assert 2 <= len(committed) < LAYERS + 1
        while side.store.sweep() == 0:
            time.sleep(0.1)  # until the lease of the dispatcher that was cut off expires
        ended = side.run_one()
        assert ended.state is JobState.SUCCEEDED, ended.detail
        assert ended.lease_losses == 1
        assert {layer: entry for layer, entry in done(side, job.id).items() if layer in committed} == committed
    finally:
        desk.dispose()
        engine.dispose()
