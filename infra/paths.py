"""Files that users may name: plain names under allowed roots, and nothing else on the machine."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from infra.errors import PathForbidden, PathNotFound

# Plain names only: no percent sign, colon, backslash, query, fragment, space or control character, nothing hidden.
_SEGMENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_MAX_NAME = 512


def _real_roots(roots: Iterable[Path]) -> tuple[Path, ...]:
    """Return the roots without symbolic links, so that what is under them can be compared."""
    return tuple(Path(os.path.realpath(root.expanduser())) for root in roots)


def find_under(roots: Iterable[Path], name: str) -> Path:
    """Return the real path of the first root's file or folder with this name, such as `llama/7b`.

    Raises:
        PathForbidden: the name is not plain (absolute paths, "..", schemes, escapes), or a link leads out of its root.
        PathNotFound: no root has it.
    """
    parts = name.split("/")
    if len(name) > _MAX_NAME or not all(_SEGMENT.fullmatch(part) for part in parts):
        raise PathForbidden(f"{name[:80]!r} is not a plain name under an allowed folder", name=name)
    for root in _real_roots(roots):
        path = root.joinpath(*parts)
        if path.exists() or path.is_symlink():
            require_under([root], path)
            return Path(os.path.realpath(path))
    raise PathNotFound(f"there is no {name} under the allowed folders", name=name)


def require_under(roots: Iterable[Path], path: Path) -> None:
    """Raise PathForbidden if `path`, followed through its links, is outside all `roots`."""
    if not any(Path(os.path.realpath(path)).is_relative_to(root) for root in _real_roots(roots)):
        raise PathForbidden(f"{path.name} leads out of its allowed folder", path=str(path))
