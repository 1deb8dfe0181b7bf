"""Packed linears and their shared sites."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from duquant.config import ActivationConfig, KVCacheConfig, Recipe, WeightConfig
from duquant.inference import load
from duquant.inference.modules import DuQuantLinear
from duquant.models.families.llama import LLAMA
from duquant.quantizers.packing import unpack


@pytest.fixture
def model(tiny_artifact: Callable[..., Any]) -> Any:
    """The default artifact, loaded."""
    return load(tiny_artifact().artifact)[0]


def test_site_is_computed_once_for_all_its_linears(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    X = torch.randn(1, 4, 64).bfloat16()
    (readers,) = attention.attn_in.readers
    results = [readers.codes(X) for _ in range(4)]
    assert results[0] is results[1] is results[2]  # q, k, v
    assert results[3] is not results[0]


def test_site_of_one_linear_keeps_nothing(model: Any) -> None:
    (readers,) = model.model.layers[0].mlp.mlp_out.readers
    X = torch.randn(1, 4, 96).bfloat16()
    assert readers.codes(X) is not readers.codes(X)
    assert not readers.keeps_results


def test_other_tensor_of_the_same_values_is_computed_anew(model: Any) -> None:
    (readers,) = model.model.layers[0].self_attn.attn_in.readers
    X = torch.randn(1, 4, 64).bfloat16()
    assert readers.codes(X) is not readers.codes(X.clone())


def test_nothing_is_kept_after_a_forward_pass(model: Any) -> None:
    model(torch.ones(1, 5, dtype=torch.int64))
    sites = [
        module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] in {s.name for s in LLAMA.sites}
    ]
    assert len(sites) == 8
    assert not any(readers.keeps_results for site in sites for readers in site.readers)


def test_tensor_that_died_in_between_is_not_mistaken(model: Any) -> None:
    """q alone was called, its input is gone, and a new tensor may take the old one's address."""
    (readers,) = model.model.layers[0].self_attn.attn_in.readers
    readers.codes(torch.ones(1, 4, 64).bfloat16())
    result = readers.codes(torch.zeros(1, 4, 64).bfloat16())
    assert not bool(result.scale.gt(1e-6).any())


WEIGHTS = [WeightConfig(), WeightConfig(bits=8), WeightConfig(group_size=16), WeightConfig(symmetric=True)]


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
@pytest.mark.parametrize("bits", [4, 16])
def test_kernel_uses_exactly_the_dequantized_weight(
    tiny_artifact: Callable[..., Any], recipe: Recipe, weight: WeightConfig, bits: int
) -> None:
    chosen = replace(recipe, weight=weight, activation=ActivationConfig(bits=bits))
    loaded, _ = load(tiny_artifact(with_recipe=chosen).artifact)
    for site in LLAMA.sites:
        layer = loaded.model.layers[1]
        module = layer.get_submodule(site.module)
        for name in site.linears:
            linear = layer.get_submodule(name)
            assert isinstance(linear, DuQuantLinear)
            X = torch.randn(3, linear.in_features, generator=torch.Generator().manual_seed(0))
            entered = module.enter(X)
            exact = entered if bits == 16 else (entered.codes.float() - entered.zero_point) * entered.scale
            W = linear.dequantized_weight().double()
            expected = exact.double() @ W.T
            error = (linear(X).double() - expected).abs()
            # Roundings of the sums, not of the codes: relative to the magnitude that is summed.
            magnitude = exact.double().abs() @ W.abs().T + exact.abs().max().double() * W.abs().sum(1)
            assert bool((error <= 64 * torch.finfo(torch.float32).eps * magnitude).all())


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_unpacked_codes_are_exactly_the_weights_used(
    tiny_artifact: Callable[..., Any], recipe: Recipe, weight: WeightConfig
) -> None:
    """By compressed-tensors' own arithmetic on the files, in another order of operations."""
    from safetensors.torch import load_file

    artifact = tiny_artifact(with_recipe=replace(recipe, weight=weight)).artifact
    loaded, _ = load(artifact)
    stored = load_file(artifact / "model-layer-0000.safetensors")
    for name in LLAMA.linears_of(0):
        prefix = f"model.layers.0.{name}"
        rows, width = stored[f"{prefix}.weight_shape"].tolist()
        codes = unpack(stored[f"{prefix}.weight_packed"], width, bits=weight.bits)
        zero_point = unpack(stored[f"{prefix}.weight_zero_point"].T.contiguous(), rows, bits=weight.bits).T
        repeat = width // zero_point.shape[1]
        # Whole numbers below 256: their difference is exact in any dtype.
        difference = codes.int() - zero_point.int().repeat_interleave(repeat, dim=1)
        expected = difference.float() * stored[f"{prefix}.weight_scale"].repeat_interleave(repeat, dim=1)
        assert torch.equal(loaded.model.layers[0].get_submodule(name).dequantized_weight(), expected)


def test_weights_stay_packed_in_memory(tiny_artifact: Callable[..., Any], tiny_model: Callable[..., Path]) -> None:
    loaded, _ = load(tiny_artifact().artifact)
    for name in LLAMA.linears_of(0):
        linear = loaded.model.layers[0].get_submodule(name)
        size = sum(p.numel() * p.element_size() for p in linear.parameters())
        rows, width = linear.out_features, linear.in_features
        words = rows * -(-width // 8) * 4
        assert size == words + rows * 4 + -(-rows // 8) * 4 + 2 * 8
    linear.forward(torch.ones(1, linear.in_features))
    assert all(not p.is_floating_point() or p.shape[1] == 1 for p in linear.parameters())


def test_parameters_keep_the_dtype_of_the_file(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    assert attention.attn_in.R1.dtype == attention.attn_in.R2.dtype == torch.float32
    assert attention.attn_in.perm.dtype == torch.int16
    assert attention.attn_in.act_clip_ratio.dtype == torch.float32
    assert attention.q_proj.weight_scale.dtype == torch.float32
    assert attention.q_proj.weight_packed.dtype == torch.int32
    assert model.model.norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 5, 64), (1, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear_keeps_batch_shape_and_dtype(model: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    linear = model.model.layers[0].self_attn.o_proj
    Y = linear(torch.ones(shape, dtype=dtype))
    assert Y.shape == (*shape[:-1], 64)
    assert Y.dtype == dtype


def test_bias_is_added(tiny_artifact: Callable[..., Any], tiny_model: Callable[..., Path], recipe: Recipe) -> None:
    loaded, _ = load(tiny_artifact(tiny_model("qwen2"), replace(recipe, kv_cache=KVCacheConfig(bits=16))).artifact)
    q = loaded.model.layers[0].self_attn.q_proj
    assert q.bias is not None
    assert bool(q.bias.abs().max() > 0.1)
    torch.testing.assert_close(q(torch.zeros(1, 64)), q.bias.float()[None], rtol=0, atol=1e-6)


def test_words_of_a_site_are_in_memory_once(model: Any) -> None:
    model(torch.ones(1, 5, dtype=torch.int64))
    layer = model.model.layers[0]
    for site in LLAMA.sites:
        linears = [layer.get_submodule(name) for name in site.linears]
        joined = layer.get_submodule(site.module).readers[0].joined.data
        storages = {each.weight_packed.untyped_storage().data_ptr() for each in linears}
        assert storages == {joined.untyped_storage().data_ptr()}
        assert joined.untyped_storage().nbytes() == sum(each.weight_packed.nbytes for each in linears)


def test_running_changes_no_stored_tensor(model: Any) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(torch.ones(1, 5, dtype=torch.int64))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_copy_of_a_model_that_has_run_reads_its_own_weights(model: Any) -> None:
    ids = torch.ones(1, 5, dtype=torch.int64)
    expected = model(ids).logits
    other = copy.deepcopy(model)
    assert torch.equal(other(ids).logits, expected)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight_packed.zero_()
    assert torch.equal(other(ids).logits, expected)


def test_loaded_weights_are_noticed(model: Any) -> None:
    ids = torch.ones(1, 5, dtype=torch.int64)
    before = model(ids).logits
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = "model.layers.0.mlp.down_proj.weight_scale"
    model.load_state_dict({**state, name: state[name] * 3})
    assert not torch.equal(model(ids).logits, before)
    model.load_state_dict(state)
    assert torch.equal(model(ids).logits, before)


@torch.no_grad()
def test_moved_parameters_are_noticed(model: Any) -> None:
    """Moving a model puts new data into the same parameters; what they were before may be anything by then."""
    ids = torch.ones(1, 5, dtype=torch.int64)
    before = model(ids).logits
    left = [parameter.data for parameter in model.parameters()]
    model._apply(torch.clone)
    for tensor in left:
        tensor.zero_()
    assert torch.equal(model(ids).logits, before)
