"""Sends a finished checkpoint on: to a bucket of your own, or to the Hugging Face hub.

It runs here, with your credentials: the service never sees them. Every file is compared with the manifest first, and
the manifest is sent last, so a place that has one has the whole checkpoint.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from client.download import safe_target
from client.errors import BadInputError, ClientError, DownloadError, UnavailableError
from client.partial import sha256_of
from client.target import MANIFEST

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

OnFile = Callable[[int, int], None]
"""Called with the bytes that are there and the bytes in all."""


@dataclass(frozen=True, kw_only=True)
class PushSummary:
    """What a push did."""

    to: str
    files: int
    size_bytes: int
    sent_bytes: int
    """Less than size_bytes when files were there already."""


@dataclass(frozen=True, kw_only=True)
class _File:
    name: str
    path: Path
    sha256: str
    size_bytes: int


def read_artifact(folder: Path) -> list[_File]:
    """Return the files of a checkpoint, the manifest last, each compared with the manifest.

    Raises:
        BadInputError: the folder is no checkpoint.
        DownloadError: a file is missing or damaged.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        entries = [(str(entry["name"]), str(entry["sha256"]), int(entry["size_bytes"])) for entry in manifest["files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInputError(f"{folder} is no finished checkpoint: {path.name} cannot be read ({error})") from error
    files = []
    for name, sha256, size in entries:
        file = safe_target(folder, name)
        if not file.is_file() or file.stat().st_size != size or sha256_of(file) != sha256:
            raise DownloadError(f"{file} is missing or damaged; pull the checkpoint again")
        files.append(_File(name=name, path=file, sha256=sha256, size_bytes=size))
    files.append(_File(name=MANIFEST, path=path, sha256=sha256_of(path), size_bytes=path.stat().st_size))
    return files


def push(
    folder: Path, to: str, *, endpoint: str | None = None, allow_hub: bool = False, on_bytes: OnFile | None = None
) -> PushSummary:
    """Send the checkpoint in a folder to s3://BUCKET/PREFIX or hub:OWNER/NAME.

    Raises:
        BadInputError: the target or the folder cannot be one, or the hub is switched off.
        DownloadError: a file is damaged.
        ClientError: the target refuses it.
        UnavailableError: the target does not answer.
    """
    files = read_artifact(folder)
    if to.startswith("hub:"):
        if not allow_hub:
            raise BadInputError("sending to the hub is switched off; pass --allow-hub")
        return _push_to_hub(files, folder, to.removeprefix("hub:"))
    target = urlsplit(to)
    if target.scheme != "s3" or not target.netloc:
        raise BadInputError(f"{to!r} is no target; write s3://BUCKET/PREFIX or hub:OWNER/NAME")
    return _push_to_bucket(files, to, target.netloc, target.path.strip("/"), endpoint, on_bytes)


def _push_to_bucket(
    files: list[_File], to: str, bucket: str, prefix: str, endpoint: str | None, on_bytes: OnFile | None
) -> PushSummary:
    import boto3
    from boto3.exceptions import S3UploadFailedError
    from boto3.s3.transfer import TransferConfig
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, NoCredentialsError, ParamValidationError
    from botocore.exceptions import ClientError as S3Error

    total = sum(file.size_bytes for file in files)
    present = sent = 0
    client: S3Client = boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint,
        config=Config(
            s3={"addressing_style": "path" if endpoint else "auto"},
            retries={"mode": "standard", "total_max_attempts": 4},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )
    try:
        for file in files:
            key = f"{prefix}/{file.name}" if prefix else file.name
            if not _is_there(client, bucket, key, file):
                # Large files go in parts; what is left of a broken upload is aborted by the library.
                extra: Mapping[str, Any] = {"ChecksumAlgorithm": "SHA256", "Metadata": {"sha256": file.sha256}}
                client.upload_file(
                    str(file.path), bucket, key, ExtraArgs=dict(extra), Config=TransferConfig(max_concurrency=4)
                )
                sent += file.size_bytes
            present += file.size_bytes
            if on_bytes is not None:
                on_bytes(present, total)
    except (S3Error, S3UploadFailedError) as error:
        raise ClientError(f"{to} refuses the checkpoint: {' '.join(str(error).split())}") from error
    except (ParamValidationError, NoCredentialsError) as error:
        raise BadInputError(f"cannot send to {to}: {' '.join(str(error).split())}") from error
    except BotoCoreError as error:
        raise UnavailableError(f"{to} cannot be reached: {' '.join(str(error).split())}") from error
    finally:
        client.close()
    return PushSummary(to=to, files=len(files), size_bytes=total, sent_bytes=sent)


def _is_there(client: "S3Client", bucket: str, key: str, file: _File) -> bool:
    from botocore.exceptions import ClientError as S3Error

    try:
        found = client.head_object(Bucket=bucket, Key=key)
    except S3Error as error:
        if error.response.get("Error", {}).get("Code") in ("404", "NoSuchKey", "NotFound"):
            return False
        raise
    return (found["ContentLength"], found["Metadata"].get("sha256")) == (file.size_bytes, file.sha256)


def _network_error() -> type[Exception]:
    """Return the base of the network errors of whatever library this version of the hub's client speaks HTTP with."""
    from huggingface_hub.utils._http import get_session

    library = import_module(type(get_session()).__module__.partition(".")[0])
    base: type[Exception] = library.HTTPError
    return base


def _push_to_hub(files: list[_File], folder: Path, name: str) -> PushSummary:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(library_name="duquant")
    total = sum(file.size_bytes for file in files)
    try:
        # Private until its owner says otherwise. One commit, so the repository never holds half a checkpoint.
        api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=[file.name for file in files],
            commit_message="Packed INT4 checkpoint made by duquant",
        )
    except HFValidationError as error:
        raise BadInputError(f"hub:{name} is no repository: {error}") from error
    except HfHubHTTPError as error:
        raise ClientError(f"the hub refuses {name}: {' '.join(str(error).split())}") from error
    except (_network_error(), OSError) as error:
        raise UnavailableError(f"the hub cannot be reached: {' '.join(str(error).split())}") from error
    return PushSummary(to=f"hub:{name}", files=len(files), size_bytes=total, sent_bytes=total)
