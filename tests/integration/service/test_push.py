"""Sending a checkpoint on to another bucket, and to the hub where it is not."""

import hashlib
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client.main import run
from infra.storage import ObjectStore

pytestmark = pytest.mark.integration


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder as `artifact pull` leaves it, with a file that takes several parts."""
    folder = tmp_path / "int4"
    folder.mkdir()
    files = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 40_000}
    entries = []
    for name, content in files.items():
        (folder / name).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        entries.append({"name": name, "sha256": digest, "size_bytes": len(content)})
    (folder / "manifest.json").write_text(json.dumps({"format": "duquant", "files": entries}))
    return folder


@pytest.fixture
def other_bucket(s3: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """A bucket that is not the service's, with credentials where people have them."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret_key)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with s3.store(f"push-{uuid.uuid4().hex[:12]}") as store:
        yield store


def test_a_checkpoint_goes_to_a_bucket_and_only_what_is_missing_goes_again(
    checkpoint: Path, other_bucket: ObjectStore, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["artifact", "push", str(checkpoint), "--to", f"s3://{other_bucket.bucket}/models/int4"]
    command += ["--endpoint", other_bucket.endpoint, "--json"]

    def push() -> dict[str, Any]:
        assert run(command) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    first = push()
    assert first["sent_bytes"] == first["size_bytes"] > 10_000_000
    for path in checkpoint.iterdir():
        assert other_bucket.get_bytes(f"models/int4/{path.name}") == path.read_bytes()
    assert push()["sent_bytes"] == 0
    other_bucket.delete("models/int4/config.json")
    other_bucket.put_bytes("models/int4/manifest.json", b"of another version")
    again = push()
    assert again["sent_bytes"] == 2 + (checkpoint / "manifest.json").stat().st_size
    assert other_bucket.get_bytes("models/int4/manifest.json") == (checkpoint / "manifest.json").read_bytes()


def test_what_cannot_be_sent_is_one_line_and_its_exit_code(
    checkpoint: Path,
    other_bucket: ObjectStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def push(folder: Path, to: str, *more: str) -> tuple[int, str]:
        status = run(["artifact", "push", str(folder), "--to", to, *more])
        err = capsys.readouterr().err
        assert len(err.strip().splitlines()) == 1, err
        return status, err

    at = ("--endpoint", other_bucket.endpoint)
    assert push(tmp_path / "absent", "s3://b/p")[0] == 2
    assert push(checkpoint, "ftp://b/p")[0] == 2
    assert push(checkpoint, "s3://Not A Bucket/p", *at)[0] == 2
    with monkeypatch.context() as other:
        other.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        assert push(checkpoint, f"s3://{other_bucket.bucket}/p", *at)[0] == 1
    assert push(checkpoint, "s3://b/p", "--endpoint", "http://127.0.0.1:9")[0] == 5
    status, err = push(checkpoint, "hub:somebody/int4")
    assert (status, "--allow-hub" in err) == (2, True)
    # The hub's address is read when its library is imported.
    hub = ["artifact", "push", str(checkpoint), "--to", "hub:somebody/int4", "--allow-hub"]
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_none"}
    done = subprocess.run(
        [sys.executable, "-m", "client.main", *hub], env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (5, 1), done.stderr
    (checkpoint / "config.json").write_text("{ }")
    status, err = push(checkpoint, f"s3://{other_bucket.bucket}/p", *at)
    assert (status, "config.json is missing or damaged" in err) == (1, True)
    assert list(other_bucket.list("p")) == []
