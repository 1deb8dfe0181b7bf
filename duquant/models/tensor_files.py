"""Writing safetensors files whole or not at all, and hashing tensors."""

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from duquant.errors import ScratchError

_OS_ERROR = re.compile(r"os error (\d+)")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], *, metadata: dict[str, str] | None = None) -> None:
    """Write tensors, sorted by name, to a scratch file and rename it to `path`. Equal tensors give equal bytes.

    Raises:
        OSError: the disk is full or not writable; safetensors' own error hides the number that says so.
    """
    ordered = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    staged = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        save_file(ordered, staged, metadata=metadata)
        staged.rename(path)
    except SafetensorError as err:
        number = _OS_ERROR.search(str(err))
        if number is None:
            raise
        code = int(number.group(1))
        raise OSError(code, os.strerror(code), str(path)) from err
    finally:
        staged.unlink(missing_ok=True)


def read_tensors(path: Path, what: str, *, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a scratch file, on the CPU, and its metadata.

    Args:
        path: the file.
        what: it is, for messages.
        prefix: of the tensors' names; they are returned by what follows it.

    Raises:
        ScratchError: the file is missing or broken; a broken one is deleted, so that the next try makes it anew.
    """
    try:
        with safe_open(path, framework="pt") as reader:
            tensors = {name.removeprefix(prefix): reader.get_tensor(name) for name in list(reader.keys())}
            return tensors, reader.metadata() or {}
    except (OSError, SafetensorError) as err:
        if isinstance(err, SafetensorError):
            path.unlink(missing_ok=True)
        raise ScratchError(f"cannot read {what} {path}: {err}") from err


@contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill, which is renamed to `path` afterwards: it appears whole or not at all.

    Raises:
        OSError: the disk is full or not writable.
    """
    staged = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        staged.mkdir(parents=True)
        yield staged
        staged.rename(path)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file; the copy appears whole or not at all.

    Raises:
        OSError: the disk is full or not writable.
    """
    staged = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        shutil.copyfile(source, staged)
        staged.rename(target)
    finally:
        staged.unlink(missing_ok=True)


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256, in hex, of names, dtypes, shapes and bytes, in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
