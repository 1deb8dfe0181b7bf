"""The object store: any S3 server, through boto3. Every object carries the SHA-256 of its bytes."""

import base64
import contextlib
import functools
import hashlib
import re
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from infra.errors import (
    ChecksumMismatch,
    InfraError,
    ObjectExists,
    ObjectNotFound,
    SettingsError,
    StorageRefused,
    TransientError,
)
from infra.metrics import STORAGE_ERRORS
from infra.settings import StorageSettings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_CONNECT_TIMEOUT_S = 2
_READ_TIMEOUT_S = 20
_ATTEMPTS = 3
_CHECK_TIMEOUT_S = 3
_CHUNK = 1 << 20
_PART = 16 << 20
_MAX_PRESIGN_S = 900
_DELETE_AT_ONCE = 1000

_MAKING_CLIENTS = threading.Lock()

# Threads help against a far-away S3; four parts of 16 MiB in flight bound the memory.
_TRANSFER = TransferConfig(multipart_threshold=_PART, multipart_chunksize=_PART, max_concurrency=4)

_MISSING = {"NoSuchKey", "NotFound", "404"}
_EXISTS = {"PreconditionFailed", "412"}


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What the store knows about an object; sha256 is none in listings and for objects that others have put."""

    key: str
    size_bytes: int
    sha256: str | None = None
    modified_at: int | None = None
    """When it was put, by the store's clock (ms since 1970); only listings say it."""


@dataclass(frozen=True, slots=True)
class Upload:
    """A multipart upload that was begun and neither finished nor aborted."""

    key: str
    id: str


@functools.cache
def _session() -> boto3.session.Session:
    """Return the process's session. It holds no connection, only the descriptions of S3, which take long to read."""
    return boto3.session.Session()


def _new_client(**options: Any) -> "S3Client":
    # Clients can be used from any thread; making them from one session cannot.
    with _MAKING_CLIENTS:
        return _session().client("s3", **options)


def file_sha256(path: Path) -> tuple[str, int]:
    """Return the hex SHA-256 and the size of a file."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return digest.hexdigest(), size


class ObjectStore:
    """One bucket of an S3 server.

    Every method raises TransientError when the server does not answer or is overloaded, and StorageRefused when it
    answers but does not let us in.
    """

    def __init__(
        self,
        *,
        endpoint: str | None,
        region: str,
        bucket: str,
        access_key: str,
        secret_key: str,
        public_endpoint: str | None = None,
    ) -> None:
        self.bucket = bucket
        self.endpoint = endpoint or f"https://s3.{region}.amazonaws.com"
        self._region = region
        self._keys = (access_key, secret_key)
        self._client = self._connect(endpoint)
        self._signer = self._connect(public_endpoint) if public_endpoint else self._client
        # Health checks must answer before the prober gives up.
        self._prober = self._connect(endpoint, read_timeout=_CHECK_TIMEOUT_S, attempts=1)

    @classmethod
    def from_settings(cls, settings: StorageSettings, *, public_endpoint: str | None = None) -> Self:
        """Return the store that the settings name; `public_endpoint` is the server's address in presigned URLs."""
        return cls(
            endpoint=settings.s3_endpoint,
            region=settings.s3_region,
            bucket=settings.s3_bucket,
            access_key=settings.s3_access_key.get_secret_value(),
            secret_key=settings.s3_secret_key.get_secret_value(),
            public_endpoint=public_endpoint,
        )

    def _connect(
        self, endpoint: str | None, *, read_timeout: float = _READ_TIMEOUT_S, attempts: int = _ATTEMPTS
    ) -> "S3Client":
        access_key, secret_key = self._keys
        try:
            return _new_client(
                endpoint_url=endpoint,
                region_name=self._region,
                aws_access_key_id=access_key,
                aws_secret_access_key=secret_key,
                config=Config(
                    signature_version="s3v4",
                    s3={"addressing_style": "path" if endpoint else "auto"},
                    connect_timeout=_CONNECT_TIMEOUT_S,
                    read_timeout=read_timeout,
                    retries={"mode": "standard", "total_max_attempts": attempts},
                    # We send our own SHA-256; the CRCs that boto3 adds by default confuse some S3 servers.
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                    max_pool_connections=16,
                ),
            )
        except ValueError as error:
            raise SettingsError(f"{endpoint} is not the URL of an S3 server (DUQUANT_S3_ENDPOINT)") from error

    def close(self) -> None:
        """Close the connections."""
        for client in (self._client, self._signer, self._prober):
            client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ensure_bucket(self) -> None:
        """Make the bucket if it is not there."""
        with self._translated():
            try:
                self._client.head_bucket(Bucket=self.bucket)
            except ClientError as error:
                if _code(error) not in {*_MISSING, "NoSuchBucket"}:
                    raise
                self._create_bucket()

    def _create_bucket(self) -> None:
        try:
            if self._region == "us-east-1":
                # AWS refuses this one region as a location constraint.
                self._client.create_bucket(Bucket=self.bucket)
            else:
                where = {"LocationConstraint": self._region}
                self._client.create_bucket(Bucket=self.bucket, CreateBucketConfiguration=where)  # type: ignore[arg-type]  # a string, where the stubs want AWS's regions
        except ClientError as error:
            # Another process was faster; the name can also belong to a stranger, which then shows at the first use.
            if _code(error) not in {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}:
                raise

    def put_bytes(self, key: str, data: bytes, *, if_none_match: bool = False) -> ObjectInfo:
        """Store small data.

        Raises:
            ObjectExists: `if_none_match` was asked for and the key is taken.
        """
        digest = hashlib.sha256(data)
        with self._translated(key):
            self._client.put_object(
                Bucket=self.bucket,
                Key=key,
                Body=data,
                ChecksumSHA256=base64.b64encode(digest.digest()).decode(),
                Metadata={"sha256": digest.hexdigest()},
                **({"IfNoneMatch": "*"} if if_none_match else {}),  # type: ignore[arg-type]  # a TypedDict cannot say "maybe"
            )
        return ObjectInfo(key, len(data), digest.hexdigest())

    def put_file(self, key: str, path: Path) -> tuple[str, int]:
        """Store a file, in parts when it is big; return its SHA-256 and size.

        Raises:
            InfraError: the file cannot be read.
        """
        try:
            sha256, size = file_sha256(path)
            with self._translated(key), path.open("rb") as stream:
                self._client.upload_fileobj(
                    stream,
                    self.bucket,
                    key,
                    ExtraArgs={"ChecksumAlgorithm": "SHA256", "Metadata": {"sha256": sha256}},
                    Config=_TRANSFER,
                )
        except OSError as error:
            raise InfraError(f"cannot read {path}: {error.strerror}", path=str(path)) from error
        return sha256, size

    def get_bytes(self, key: str) -> bytes:
        """Return an object's bytes, checked against its SHA-256.

        Raises:
            ObjectNotFound: no such object.
            ChecksumMismatch: the bytes are damaged.
        """
        with self._translated(key):
            answer = self._client.get_object(Bucket=self.bucket, Key=key)
            with answer["Body"] as body:
                data: bytes = body.read()
        self._check_digest(key, answer["Metadata"].get("sha256"), hashlib.sha256(data).hexdigest())
        return data

    def get_file(self, key: str, path: Path) -> tuple[str, int]:
        """Fetch an object into a file, whole or not at all; return its SHA-256 and size.

        Raises:
            ObjectNotFound: no such object.
            ChecksumMismatch: the bytes are damaged; `path` is untouched.
            InfraError: the file cannot be written; `__cause__` is the OSError.
        """
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        digest = hashlib.sha256()
        size = 0
        try:
            with self._translated(key):
                answer = self._client.get_object(Bucket=self.bucket, Key=key)
                with answer["Body"] as body, part.open("wb") as stream:
                    while chunk := body.read(_CHUNK):
                        digest.update(chunk)
                        size += stream.write(chunk)
            self._check_digest(key, answer["Metadata"].get("sha256"), digest.hexdigest())
            part.replace(path)
        except OSError as error:
            raise InfraError(f"cannot write {path}: {error.strerror}", path=str(path)) from error
        finally:
            part.unlink(missing_ok=True)
        return digest.hexdigest(), size

    def _check_digest(self, key: str, stored: str | None, actual: str) -> None:
        if stored is not None and stored != actual:
            raise ChecksumMismatch(f"object {key} is damaged: its SHA-256 is {actual}, not {stored}", key=key)

    def head(self, key: str) -> ObjectInfo:
        """Return an object's size and SHA-256.

        Raises:
            ObjectNotFound: no such object.
        """
        with self._translated(key):
            answer = self._client.head_object(Bucket=self.bucket, Key=key)
        return ObjectInfo(key, answer["ContentLength"], answer["Metadata"].get("sha256"))

    def presign(self, key: str, seconds: int, filename: str) -> str:
        """Return a URL that lets anybody GET this one object for `seconds`, at most 15 minutes, as `filename`."""
        if not 1 <= seconds <= _MAX_PRESIGN_S:
            raise ValueError(f"a presigned URL lives 1 to {_MAX_PRESIGN_S} s, not {seconds}")
        plain = re.sub(r"[^A-Za-z0-9._-]", "_", filename)
        disposition = f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename)}"
        with self._translated(key):
            return self._signer.generate_presigned_url(
                "get_object",
                Params={
                    "Bucket": self.bucket,
                    "Key": key,
                    "ResponseContentDisposition": disposition,
                },
                ExpiresIn=seconds,
                HttpMethod="GET",
            )

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield the objects whose keys start with `prefix`, in the order of their keys."""
        with self._translated(prefix):
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix):
                for item in page.get("Contents", []):
                    yield ObjectInfo(item["Key"], item["Size"], modified_at=_ms(item["LastModified"]))

    def delete(self, key: str) -> None:
        """Delete an object; one that is not there is no error."""
        with self._translated(key):
            self._client.delete_object(Bucket=self.bucket, Key=key)

    def delete_many(self, keys: Sequence[str]) -> None:
        """Delete objects, a thousand with each request; those that are not there are no error.

        Raises:
            StorageRefused: some could not be deleted.
        """
        for start in range(0, len(keys), _DELETE_AT_ONCE):
            some = keys[start : start + _DELETE_AT_ONCE]
            with self._translated(some[0]):
                answer = self._client.delete_objects(
                    Bucket=self.bucket, Delete={"Objects": [{"Key": key} for key in some], "Quiet": True}
                )
            if errors := answer.get("Errors"):
                raise StorageRefused(f"{len(errors)} objects were not deleted: {errors[0].get('Code')}")

    def stale_uploads(self, before: int) -> Iterator[Upload]:
        """Yield the multipart uploads that began before a time (ms since 1970) and were never finished."""
        with self._translated():
            pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket)
            for page in pages:
                for item in page.get("Uploads", []):
                    if _ms(item["Initiated"]) < before:
                        yield Upload(item["Key"], item["UploadId"])

    def abort_upload(self, upload: Upload) -> None:
        """Throw away the parts of an unfinished upload; one that is not there any more is no error."""
        with self._translated(upload.key), contextlib.suppress(self._client.exceptions.NoSuchUpload):
            self._client.abort_multipart_upload(Bucket=self.bucket, Key=upload.key, UploadId=upload.id)

    def check(self) -> None:
        """Raise unless the bucket can be reached, within seconds."""
        with self._translated():
            self._prober.head_bucket(Bucket=self.bucket)

    @contextmanager
    def _translated(self, key: str | None = None) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            translated = self._translate(error, key)
            if isinstance(translated, TransientError | StorageRefused):
                STORAGE_ERRORS.labels("unavailable" if isinstance(translated, TransientError) else "refused").inc()
            raise translated from error
        except BotoCoreError as error:
            STORAGE_ERRORS.labels("unavailable").inc()
            raise TransientError(
                f"the object store at {self.endpoint} does not answer: {type(error).__name__}", endpoint=self.endpoint
            ) from error

    def _translate(self, error: ClientError, key: str | None) -> InfraError:
        code = _code(error)
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if (key is None and code in _MISSING | {"NoSuchBucket"}) or code == "NoSuchBucket":
            return StorageRefused(f"the object store at {self.endpoint} has no bucket {self.bucket}")
        if code in _MISSING:
            return ObjectNotFound(f"no object {key}", key=key)
        if code in _EXISTS:
            return ObjectExists(f"object {key} exists already", key=key)
        if status >= 500 or code in {"SlowDown", "RequestTimeout", "ConditionalRequestConflict"} or status == 429:
            return TransientError(f"the object store at {self.endpoint} failed: {code}", endpoint=self.endpoint)
        # The server's own text may echo the access key.
        return StorageRefused(f"the object store at {self.endpoint} refuses us: {code}", endpoint=self.endpoint)


def _ms(moment: datetime) -> int:
    return round(moment.timestamp() * 1000)


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", "unknown"))
