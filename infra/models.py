"""Which models may be quantized: references are structured, checked against an allow-list, and never parsed twice."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from infra.errors import ModelForbidden, ModelNotFound, PathForbidden, PathNotFound
from infra.paths import find_under, require_under
from infra.settings import InfraSettings

DEMO_MODELS = frozenset({"smollm2-135m", "gemma3-270m"})
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LARGEST_CONFIG = 1_000_000
_PICKLED = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})


@dataclass(frozen=True, slots=True)
class ModelRef:
    """Which model: one of the demo's, a folder under a model root, or a hub repository at one commit."""

    source: Literal["demo", "local", "hub"]
    name: str
    revision: str | None = None


class ModelCatalog:
    """Decides about model references. Nothing outside the roots is ever looked at, whatever a name says."""

    def __init__(self, roots: Iterable[Path], *, allow_hub: bool = False) -> None:
        self._roots = tuple(roots)
        self._allow_hub = allow_hub

    @classmethod
    def from_settings(cls, settings: InfraSettings) -> Self:
        """Return the catalog that the settings describe."""
        return cls(settings.model_roots, allow_hub=settings.allow_hub)

    def check(self, ref: ModelRef) -> str:
        """Return the model's identity: equal for equal weights, part of a job's fingerprint.

        Raises:
            ModelForbidden: the reference is not allowed here, or points to an unsafe checkpoint.
            ModelNotFound: it is allowed, and there is nothing.
        """
        match ref.source:
            case "demo":
                return self._check_demo(ref)
            case "local":
                return f"local:{_folder_digest(self.local_path(ref))}"
            case "hub":
                return self._check_hub(ref)
        raise ModelForbidden(f"unknown model source {ref.source!r}")

    def _check_demo(self, ref: ModelRef) -> str:
        if ref.name not in DEMO_MODELS:
            raise ModelNotFound(f"no demo model {ref.name!r}; there is: {', '.join(sorted(DEMO_MODELS))}")
        if ref.revision is not None:
            raise ModelForbidden("a demo model has no revisions")
        return f"demo:{ref.name}"

    def _check_hub(self, ref: ModelRef) -> str:
        if not self._allow_hub:
            raise ModelForbidden("models from the hub are switched off (DUQUANT_ALLOW_HUB)")
        if not _REPOSITORY.fullmatch(ref.name) or ".." in ref.name or "--" in ref.name:
            raise ModelForbidden("a hub model is named OWNER/NAME", name=ref.name)
        if ref.revision is None or not _COMMIT.fullmatch(ref.revision):
            raise ModelForbidden("a hub model needs a revision of 40 hexadecimal digits: branches and tags can move")
        return f"hub:{ref.name}@{ref.revision}"

    def local_path(self, ref: ModelRef) -> Path:
        """Return the real folder of a local model.

        Raises:
            ModelForbidden: the name leaves the roots, or the checkpoint is in a format that can run code.
            ModelNotFound: no root has such a folder with a config.json.
        """
        if ref.source != "local":
            raise ModelForbidden(f"a {ref.source} model has no local folder")
        if ref.revision is not None:
            raise ModelForbidden("a local model has no revisions")
        try:
            folder = find_under(self._roots, ref.name)
            _check_folder(folder, self._roots, ref.name)
        except PathForbidden as error:
            raise ModelForbidden(f"model {error}", name=ref.name) from error
        except PathNotFound as error:
            raise ModelNotFound(f"no model {ref.name} under the model roots", name=ref.name) from error
        return folder


def _check_folder(folder: Path, roots: Iterable[Path], name: str) -> None:
    if not (folder / "config.json").is_file():
        raise ModelNotFound(f"model {name} has no config.json", name=name)
    for file in folder.rglob("*"):
        # A link inside the folder could lead to any file of the machine.
        require_under(roots, file)
    _refuse_remote_code(folder / "config.json", name)
    files = [file for file in folder.iterdir() if file.is_file()]
    if any(file.suffix == ".safetensors" for file in files):
        return
    if pickled := sorted(file.name for file in files if file.suffix in _PICKLED):
        raise ModelForbidden(
            f"model {name} has only pickled weights ({pickled[0]}), which can run code; convert it to safetensors",
            name=name,
        )
    raise ModelNotFound(f"model {name} has no .safetensors files", name=name)


def _refuse_remote_code(config: Path, name: str) -> None:
    """Raise ModelForbidden if a checkpoint wants Python files of its own run; they never are."""
    try:
        values = json.loads(config.read_bytes()) if config.stat().st_size <= _LARGEST_CONFIG else {}
    except (OSError, ValueError, RecursionError):
        return  # the job will say what is wrong with it
    if isinstance(values, dict) and "auto_map" in values:
        raise ModelForbidden(f"model {name} has an auto_map, which asks for remote code; it is never run", name=name)


def _folder_digest(folder: Path) -> str:
    """Hash what tells a changed checkpoint apart without reading its weights: names, sizes and times of change."""
    lines = sorted((file.relative_to(folder).as_posix(), *_size_and_time(file)) for file in _files(folder))
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in folder.rglob("*") if file.is_file())


def _size_and_time(file: Path) -> tuple[int, int]:
    facts = file.stat()
    return facts.st_size, facts.st_mtime_ns
