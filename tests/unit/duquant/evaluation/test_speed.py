"""The kernel benchmark: fair contenders, a gate before the clock, a budget that says what it leaves out."""

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from duquant.config import ActivationConfig, KVCacheConfig, Recipe
from duquant.errors import KernelError
from duquant.evaluation import speed as speed_module
from duquant.evaluation.contenders import Transforms, dense_cache, dense_twin, kind_of, linear_bytes
from duquant.evaluation.loading import LoadedModel, load_for_evaluation
from duquant.evaluation.plan import SpeedConfig
from duquant.evaluation.speed import measure_speed
from duquant.evaluation.subjects import Load, cache_bytes, layer_call, model_call
from duquant.evaluation.timing import ceilings
from duquant.inference.modules import DuQuantLinear, SiteModule
from duquant.kernels.reference import ReferenceBackend

CONFIG = SpeedConfig(prefill_tokens=16, decode_batches=(1, 2), context=8, seconds=5.0)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rounds, big copies and products take seconds, and say nothing here."""
    monkeypatch.setattr(speed_module, "_MOST_ROUNDS", 4)
    monkeypatch.setitem(speed_module._FLUSH_BYTES, "cpu", 1 << 20)
    monkeypatch.setattr(speed_module, "ceilings", functools.partial(ceilings, copy_bytes=1 << 20, side=64))


@pytest.fixture
def artifact(tiny_artifact: Callable[..., Any]) -> LoadedModel:
    return load_for_evaluation(str(tiny_artifact().artifact), device="cpu")


def test_every_contender_is_timed_on_layer_and_model(artifact: LoadedModel) -> None:
    seen: list[tuple[int, int]] = []
    found = measure_speed(artifact, CONFIG, on_progress=lambda *done: seen.append(done))
    assert found["artifact"] == "duquant"
    assert found["skipped"] == []
    assert seen == [(n, 6) for n in range(1, 7)]
    for scope in ("layer", "model"):
        assert [(row["phase"], row["batch"]) for row in found[scope]] == [("prefill", 1), ("decode", 1), ("decode", 2)]
        for row in found[scope]:
            medians = {kind: times["median_ms"] for kind, times in row["times"].items()}
            assert set(medians) == {"bfloat16", "rtn", "hadamard", "duquant"}
            for kind in ("rtn", "hadamard", "duquant"):
                assert row["speedup"][kind] == pytest.approx(medians["bfloat16"] / medians[kind], abs=1e-3)
            assert row["transform_overhead"]["duquant"] == pytest.approx(
                medians["duquant"] / medians["rtn"] - 1, abs=1e-3
            )
            assert row["tokens_per_second"]["rtn"] == pytest.approx(row["tokens"] / medians["rtn"] * 1e3, rel=1e-3)
    assert len(found["checked"]) == 3
    assert json.loads(json.dumps(found)) == found


def test_what_does_not_fit_the_time_is_listed(artifact: LoadedModel) -> None:
    found = measure_speed(artifact, replace(CONFIG, prefill_tokens=20_000, seconds=1.0))
    # The first row is there all the same.
    assert [row["phase"] for row in found["layer"]][-1] == "decode"
    assert not any(row["tokens"] == 20_000 for scope in ("layer", "model") for row in found[scope])
    left_out = [entry for entry in found["skipped"] if entry["what"] == "prefill of 20000 tokens"]
    assert [entry["scope"] for entry in left_out] == ["layer", "model"]
    assert "of the time are left" in left_out[0]["reason"]


def test_what_does_not_fit_the_memory_is_listed(artifact: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_module, "_free_bytes", lambda _device: 1000.0)
    found = measure_speed(artifact, CONFIG)
    assert {entry["what"] for entry in found["skipped"]} >= {"bfloat16", "decode of batch 1"}
    assert all("do not fit the free memory" in entry["reason"] for entry in found["skipped"])


def test_nothing_is_timed_when_a_product_is_wrong(artifact: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ReferenceBackend.int4_linear

    def wrong(*args: Any, **kwargs: Any) -> torch.Tensor:
        return right(*args, **kwargs) + 1e-3

    monkeypatch.setattr(ReferenceBackend, "int4_linear", wrong)
    with pytest.raises(KernelError, match=r"an INT4 product .* is wrong on this machine; nothing was timed"):
        measure_speed(artifact, CONFIG)


def test_nothing_is_timed_when_a_transform_is_wrong(artifact: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ReferenceBackend.transform_quantize_pack

    def wrong(self: ReferenceBackend, X: torch.Tensor, transform: Any) -> Any:
        return right(self, X.roll(1, dims=1), transform)

    monkeypatch.setattr(ReferenceBackend, "transform_quantize_pack", wrong)
    with pytest.raises(KernelError, match="transform is wrong by"):
        measure_speed(artifact, CONFIG)


def test_the_artifact_is_itself_again_afterwards(artifact: LoadedModel) -> None:
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        before = artifact.model(ids).logits
        measure_speed(artifact, CONFIG)
        assert torch.equal(artifact.model(ids).logits, before)


def test_an_unquantized_model_is_timed_alone(tiny_model: Callable[..., Path]) -> None:
    loaded = load_for_evaluation(str(tiny_model()), device="cpu")
    found = measure_speed(loaded, CONFIG)
    assert found["artifact"] is None
    assert {kind for row in found["model"] for kind in row["times"]} == {"bfloat16"}
    assert "linears" not in found["memory"]


def test_an_artifact_with_16_bit_activations_has_no_other_transforms(
    tiny_artifact: Callable[..., Any], recipe: Recipe
) -> None:
    plain = replace(recipe, name="w4", activation=ActivationConfig(bits=16), kv_cache=KVCacheConfig(bits=16))
    loaded = load_for_evaluation(str(tiny_artifact(None, plain).artifact), device="cpu")
    found = measure_speed(loaded, CONFIG)
    assert {kind for row in found["layer"] for kind in row["times"]} == {"bfloat16", "artifact"}


def test_the_kind_of_an_artifact_is_its_transform(recipe: Recipe) -> None:
    def with_transform(**changes: Any) -> Recipe:
        return replace(recipe, transform=replace(recipe.transform, **changes))

    assert kind_of(recipe) == "duquant"
    assert kind_of(with_transform(permutation="none")) == "hadamard"
    assert kind_of(with_transform(rotation="none", permutation="none")) == "rtn"


def test_contenders_share_weights_and_differ_in_transforms(artifact: LoadedModel) -> None:
    model = artifact.model
    ids = torch.arange(10)[None]
    with torch.inference_mode():
        own = model(ids).logits
        weights = [module.weight_packed.clone() for module in model.modules() if isinstance(module, DuQuantLinear)]
        transforms = Transforms(model, artifact.recipe)  # type: ignore[arg-type]  # an artifact has one
        outputs = {}
        for kind in transforms.kinds:
            transforms.use(kind)
            outputs[kind] = model(ids).logits
    assert torch.equal(outputs["duquant"], own)
    assert not torch.equal(outputs["rtn"], own)
    assert not torch.equal(outputs["hadamard"], outputs["rtn"])
    after = [module.weight_packed for module in model.modules() if isinstance(module, DuQuantLinear)]
    assert all(torch.equal(a, b) for a, b in zip(weights, after, strict=True))
    transforms.use("rtn")
    sites = [module.prepared().transform for module in model.modules() if isinstance(module, SiteModule)]
    assert all(site.R1 is None and site.perm is None for site in sites)


def test_the_twin_computes_with_the_artifact_s_dequantized_weights(artifact: LoadedModel) -> None:
    twin = dense_twin(artifact.model)
    linear = artifact.model.model.layers[1].mlp.down_proj
    X = torch.randn(3, linear.in_features).bfloat16()
    expected = torch.nn.functional.linear(X, linear.dequantized_weight().bfloat16())
    assert torch.equal(twin.model.layers[1].mlp.down_proj(X), expected)
    assert twin.model.embed_tokens.weight.data_ptr() == artifact.model.model.embed_tokens.weight.data_ptr()
    assert bool(torch.isfinite(twin(torch.arange(9)[None]).logits).all())
    assert len(dense_twin(artifact.model, layers=1).model.layers) == 1


def test_the_dense_cache_gives_what_transformers_own_gives(tiny_model: Callable[..., Path]) -> None:
    model = load_for_evaluation(str(tiny_model()), device="cpu").model
    ids = torch.randint(0, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        cache = dense_cache(len(model.model.layers), room=9)
        model(ids[:, :6], past_key_values=cache)
        model(ids[:, 6:7], past_key_values=cache)
        for layer in cache.layers:
            layer.crop(-1)
        stepwise = model(ids[:, 6:], past_key_values=cache).logits
        whole = model(ids, use_cache=False).logits[:, 6:]
    assert torch.allclose(stepwise.float(), whole.float(), atol=0.1)


@pytest.mark.parametrize("make", [layer_call, model_call])
def test_contexts_do_not_grow_while_they_are_timed(artifact: LoadedModel, make: Any) -> None:
    load = Load("decode", batch=2, tokens=2, context=8)
    lengths = []
    layer = artifact.model.model.layers[0].self_attn

    def note(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        lengths.append(kwargs["past_key_values"].get_seq_length())

    with torch.inference_mode():
        call = make(artifact.model, load)
        hook = layer.register_forward_pre_hook(note, with_kwargs=True)
        call()
        call()
        hook.remove()
    assert lengths == [8, 8]


def test_bytes_of_linears_and_caches_count_every_piece_once(artifact: LoadedModel) -> None:
    model = artifact.model
    with torch.inference_mode():
        model(torch.arange(4)[None])
    sizes = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, DuQuantLinear)]
    found = linear_bytes(model)
    assert found["bfloat16"] == sum(2 * inner * outer for inner, outer in sizes)
    # Codes of half a byte, and beside them grids for each output channel.
    codes = sum(inner * outer // 2 for inner, outer in sizes)
    assert codes < found["int4"] < codes + 64 * sum(outer for _, outer in sizes)
    load = Load("decode", batch=3, tokens=3, context=8)
    cache = model.duquant_new_cache()
    states = torch.randn(3, 2, 8, 16).bfloat16()
    for layer in range(2):
        cache.update(states, states, layer)
    assert cache_bytes(model, load, layers=2) == cache.size_bytes()
