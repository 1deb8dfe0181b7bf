"""The object store on a real S3 server."""

import hashlib
import os
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from infra.errors import (
    ChecksumMismatch,
    InfraError,
    ObjectExists,
    ObjectNotFound,
    SettingsError,
    StorageRefused,
    TransientError,
)
from infra.storage import ObjectStore

pytestmark = pytest.mark.integration

SECRET = "canary-secret-5e1f0c"


def connect(endpoint: str, *, access_key: str = "key", secret_key: str = SECRET) -> ObjectStore:
    return ObjectStore(
        endpoint=endpoint, region="us-east-1", bucket="duquant", access_key=access_key, secret_key=secret_key
    )


def test_bytes_come_back_with_their_digest(object_store: ObjectStore) -> None:
    stored = object_store.put_bytes("a/b.json", b"{}")
    assert stored.sha256 == hashlib.sha256(b"{}").hexdigest()
    assert object_store.head("a/b.json") == stored
    assert object_store.get_bytes("a/b.json") == b"{}"


def test_an_empty_object_is_an_object(object_store: ObjectStore, tmp_path: Path) -> None:
    object_store.put_bytes("empty", b"")
    assert object_store.get_bytes("empty") == b""
    _, size = object_store.get_file("empty", tmp_path / "empty")
    assert size == 0


def test_making_the_bucket_twice_is_harmless(object_store: ObjectStore) -> None:
    object_store.put_bytes("a", b"1")
    object_store.ensure_bucket()
    object_store.check()
    assert object_store.get_bytes("a") == b"1"


def test_a_big_file_travels_in_parts_and_comes_back_whole(object_store: ObjectStore, s3, tmp_path: Path) -> None:
    source = tmp_path / "shard.safetensors"
    source.write_bytes(os.urandom(40 << 20))
    sha256, size = object_store.put_file("shard", source)
    assert (sha256, size) == (hashlib.sha256(source.read_bytes()).hexdigest(), 40 << 20)
    assert object_store.head("shard").sha256 == sha256
    with s3.client() as client:
        # An ETag with a count tells that the object was put together from parts.
        assert client.head_object(Bucket=object_store.bucket, Key="shard")["ETag"].endswith('-3"')
    target = tmp_path / "copy"
    assert object_store.get_file("shard", target) == (sha256, size)
    assert target.read_bytes() == source.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "shard.safetensors"]


def test_a_small_file_carries_a_checksum_that_the_server_has_verified(
    object_store: ObjectStore, s3, tmp_path: Path
) -> None:
    source = tmp_path / "small"
    source.write_bytes(b"hello")
    object_store.put_file("small", source)
    with s3.client() as client:
        head = client.head_object(Bucket=object_store.bucket, Key="small", ChecksumMode="ENABLED")
        assert head["ChecksumSHA256"] == "LPJNul+wow4m6DsqxbninhsWHlwfp0JecwQzYpOLmCQ="


def test_damaged_bytes_are_noticed_and_leave_no_file(object_store: ObjectStore, s3, tmp_path: Path) -> None:
    with s3.client() as client:
        client.put_object(Bucket=object_store.bucket, Key="bad", Body=b"other", Metadata={"sha256": "0" * 64})
    target = tmp_path / "target"
    target.write_text("what was there before")
    with pytest.raises(ChecksumMismatch, match="bad"):
        object_store.get_file("bad", target)
    with pytest.raises(ChecksumMismatch, match="bad"):
        object_store.get_bytes("bad")
    assert target.read_text() == "what was there before"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_the_first_manifest_wins(object_store: ObjectStore) -> None:
    object_store.put_bytes("manifest.json", b"first", if_none_match=True)
    with pytest.raises(ObjectExists, match=r"manifest\.json"):
        object_store.put_bytes("manifest.json", b"second", if_none_match=True)
    assert object_store.get_bytes("manifest.json") == b"first"


def test_missing_objects_are_not_found(object_store: ObjectStore, tmp_path: Path) -> None:
    for look in (
        lambda: object_store.head("nothing"),
        lambda: object_store.get_bytes("nothing"),
        lambda: object_store.get_file("nothing", tmp_path / "x"),
    ):
        with pytest.raises(ObjectNotFound, match="nothing"):
            look()
    assert list(tmp_path.iterdir()) == []
    object_store.delete("nothing")


def test_listing_and_deleting(object_store: ObjectStore) -> None:
    for key in ("a/1", "a/2", "b/1"):
        object_store.put_bytes(key, b"12")
    assert [(item.key, item.size_bytes) for item in object_store.list("a/")] == [("a/1", 2), ("a/2", 2)]
    object_store.delete("a/1")
    assert [item.key for item in object_store.list("")] == ["a/2", "b/1"]


def test_a_presigned_url_downloads_one_object_without_credentials(object_store: ObjectStore) -> None:
    object_store.put_bytes("file", b"0123456789")
    url = object_store.presign("file", 60, 'we"ird näme.safetensors')
    with httpx.Client() as client:
        whole = client.get(url)
        assert (whole.status_code, whole.content) == (200, b"0123456789")
        assert whole.headers["content-disposition"].startswith('attachment; filename="we_ird_n_me.safetensors"')
        part = client.get(url, headers={"Range": "bytes=2-4"})
        assert (part.status_code, part.content) == (206, b"234")
        assert client.get(url.split("?")[0]).status_code == 403
        assert client.get(url.replace("/file?", "/other?")).status_code == 403
        assert client.put(url, content=b"new").status_code == 403
    assert object_store.get_bytes("file") == b"0123456789"


@pytest.mark.parametrize("seconds", [0, 901])
def test_presigned_urls_do_not_live_long(object_store: ObjectStore, seconds: int) -> None:
    with pytest.raises(ValueError, match="900"):
        object_store.presign("file", seconds, "file")


def test_presigned_urls_carry_the_public_address(s3) -> None:
    with ObjectStore(
        endpoint=s3.endpoint,
        region="us-east-1",
        bucket="duquant",
        access_key="key",
        secret_key=SECRET,
        public_endpoint="https://objects.example.org",
    ) as store:
        url = store.presign("a", 60, "a")
    assert url.startswith("https://objects.example.org/duquant/a?")
    assert SECRET not in url


@pytest.mark.parametrize(("access_key", "secret_key"), [("nobody", SECRET), (None, SECRET)])
def test_wrong_credentials_are_refused_without_being_shown(s3, access_key: str | None, secret_key: str) -> None:
    with connect(s3.endpoint, access_key=access_key or s3.access_key, secret_key=secret_key) as store:
        for operation in (store.check, store.ensure_bucket, lambda: store.put_bytes("a", b"1")):
            with pytest.raises(StorageRefused, match=urlsplit(s3.endpoint).netloc) as caught:
                operation()
            assert SECRET not in str(caught.value)
            assert "nobody" not in str(caught.value)


def test_a_missing_bucket_is_named(s3) -> None:
    with (
        connect(s3.endpoint, access_key=s3.access_key, secret_key=s3.secret_key) as store,
        pytest.raises(StorageRefused, match="has no bucket duquant"),
    ):
        store.check()


def test_a_server_that_is_down_is_a_transient_error_within_seconds() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    began = time.monotonic()
    with connect(endpoint) as store:
        with pytest.raises(TransientError, match=endpoint):
            store.put_bytes("a", b"1")
        with pytest.raises(TransientError, match=endpoint):
            store.check()
    assert time.monotonic() - began < 10


def test_a_server_that_hangs_fails_the_health_check_within_seconds() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        began = time.monotonic()
        with connect(f"http://127.0.0.1:{silent.getsockname()[1]}") as store, pytest.raises(TransientError):
            store.check()
    assert time.monotonic() - began < 10


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(SettingsError, match="not the URL"):
        connect("nonsense")


def test_files_that_cannot_be_read_or_written_are_named(object_store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(InfraError, match=r"cannot read .*missing"):
        object_store.put_file("a", tmp_path / "missing")
    object_store.put_bytes("a", b"1")
    with pytest.raises(InfraError, match=r"cannot write .*no-folder"):
        object_store.get_file("a", tmp_path / "no-folder" / "a")
