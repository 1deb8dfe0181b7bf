"""A disk that a test can fill and free: a small file system, mounted in a namespace of the child's own."""

import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

_SCRIPT = """
mount -t tmpfs -o size="$1" tmpfs "$0/small" || exit 77
shift
{
    until [ -e "$0/fill" ]; do sleep 0.05; done
    cat /dev/zero > "$0/small/filler" 2> /dev/null
    until [ -e "$0/free" ]; do sleep 0.05; done
    rm "$0/small/filler"
} &
exec "$@"
"""


@cache
def can_mount() -> bool:
    """Whether this machine lets its user mount a file system."""
    if shutil.which("unshare") is None:
        return False
    probe = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


needs_mount = pytest.mark.skipif(not can_mount(), reason="this machine does not let its user mount a file system")


@dataclass(frozen=True)
class SmallDisk:
    """`folder` is where the two sides talk; the disk is its subfolder `path`, which only the child sees."""

    folder: Path
    size: str

    @property
    def path(self) -> Path:
        return self.folder / "small"

    def inside(self) -> list[str]:
        """Return what a command is to be begun with to have the disk."""
        self.path.mkdir(exist_ok=True)
        return ["unshare", "--map-root-user", "--mount", "sh", "-c", _SCRIPT, str(self.folder), self.size]

    def fill(self) -> None:
        (self.folder / "fill").touch()

    def free(self) -> None:
        (self.folder / "free").touch()
