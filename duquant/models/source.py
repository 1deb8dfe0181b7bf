"""SourceCheckpoint: one layer's tensors at a time out of a Hugging Face directory of safetensors."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from duquant.errors import SourceError
from duquant.models.architecture import Architecture
from duquant.models.families import architecture_of
from duquant.models.magnitudes import is_finite

_CHECK_CHUNK = 1 << 18
_WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files that are copied to the artifact as they are, where present."""


class SourceCheckpoint:
    """A model on disk, read lazily: opening it reads JSON and headers, `layer_tensors` maps one layer's bytes.

    Raises:
        SourceError: the directory, config.json or a weight file is missing, truncated or not safetensors.
        UnsupportedModelError: no adapter for this architecture.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise SourceError(f"{self.path} is not a directory; give the directory that holds config.json")
        self.config: Mapping[str, Any] = read_json(self.path / "config.json")
        self.architecture: Architecture = architecture_of(self.config)
        self._file_of = self._index()

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return int(self.config["num_hidden_layers"])

    def tensor_names(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        return sorted(self._file_of)

    def layer_tensors(self, layer: int, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the named tensors of one decoder layer, by their names inside the layer.

        Raises:
            SourceError: a tensor is missing, cannot be read, or holds NaN or Inf.
        """
        prefix = f"{self.architecture.layers_prefix}.{layer}."
        stored = {name: prefix + self.architecture.stored_name(name) for name in names}
        tensors = self.tensors(stored.values())
        return {name: tensors[full] for name, full in stored.items()}

    def embedding_table(self) -> Float[Tensor, "vocab hidden"]:
        """Return the embeddings.

        Raises:
            SourceError: see `tensors`.
        """
        name = self.architecture.embeddings
        return self.tensors([name])[name]

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the named tensors on the CPU, checked for NaN and Inf.

        Raises:
            SourceError: a tensor is missing, cannot be read, is no floating-point weight, or holds NaN or Inf.
        """
        by_file: dict[str, list[str]] = {}
        for name in names:
            if name not in self._file_of:
                raise SourceError(f"{self.path}: tensor {name} is missing from the checkpoint")
            by_file.setdefault(self._file_of[name], []).append(name)
        found: dict[str, Tensor] = {}
        for file, members in by_file.items():
            with self._open(file) as reader:
                for name in members:
                    try:
                        tensor = reader.get_tensor(name)
                    except (SafetensorError, OSError) as err:
                        raise SourceError(f"{self.path / file}: cannot read {name}: {err}") from err
                    if tensor.dtype not in _WEIGHT_DTYPES:
                        raise SourceError(
                            f"{self.path / file}: {name} has dtype {tensor.dtype}; is the model already quantized?"
                        )
                    if not _is_finite(tensor):
                        raise SourceError(f"{self.path / file}: {name} holds NaN or Inf")
                    found[name] = tensor
        return found

    def _open(self, file: str) -> Any:
        try:
            return safe_open(self.path / file, framework="pt")
        except FileNotFoundError as err:
            raise SourceError(f"{self.path / file} is missing although the index names it") from err
        except (SafetensorError, OSError) as err:
            raise SourceError(f"{self.path / file} is truncated or not a safetensors file: {err}") from err

    def _index(self) -> dict[str, str]:
        """Return tensor name -> file name, opening every file once so that a broken one is found at the start."""
        index = self.path / "model.safetensors.index.json"
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise SourceError(f"{index} has no weight_map")
            for file in weight_map.values():
                if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                    raise SourceError(f"{index} names {file!r}, which is not a safetensors file beside it")
            files = sorted(set(weight_map.values()))
        elif (self.path / "model.safetensors").exists():
            files = ["model.safetensors"]
        else:
            unsafe = sorted(p.name for p in self.path.iterdir() if p.suffix in _UNSAFE_SUFFIXES)
            if unsafe:
                raise SourceError(
                    f"{self.path} holds only pickled weights ({', '.join(unsafe[:3])}), which run code when loaded; "
                    "convert the model to safetensors first"
                )
            raise SourceError(f"{self.path} has no model.safetensors and no model.safetensors.index.json")
        file_of: dict[str, str] = {}
        for file in files:
            with self._open(file) as reader:
                file_of.update(dict.fromkeys(reader.keys(), file))
        return file_of


def _is_finite(tensor: Tensor) -> bool:
    # A little at a time: the check makes copies of what it is given.
    return all(is_finite(chunk) for chunk in torch.split(tensor.reshape(-1), _CHECK_CHUNK))


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file.

    Raises:
        SourceError: the file is missing or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise SourceError(f"{path} is missing") from err
    except (OSError, ValueError) as err:
        raise SourceError(f"{path} is not readable JSON: {err}") from err
    if not isinstance(value, dict):
        raise SourceError(f"{path} must hold a JSON object")
    return value
