"""What tells a changed calibration text from an unchanged one, without reading it."""

from pathlib import Path

from infra.storage import ObjectInfo


def file_identity(path: Path) -> str:
    """Return the identity of a text file: its size and its time of change."""
    status = path.stat()
    return f"{status.st_size}:{status.st_mtime_ns}"


def object_identity(info: ObjectInfo) -> str:
    """Return the identity of a text object: its hash, or its size for objects that others have put without one."""
    return info.sha256 or f"size:{info.size_bytes}"
