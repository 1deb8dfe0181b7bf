"""The preset `atom`: two kinds of codes in one linear, from the pipeline to generate()."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from duquant.artifact import read_manifest, verify
from duquant.config import ActivationConfig, CalibrationConfig, KVCacheConfig, Recipe, WeightConfig, preset
from duquant.errors import ConfigError
from duquant.inference import load
from duquant.inference.loading import save
from duquant.kernels import QuantizedActivation, transform_quantize_pack
from duquant.models.families.llama import LLAMA
from duquant.pipeline import ModelRun
from duquant.quantizers.activation import round_activations
from duquant.quantizers.packing import unpack

OUTLIERS = 16


def dequantized(X: QuantizedActivation) -> torch.Tensor:
    grouped = X.codes.view(*X.scale.shape, -1).float()
    return ((grouped - X.zero_point[..., None]) * X.scale[..., None]).view(len(X.scale), -1)


@pytest.fixture
def atom(calibration: CalibrationConfig) -> Recipe:
    """The preset, its sizes an eighth of what they are: sites here have 64 and 96 channels."""
    chosen = preset("atom")
    return replace(
        chosen,
        weight=replace(chosen.weight, group_size=16),
        activation=replace(chosen.activation, group_size=16),
        calibration=calibration,
        outlier_channels=OUTLIERS,
    )


def test_linears_are_packed_in_two_parts_and_the_manifest_counts_both(
    tiny_artifact: Callable[..., Any], atom: Recipe
) -> None:
    artifact = tiny_artifact(with_recipe=atom).artifact
    assert verify(artifact).ok
    tensors = load_file(artifact / "model-layer-0000.safetensors")
    prefix = "model.layers.0.mlp.down_proj"
    assert tensors[f"{prefix}.weight_packed"].shape == (64, 80 // 8)
    assert tensors[f"{prefix}.weight_scale"].shape == (64, 5)
    assert tensors[f"{prefix}.outlier_packed"].shape == (64, OUTLIERS // 4)
    assert tensors[f"{prefix}.outlier_scale"].shape == (64, 1)
    assert tensors[f"{prefix}.weight_shape"].tolist() == [64, 80]
    assert sorted(tensors["model.layers.0.mlp.mlp_out.perm"].tolist()) == list(range(96))
    codes = unpack(tensors[f"{prefix}.outlier_packed"], OUTLIERS, bits=8)
    assert int(codes.abs().max()) > 7  # more than 4 bits hold
    summary = read_manifest(artifact).summary
    layers = [load_file(path) for path in sorted(artifact.glob("model-layer-*.safetensors"))]
    held = sum(tensor.nbytes for layer in layers for tensor in layer.values())
    assert summary["quantized_weights"] == 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)
    assert summary["bits_per_weight"] == round(8 * held / summary["quantized_weights"], 4)


def test_every_linear_computes_with_its_dequantized_parts(tiny_artifact: Callable[..., Any], atom: Recipe) -> None:
    """And with activations as round_activations has them, which is what the pipeline measured errors with."""
    model, _ = load(tiny_artifact(with_recipe=atom).artifact)
    layer = model.model.layers[1]
    for site in LLAMA.sites:
        module = layer.get_submodule(site.module)
        for name in site.linears:
            linear = layer.get_submodule(name)
            X = torch.randn(5, linear.in_features, generator=torch.Generator().manual_seed(0))
            X[:, 7] *= 30.0
            ordered = X[:, module.perm.long()]
            rounded = round_activations(ordered, atom.activation, module.act_clip_ratio, outliers=OUTLIERS)
            parts = zip(module.in_parts(X), (module.prepared(), module.prepared_outliers()), strict=True)
            exact = torch.cat([dequantized(transform_quantize_pack(part, each)) for part, each in parts], dim=1)
            # The kernels multiply by the reciprocal of a scale: next to a tie that may be another code.
            assert float((exact != rounded).float().mean()) < 0.02
            exact = exact.double()
            W = linear.dequantized_weight().double()
            error = (linear(X).double() - exact @ W.T).abs()
            assert bool((error <= 64 * torch.finfo(torch.float32).eps * (exact.abs() @ W.abs().T + 1e-6)).all())


def test_outliers_in_8_bits_bring_the_model_nearer_to_the_source(
    tiny_model: Callable[..., Path], tiny_artifact: Callable[..., Any], atom: Recipe
) -> None:
    original = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    tokens = torch.randint(3, 259, (2, 24), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = original(tokens).logits
        errors = []
        for outliers in (0, OUTLIERS):
            chosen = replace(atom, outlier_channels=outliers, kv_cache=KVCacheConfig(bits=16))
            model, _ = load(tiny_artifact(with_recipe=chosen).artifact)
            errors.append(float((model(tokens).logits.float() - expected).norm()))
    assert errors[1] < 0.9 * errors[0]


def test_it_generates_and_saves_the_bytes_it_was_loaded_from(
    tiny_artifact: Callable[..., Any], atom: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    artifact = tiny_artifact(with_recipe=atom).artifact
    model, tokenizer = load(artifact)
    with caplog.at_level(logging.WARNING):
        output = model.generate(**tokenizer("Line 3", return_tensors="pt"), max_new_tokens=6, do_sample=False)
    assert output.shape[1] > 6
    save(model, tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        assert path.read_bytes() == (artifact / path.name).read_bytes()


def test_groups_of_activations_without_outliers(tiny_artifact: Callable[..., Any], recipe: Recipe) -> None:
    """Asymmetric ones, behind a rotation."""
    chosen = replace(
        recipe, weight=WeightConfig(group_size=16), activation=ActivationConfig(group_size=16, clip_ratio=0.9)
    )
    model, _ = load(tiny_artifact(with_recipe=chosen).artifact)
    layer = model.model.layers[0]
    module, linear = layer.self_attn.attn_in, layer.self_attn.q_proj
    X = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    exact = round_activations(module._transform().apply(X), chosen.activation, module.act_clip_ratio).double()
    W = linear.dequantized_weight().double()
    torch.testing.assert_close(linear(X).double(), exact @ W.T, rtol=1e-4, atol=1e-4)


def test_more_outliers_than_channels_are_refused_at_once(
    tiny_model: Callable[..., Path], atom: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="outlier_channels is 64, and site attn_in has 64 channels"):
        ModelRun(tiny_model(), replace(atom, outlier_channels=64), tmp_path, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"activation": {"group_size": 64}}, "activation.group_size"),
        ({"outlier_channels": -1}, "recipe.outlier_channels"),
        ({"outlier_channels": 8, "activation": {"bits": 16}}, "outlier_channels"),
        ({"outlier_channels": 8, "activation": {"clip": "search"}}, "outlier_channels"),
        ({"outlier_channels": 8, "transform": {"rotation": "hadamard"}}, "outlier_channels"),
        ({"outlier_channels": 8, "transform": {"smooth_alpha": 0.5}}, "outlier_channels"),
        ({"outlier_channels": 8, "weight": {"clip": "learned"}}, "outlier_channels"),
        ({"outlier_channels": 8, "weight": {"clip": "output"}}, "outlier_channels"),
    ],
)
def test_what_does_not_go_together_is_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe.from_dict(changes)
    assert caught.value.facts["field"] == field
