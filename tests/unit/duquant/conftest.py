"""Tiny random models with a byte-level tokenizer, made on the fly and kept for the session."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import make_tiny_model

from duquant.config import (
    ActivationConfig,
    CalibrationConfig,
    KVCacheConfig,
    Recipe,
    TextSource,
    TransformConfig,
    WeightConfig,
)
from duquant.pipeline import QuantizeSummary, quantize_model

ModelFactory = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices here are too small to share out; waking threads would take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> ModelFactory:
    """Factory of model directories: tiny_model("qwen2", num_hidden_layers=3). Equal calls share one directory."""
    made: dict[str, Path] = {}

    def make(model_type: str = "llama", *, shard_size: str = "1GB", seed: int = 0, **changes: Any) -> Path:
        key = repr((model_type, shard_size, seed, sorted(changes.items())))
        if key not in made:
            path = tmp_path_factory.mktemp(model_type)
            make_tiny_model(path, model_type, shard_size=shard_size, seed=seed, **changes)
            made[key] = path
        return made[key]

    return make


@pytest.fixture
def own_model(tiny_model: ModelFactory, tmp_path: Path) -> ModelFactory:
    """As tiny_model, but a copy that the test may damage."""

    def make(*args: Any, **kwargs: Any) -> Path:
        target = tmp_path / "model"
        shutil.copytree(tiny_model(*args, **kwargs), target)
        return target

    return make


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of about 3,000 bytes with some structure."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    lines = [f"Line {n}: the quick brown fox counts to {n * n} and jumps, {'again ' * (n % 4)}\n" for n in range(40)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def calibration(text_file: Path) -> CalibrationConfig:
    """Six windows of 32 tokens in two shards."""
    source = TextSource(kind="file", name=str(text_file))
    return CalibrationConfig(source=source, samples=6, seq_len=32, shards=2, micro_batch=2, search_tokens=48)


@pytest.fixture(scope="session")
def recipe(calibration: CalibrationConfig) -> Recipe:
    """Everything switched on: W4A4KV4, smoothing, greedy rotations, zigzag, searched clips."""
    return Recipe(
        name="tiny",
        transform=TransformConfig(
            smooth_alpha=0.5, rotation="greedy", permutation="zigzag", block_size=16, greedy_steps=8
        ),
        weight=WeightConfig(clip="search"),
        activation=ActivationConfig(clip_ratio=0.9),
        kv_cache=KVCacheConfig(bits=4, rotate=True, clip_ratio=0.95),
        calibration=calibration,
        seed=3,
    )


@pytest.fixture(scope="session")
def fine_recipe(recipe: Recipe) -> Recipe:
    """The same transform with little rounding: 8-bit weights, 16-bit activations and cache."""
    return replace(
        recipe,
        name="fine",
        weight=WeightConfig(bits=8),
        activation=ActivationConfig(bits=16),
        kv_cache=KVCacheConfig(bits=16),
    )


ArtifactFactory = Callable[..., QuantizeSummary]


@pytest.fixture(scope="session")
def tiny_artifact(
    tiny_model: ModelFactory, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> ArtifactFactory:
    """Factory of artifacts: tiny_artifact(model, recipe). Equal calls share one directory: do not change it."""
    made: dict[tuple[Path, str, str], QuantizeSummary] = {}

    def make(model: Path | None = None, with_recipe: Recipe | None = None) -> QuantizeSummary:
        source, chosen = model or tiny_model(), with_recipe or recipe
        key = (source, chosen.name, chosen.digest())
        if key not in made:
            out = tmp_path_factory.mktemp("artifact") / "out"
            made[key] = quantize_model(str(source), out, chosen, device="cpu")
        return made[key]

    return make


@pytest.fixture
def own_artifact(tiny_artifact: ArtifactFactory, tmp_path: Path) -> Path:
    """A copy of the default artifact that the test may damage."""
    target = tmp_path / "artifact"
    shutil.copytree(tiny_artifact().artifact, target)
    return target
