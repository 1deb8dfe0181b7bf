"""What benchmarks/kv_cache.py measures is the cache that artifacts have."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from duquant.config import KVCacheConfig
from duquant.inference.cache import DuQuantCache
from duquant.quantizers.keys import KeySmoothing
from tests.support.tiny_models import make_tiny_model

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
IDS = torch.arange(1, 33)[None]


@pytest.fixture
def kv_cache(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("kv_cache")
    for name in ("kv_cache", "row_file", "quantize", "machine"):
        monkeypatch.delitem(sys.modules, name)
    return module


@pytest.fixture
def model(tmp_path: Path) -> Any:
    make_tiny_model(tmp_path / "model", "llama")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()


def logits(model: Any, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=True, **kwargs).logits


@pytest.mark.parametrize("smooth_keys", [False, True])
@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("rotate", [False, True])
def test_keys_rounded_after_the_embedding_are_those_of_our_cache(
    kv_cache: ModuleType, model: Any, rotate: bool, sinks: int, smooth_keys: bool
) -> None:
    config = KVCacheConfig(bits=4, rotate=rotate, clip_ratio=0.95, sink_tokens=sinks, smooth_keys=smooth_keys)
    layers, head_dim = model.config.num_hidden_layers, model.config.head_dim
    smoothing = None
    if smooth_keys:
        shape, generator = (layers, model.config.num_key_value_heads, head_dim), torch.Generator().manual_seed(0)
        centers, scales = (torch.randn(shape, generator=generator) for _ in range(2))
        smoothing = [KeySmoothing(center, scale.exp()) for center, scale in zip(centers, scales, strict=True)]
    with kv_cache.rounded_cache(model, config, place="after", values=config, smoothing=smoothing):
        found = [logits(model) for _ in range(2)]
    assert torch.equal(*found)
    by_layer = None if smoothing is None else dict(enumerate(smoothing))
    cache = DuQuantCache(config, windows=[None] * layers, head_dim=head_dim, smoothing=by_layer)
    torch.testing.assert_close(found[0], logits(model, past_key_values=cache), rtol=1e-4, atol=1e-4)


def test_places_differ_and_the_model_is_whole_again_afterwards(kv_cache: ModuleType, model: Any) -> None:
    config = KVCacheConfig(bits=4)
    whole, found = logits(model), {}
    for place in kv_cache.PLACES:
        with kv_cache.rounded_cache(model, config, place=place):
            found[place] = logits(model)
    assert not torch.allclose(found["after"], found["before"])
    assert torch.equal(logits(model), whole)
