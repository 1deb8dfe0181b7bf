"""What lies on the server's shelves: the models that may be named in a request, and their measures."""

import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from infra.errors import InfraError
from infra.models import DEMO_MODELS, ModelCatalog, ModelRef

_DEEPEST = 3
"""Folders below a root: `name`, `owner/name` and one more."""
_MOST_FOLDERS = 10_000
_MEMORY_S = 1.0
_LARGEST_CONFIG = 1_000_000
_BYTES_PER_FLOAT = 2
"""Embeddings, norms and the head stay in 16 bits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The sizes in a model's config.json that decide how long it takes and how large it becomes."""

    architecture: str
    """The model_type, such as llama."""
    layers: int
    hidden_size: int
    linear_params: int
    """Weights of the linear layers inside the decoder layers, which are quantized."""
    other_params: int
    """Weights of the embeddings and the head, which are not."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self | None:
        """Read a decoder's sizes, as transformers names them; none when some are missing or are no sizes.

        >>> config = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> ModelShape.from_config({**config, "vocab_size": 10, "tie_word_embeddings": True}).linear_params
        1280
        """
        heads = config.get("num_attention_heads")
        given = {
            "hidden": config.get("hidden_size"),
            "inner": config.get("intermediate_size"),
            "layers": config.get("num_hidden_layers"),
            "heads": heads,
            "vocabulary": config.get("vocab_size"),
            "key_heads": config.get("num_key_value_heads") or heads,
        }
        sizes = {name: size for name, size in given.items() if type(size) is int and 0 < size < 2**31}
        if sizes.keys() != given.keys():
            return None
        hidden, layers = sizes["hidden"], sizes["layers"]
        head_dim = config.get("head_dim") or hidden // sizes["heads"]
        if type(head_dim) is not int or not 0 < head_dim < 2**31:
            return None
        attention = 2 * hidden * head_dim * (sizes["heads"] + sizes["key_heads"])
        tables = 1 if config.get("tie_word_embeddings") else 2
        return cls(
            architecture=str(config.get("model_type", ""))[:100],
            layers=layers,
            hidden_size=hidden,
            linear_params=layers * (attention + 3 * hidden * sizes["inner"]),
            other_params=tables * sizes["vocabulary"] * hidden,
        )

    def quantized_bytes(self, weight_bits: int) -> int:
        """Return about how large the model is with its linear weights in so many bits."""
        return self.linear_params * weight_bits // 8 + self.other_params * _BYTES_PER_FLOAT


@dataclass(frozen=True, kw_only=True, slots=True)
class ShelfModel:
    """A model that a request may name."""

    ref: ModelRef
    shape: ModelShape | None
    size_bytes: int | None
    """Of its weights, as they are stored."""


class ModelShelf:
    """Lists models and measures one. It reads names, sizes and config.json, never weights."""

    def __init__(
        self, roots: Iterable[Path], catalog: ModelCatalog, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._roots = tuple(roots)
        self._catalog = catalog
        self._clock = clock
        self._lock = threading.Lock()
        self._walked_at = -math.inf
        self._found: Sequence[ShelfModel] = ()

    def list(self) -> Sequence[ShelfModel]:
        """Return the demo's models and the usable folders under the model roots, by name.

        As they were a moment ago: however many ask, the folders are walked once at a time, and not too often.
        """
        with self._lock:
            if self._clock() - self._walked_at >= _MEMORY_S:
                self._found = self._walk()
                self._walked_at = self._clock()
            return self._found

    def _walk(self) -> Sequence[ShelfModel]:
        demo = [ShelfModel(ref=ModelRef("demo", name), shape=None, size_bytes=None) for name in sorted(DEMO_MODELS)]
        local = []
        for name in sorted(set(self._names())):
            ref = ModelRef("local", name)
            try:
                folder = self._catalog.local_path(ref)
            except InfraError:
                continue  # not a model, or one that a request could not use either
            local.append(_measured(ref, folder))
        return demo + local

    def measure(self, ref: ModelRef) -> ShelfModel:
        """Return what is known of a model that the catalog has let through; hub and demo models are not looked into."""
        if ref.source != "local":
            return ShelfModel(ref=ref, shape=None, size_bytes=None)
        return _measured(ref, self._catalog.local_path(ref))

    def _names(self) -> Iterator[str]:
        seen = 0
        for root in self._roots:
            base = Path(os.path.realpath(root.expanduser()))
            for folder, subfolders, files in os.walk(base):
                seen += 1
                depth = len(Path(folder).relative_to(base).parts)
                if "config.json" in files and depth:
                    yield Path(folder).relative_to(base).as_posix()
                    subfolders.clear()
                if depth >= _DEEPEST or seen > _MOST_FOLDERS:
                    subfolders.clear()


def _measured(ref: ModelRef, folder: Path) -> ShelfModel:
    try:
        content = (folder / "config.json").read_bytes()[:_LARGEST_CONFIG]
        config = json.loads(content)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    except (OSError, ValueError, RecursionError):
        return ShelfModel(ref=ref, shape=None, size_bytes=None)
    shape = ModelShape.from_config(config) if isinstance(config, dict) else None
    return ShelfModel(ref=ref, shape=shape, size_bytes=size)
