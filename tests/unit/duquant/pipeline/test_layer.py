"""quantize_layer: exact before rounding, pure, and bound by the laws of its parts."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import SIZES
from torch import Tensor

from duquant.calibration.keys import KeyStatistics
from duquant.calibration.statistics import SiteStatistics, StatisticsRecorder
from duquant.config import ActivationConfig, Recipe, TransformConfig, WeightConfig
from duquant.errors import CalibrationError, ConfigError
from duquant.models.architecture import Site
from duquant.models.families.llama import LLAMA
from duquant.models.skeleton import Skeleton
from duquant.models.source import SourceCheckpoint
from duquant.pipeline.folds import Folds, LayerShape, smooth
from duquant.pipeline.layer import QuantizedLayer, quantize_layer
from duquant.pipeline.site import site_seed
from duquant.quantizers.packing import unpack
from duquant.transforms.site import Moments, SiteTransform, search_transform

CPU = torch.device("cpu")
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 72}),
    ("mistral", {}),
    ("qwen2", {}),
    ("qwen2", {"num_key_value_heads": 1}),
    ("qwen3", {}),
    ("gemma3_text", {}),
    ("gemma3_text", {"num_key_value_heads": 2, "attention_bias": True}),
    ("phi3", {}),
    ("phi3", {"num_key_value_heads": 4}),
    ("mixtral", {}),
    ("qwen3_moe", {}),
    ("qwen3_moe", {"mlp_only_layers": [0]}),
]
TRANSFORMS = {
    "smoothing": TransformConfig(smooth_alpha=0.5),
    "greedy": TransformConfig(smooth_alpha=0.6, rotation="greedy", permutation="zigzag", block_size=16, greedy_steps=8),
    "per-block": TransformConfig(
        rotation="greedy", permutation="zigzag", block_size=16, shared_rotation=False, greedy_steps=4
    ),
    "hadamard": TransformConfig(smooth_alpha=0.9, rotation="hadamard", permutation="zigzag", block_size=24),
    "reference": TransformConfig(
        smooth_alpha=0.6, smooth_consumers="reference", rotation="reference", permutation="zigzag", block_size=16
    ),
    "gains": TransformConfig(rotation="hadamard", permutation="transpose", fold_gains=True),
    "mean": TransformConfig(smooth_alpha=0.5, smooth_statistic="mean"),
    "rms": TransformConfig(smooth_alpha=0.5, smooth_statistic="rms", rotation="hadamard", block_size=16),
    "balanced": TransformConfig(
        smooth_alpha=0.5, rotation="balanced", permutation="zigzag", block_size=16, shared_rotation=False
    ),
    "balanced-float16": TransformConfig(
        rotation="balanced", permutation="zigzag", block_size=16, shared_rotation=False, rotation_dtype="float16"
    ),
}


@dataclass
class Layer:
    """One layer's tensors, statistics and shape, and the module in float32."""

    tensors: dict[str, Tensor]
    statistics: dict[str, SiteStatistics]
    shape: LayerShape
    source: SourceCheckpoint

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.source.architecture.sites_of(0)

    @property
    def linears(self) -> tuple[str, ...]:
        return self.source.architecture.linears_of(0)

    def quantize(self, recipe: Recipe, index: int = 0) -> QuantizedLayer:
        architecture = self.source.architecture
        return quantize_layer(self.tensors, self.statistics, architecture, self.shape, recipe, layer=index)


@pytest.fixture
def make_layer(tiny_model: Callable[..., Path]) -> Callable[..., Layer]:
    """Factory of layers with statistics of random inputs."""

    def make(model_type: str = "llama", **changes: Any) -> Layer:
        path = tiny_model(model_type, **changes)
        source = SourceCheckpoint(path)
        skeleton = Skeleton(source, CPU)
        tensors = skeleton.load(source, 0)
        sites = source.architecture.sites_of(0)
        recorder = StatisticsRecorder(sites, row_stride=2, moment_stride=1, mean_squares=True)
        hidden = source.config["hidden_size"]
        with torch.no_grad(), skeleton.layer(0, tensors) as module, recorder.attached(module):
            skeleton.forward(module, torch.randn(2, 20, hidden, generator=torch.Generator().manual_seed(1)).bfloat16())
        shape = LayerShape(kv_heads=skeleton.kv_heads, head_dim=skeleton.head_dim)
        return Layer(tensors, recorder.finish(), shape, source)

    return make


def run_in_float32(
    layer: Layer, state: Mapping[str, Tensor], transforms: Mapping[str, SiteTransform], X: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the layer in float32 on these tensors, every linear's input transformed; return also all linears' outputs."""
    skeleton = Skeleton(layer.source, CPU, dtype=torch.float32)
    outputs: dict[str, Tensor] = {}
    with torch.no_grad(), skeleton.layer(0, state) as module:
        for site in layer.sites:
            for linear in site.linears:
                target = module.get_submodule(linear)
                if site.name in transforms:
                    T = transforms[site.name]
                    target.register_forward_pre_hook(lambda _m, inputs, T=T: (T.apply(inputs[0]),))
                target.register_forward_hook(
                    lambda _m, _inputs, output, linear=linear: outputs.__setitem__(linear, output.clone())
                )
        return skeleton.forward(module, X), outputs


def smoothed(layer: Layer, recipe: Recipe) -> tuple[dict[str, torch.Tensor], Folds]:
    """Return the layer's tensors with all smoothing scales folded in, in float32, and the scales."""
    state = dict(layer.tensors)
    folds = smooth(state, layer.statistics, layer.sites, layer.shape, recipe.transform)
    state = {name: folds.tensor(name, tensor) for name, tensor in state.items()}
    for site in layer.sites:
        for linear in site.linears:
            W = folds.weight(linear, layer.tensors[f"{linear}.weight"], slice(None))
            state[f"{linear}.weight"] = W * folds.columns[site.name]
    return state, folds


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=list(TRANSFORMS))
@pytest.mark.parametrize(("model_type", "changes"), MODELS, ids=str)
def test_nothing_changes_before_rounding(
    make_layer: Callable[..., Layer],
    recipe: Recipe,
    model_type: str,
    changes: dict[str, Any],
    transform: TransformConfig,
) -> None:
    """Smoothing folds (norms, v and up rows, biases), rotations and permutation leave every linear's output alone."""
    layer = make_layer(model_type, **changes)
    recipe = replace(recipe, transform=transform)
    state, folds = smoothed(layer, recipe)
    transforms = {}
    for site in layer.sites:
        rows = layer.statistics[site.name].rows.float() / folds.columns[site.name]
        weights = torch.cat([state[f"{linear}.weight"].float() for linear in site.linears])
        moments = Moments(rows.T @ rows, weights.T @ weights)
        transforms[site.name] = search_transform(rows, transform, torch.Generator().manual_seed(0), moments)
        for linear in site.linears:
            state[f"{linear}.weight"] = transforms[site.name].for_weights().apply(state[f"{linear}.weight"].float())
    X = torch.randn(2, 19, layer.tensors["input_layernorm.weight"].shape[0], generator=torch.Generator().manual_seed(2))
    expected, exact = run_in_float32(layer, layer.tensors, {}, X)
    result, outputs = run_in_float32(layer, state, transforms, X)
    assert outputs.keys() == exact.keys()
    for linear in outputs:
        # What is folded into v and up divides their own outputs; all the others are as they were.
        undone = outputs[linear] * folds.rows.get(linear, torch.ones(()))
        error = (undone - exact[linear]).norm() / exact[linear].norm()
        assert float(error) <= 1e-5, linear
    assert float((result - expected).norm() / expected.norm()) <= 1e-5


@pytest.mark.parametrize("model_type", SIZES)
def test_smoothing_does_something(make_layer: Callable[..., Layer], recipe: Recipe, model_type: str) -> None:
    """Guards the test above."""
    layer = make_layer(model_type)
    state, folds = smoothed(layer, recipe)
    for site in layer.sites:
        scale = folds.columns[site.name]
        assert float(scale.max() / scale.min()) > 1.5
        for name in site.fold.into:
            assert not torch.equal(state[f"{name}.weight"].float(), layer.tensors[f"{name}.weight"].float())


def test_reference_smoothing_looks_at_one_consumer(make_layer: Callable[..., Layer], recipe: Recipe) -> None:
    layer = make_layer()
    recipe = replace(recipe, transform=replace(recipe.transform, smooth_consumers="reference"))
    _, before = smoothed(layer, recipe)
    larger = dict(layer.tensors)
    for linear in ("self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj"):
        larger[f"{linear}.weight"] = 64 * layer.tensors[f"{linear}.weight"]
    _, after = smoothed(replace(layer, tensors=larger), recipe)
    assert torch.equal(after.columns["attn_in"], before.columns["attn_in"])
    assert torch.equal(after.columns["mlp_in"], before.columns["mlp_in"])


@pytest.mark.parametrize("linear", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"])
def test_smoothing_looks_at_every_consumer(make_layer: Callable[..., Layer], recipe: Recipe, linear: str) -> None:
    layer = make_layer()
    _, before = smoothed(layer, recipe)
    larger = {**layer.tensors, f"{linear}.weight": 64 * layer.tensors[f"{linear}.weight"]}
    _, after = smoothed(replace(layer, tensors=larger), recipe)
    assert float((after.columns["attn_in"] / before.columns["attn_in"]).max()) < 0.5


@pytest.mark.parametrize("model_type", SIZES)
def test_shard_holds_exactly_what_the_quantized_layer_needs(
    make_layer: Callable[..., Layer], recipe: Recipe, model_type: str
) -> None:
    layer = make_layer(model_type)
    result = layer.quantize(recipe)
    parts = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
    expected = {f"{linear}.{part}" for linear in layer.linears for part in parts}
    expected |= {f"{site.module}.{part}" for site in layer.sites for part in ("R1", "perm", "R2", "act_clip_ratio")}
    expected |= {name for name in layer.tensors if name.removesuffix(".weight") not in layer.linears}
    assert set(result.tensors) == expected
    assert result.quantized_weights == sum(layer.tensors[f"{name}.weight"].numel() for name in layer.linears)
    assert set(result.report) == {site.name for site in layer.sites}


def test_everything_in_the_shard_is_finite_and_of_its_type(make_layer: Callable[..., Layer], recipe: Recipe) -> None:
    for name, tensor in make_layer("qwen2").quantize(recipe).tensors.items():
        assert tensor.is_contiguous()
        expected = {
            "weight_packed": torch.int32,
            "weight_scale": torch.float32,
            "weight_zero_point": torch.int32,
            "weight_shape": torch.int64,
            "R1": torch.float32,
            "R2": torch.float32,
            "perm": torch.int16,
            "act_clip_ratio": torch.float32,
        }.get(name.rsplit(".", 1)[1], torch.bfloat16)
        assert tensor.dtype == expected, name
        assert bool(torch.isfinite(tensor).all()), name


def test_codes_stand_for_the_transformed_weight_within_half_a_step(
    make_layer: Callable[..., Layer], recipe: Recipe
) -> None:
    layer = make_layer()
    recipe = replace(
        recipe, transform=replace(recipe.transform, smooth_alpha=None), weight=WeightConfig(bits=8, group_size=16)
    )
    tensors = layer.quantize(recipe).tensors
    for site in LLAMA.sites:
        T = SiteTransform(
            R1=tensors[f"{site.module}.R1"], perm=tensors[f"{site.module}.perm"].long(), R2=tensors[f"{site.module}.R2"]
        )
        for linear in site.linears:
            W = T.apply(layer.tensors[f"{linear}.weight"].float())
            rows, width = tensors[f"{linear}.weight_shape"].tolist()
            assert (rows, width) == tuple(W.shape)
            codes = unpack(tensors[f"{linear}.weight_packed"], width, bits=8)
            zero_point = unpack(tensors[f"{linear}.weight_zero_point"].T.contiguous(), rows, bits=8).T
            step = tensors[f"{linear}.weight_scale"].repeat_interleave(16, dim=1)
            restored = (codes - zero_point.repeat_interleave(16, dim=1).float()) * step
            assert bool(((restored - W).abs() <= step / 2 * (1 + 1e-4)).all())


def test_arguments_are_left_alone(make_layer: Callable[..., Layer], recipe: Recipe) -> None:
    layer = make_layer("qwen2")
    tensors = {name: tensor.clone() for name, tensor in layer.tensors.items()}
    statistics = {
        name: SiteStatistics(absmax=entry.absmax.clone(), rows=entry.rows.clone())
        for name, entry in layer.statistics.items()
    }
    layer.quantize(recipe)
    assert set(layer.tensors) == set(tensors)
    assert all(torch.equal(layer.tensors[name], tensor) for name, tensor in tensors.items())
    for name, entry in statistics.items():
        assert torch.equal(layer.statistics[name].absmax, entry.absmax)
        assert torch.equal(layer.statistics[name].rows, entry.rows)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=list(TRANSFORMS))
def test_global_generator_is_neither_read_nor_moved(
    make_layer: Callable[..., Layer], recipe: Recipe, transform: TransformConfig
) -> None:
    layer, recipe = make_layer(), replace(recipe, transform=transform)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = layer.quantize(recipe).tensors
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = layer.quantize(recipe).tensors
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_result_depends_on_seed_and_layer_but_not_on_what_ran_before(
    make_layer: Callable[..., Layer], recipe: Recipe
) -> None:
    layer = make_layer()
    forward = [layer.quantize(recipe, index).tensors for index in (0, 1)]
    backward = [layer.quantize(recipe, index).tensors for index in (1, 0)][::-1]
    for first, second in zip(forward, backward, strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)
    name = "self_attn.attn_in.R1"
    assert not torch.equal(forward[0][name], forward[1][name])
    assert not torch.equal(forward[0][name], layer.quantize(replace(recipe, seed=99)).tensors[name])


def test_every_site_of_every_layer_has_its_own_seed() -> None:
    seeds = {site_seed(s, layer, site.name) for s in range(5) for layer in range(40) for site in LLAMA.sites}
    assert len(seeds) == 5 * 40 * 4


@pytest.mark.parametrize(
    "skipped",
    [
        ("mlp.down_proj",),
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
        LLAMA.linears_of(0),
    ],
    ids=len,
)
def test_left_out_linears_keep_16_bits(
    make_layer: Callable[..., Layer], recipe: Recipe, skipped: tuple[str, ...]
) -> None:
    layer = make_layer()
    result = layer.quantize(replace(recipe, skip_linears=skipped))
    for linear in LLAMA.linears_of(0):
        assert (f"{linear}.weight" in result.tensors) is (linear in skipped)
        assert (f"{linear}.weight_packed" in result.tensors) is (linear not in skipped)
    for linear in skipped:
        assert result.tensors[f"{linear}.weight"].dtype == torch.bfloat16
    if skipped == LLAMA.linears_of(0):
        assert all(torch.equal(result.tensors[name], tensor) for name, tensor in layer.tensors.items())
        assert result.quantized_weights == 0


def test_gptq_errs_less_at_every_site(make_layer: Callable[..., Layer], recipe: Recipe) -> None:
    """Weights alone: activations at 16 bits, so that only their error counts."""
    layer = make_layer()
    recipe = replace(recipe, activation=ActivationConfig(bits=16), weight=WeightConfig())
    nearest = layer.quantize(recipe)
    solved = layer.quantize(replace(recipe, weight=WeightConfig(solver="gptq")))
    assert set(solved.tensors) == set(nearest.tensors)
    for site in LLAMA.sites:
        assert solved.report[site.name].output_nmse < 0.9 * nearest.report[site.name].output_nmse
        assert solved.report[site.name].damp == 0.01


def test_coordinate_descent_errs_less_than_gptq(make_layer: Callable[..., Layer], recipe: Recipe) -> None:
    layer, weight = make_layer(), WeightConfig(solver="gptq")
    recipe = replace(recipe, activation=ActivationConfig(bits=16), weight=weight)
    solved = layer.quantize(recipe)
    again = layer.quantize(replace(recipe, weight=replace(weight, descent_passes=3)))
    # What it lowers is the error under the damped moment; the report's is of a sample.
    errors = [sum(result.report[site.name].output_nmse for site in LLAMA.sites) for result in (solved, again)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("transform", ["rms", "balanced"])
def test_missing_statistics_are_named(make_layer: Callable[..., Layer], recipe: Recipe, transform: str) -> None:
    layer = make_layer()
    layer.statistics = {
        name: SiteStatistics(absmax=entry.absmax, rows=entry.rows) for name, entry in layer.statistics.items()
    }
    with pytest.raises(CalibrationError, match="the calibration kept none"):
        layer.quantize(replace(recipe, transform=TRANSFORMS[transform]))


def test_a_smoothing_scale_that_is_not_finite_names_layer_site_and_sizes(
    make_layer: Callable[..., Layer], recipe: Recipe
) -> None:
    layer = make_layer()
    mean_square = layer.statistics["mlp_out"].mean_square
    assert mean_square is not None
    mean_square[3] = torch.inf
    message = r"layer 5: the smoothing scale of site mlp_out is NaN or Inf, for inputs of up to inf and weights of"
    with pytest.raises(CalibrationError, match=message) as caught:
        layer.quantize(replace(recipe, transform=TRANSFORMS["rms"]), index=5)
    assert caught.value.facts == {"layer": 5, "site": "mlp_out"}


def test_non_finite_moments_are_named(make_layer: Callable[..., Layer], recipe: Recipe) -> None:
    layer = make_layer()
    moment = layer.statistics["mlp_in"].second_moment
    assert moment is not None
    moment[0, 0] = torch.inf
    with pytest.raises(CalibrationError, match="layer 0 site mlp_in: the second moment"):
        layer.quantize(replace(recipe, transform=TRANSFORMS["balanced"]))


@pytest.mark.parametrize(
    "weight",
    [WeightConfig(solver="gptq"), WeightConfig(clip="output"), WeightConfig()],
    ids=["gptq", "output", "balanced"],
)
def test_moments_that_no_inputs_give_are_named(
    make_layer: Callable[..., Layer], recipe: Recipe, weight: WeightConfig
) -> None:
    layer = make_layer()
    moment = layer.statistics["mlp_in"].second_moment
    assert moment is not None
    moment.neg_()
    with pytest.raises(CalibrationError, match=r"layer 0 site mlp_in: the second moment .* on its diagonal"):
        layer.quantize(replace(recipe, transform=TRANSFORMS["balanced"], weight=weight))


def test_a_clip_search_by_an_indefinite_moment_names_the_linear(
    make_layer: Callable[..., Layer], recipe: Recipe
) -> None:
    layer = make_layer()
    moment = layer.statistics["mlp_in"].second_moment
    assert moment is not None
    moment.copy_(torch.eye(len(moment)) - 0.5)
    recipe = replace(recipe, transform=TransformConfig(), weight=WeightConfig(clip="output"))
    with pytest.raises(CalibrationError, match=r"layer 0 mlp\.gate_proj: .* not positive semidefinite") as caught:
        layer.quantize(recipe)
    assert caught.value.facts["layer"] == 0


def test_a_moment_that_needs_more_damping_is_told(
    make_layer: Callable[..., Layer], recipe: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    layer = make_layer()
    recipe = replace(recipe, transform=TransformConfig(), weight=WeightConfig(solver="gptq", damp=0.01))
    with caplog.at_level(logging.WARNING):
        layer.quantize(recipe)
        assert "damped" not in caplog.text
        moment = layer.statistics["mlp_in"].second_moment
        assert moment is not None
        size = float(moment.diagonal().mean())
        moment.copy_(torch.eye(len(moment)) * size)
        moment[0, 1] = moment[1, 0] = 1.05 * size
        report = layer.quantize(recipe).report
    assert "layer 0 site mlp_in: the second moment is not positive definite with weight.damp 0.01" in caplog.text
    assert report["mlp_in"].damp == pytest.approx(0.1)


def test_balanced_blocks_err_less_than_hadamard_blocks(make_layer: Callable[..., Layer], recipe: Recipe) -> None:
    layer = make_layer()
    balanced = TRANSFORMS["balanced"]
    hadamard = replace(balanced, rotation="hadamard")
    found, expected = (layer.quantize(replace(recipe, transform=T)).report for T in (balanced, hadamard))
    assert sum(site.output_nmse for site in found.values()) < sum(site.output_nmse for site in expected.values())


def test_clip_by_output_error_errs_less_at_every_site(make_layer: Callable[..., Layer], recipe: Recipe) -> None:
    layer = make_layer()
    recipe = replace(recipe, activation=ActivationConfig(bits=16))
    searched, solved = (
        layer.quantize(replace(recipe, weight=WeightConfig(clip=clip))).report  # type: ignore[arg-type]
        for clip in ("search", "output")
    )
    for name, report in solved.items():
        assert report.output_nmse < searched[name].output_nmse, name


def test_gptq_without_second_moments_names_the_place(make_layer: Callable[..., Layer], recipe: Recipe) -> None:
    layer = make_layer()
    without = {name: replace(entry, second_moment=None) for name, entry in layer.statistics.items()}
    with pytest.raises(CalibrationError, match=r"layer 3 site attn_in: .*second moments"):
        replace(layer, statistics=without).quantize(replace(recipe, weight=WeightConfig(solver="gptq")), index=3)


def test_searched_activation_clips_are_stored_and_reported(make_layer: Callable[..., Layer], recipe: Recipe) -> None:
    searched = make_layer().quantize(replace(recipe, activation=ActivationConfig(clip="search")))
    ratios = set()
    for site in LLAMA.sites:
        low, high = searched.tensors[f"{site.module}.act_clip_ratio"].tolist()
        report = searched.report[site.name]
        assert (report.act_clip_low, report.act_clip_high) == (low, high)
        ratios |= {low, high}
    assert len(ratios) > 1, "each site has its own"


def test_report_tells_a_lower_peak_and_a_small_error(make_layer: Callable[..., Layer], recipe: Recipe) -> None:
    layer = make_layer()
    fine = layer.quantize(replace(recipe, weight=WeightConfig(bits=8), activation=ActivationConfig(bits=16))).report
    coarse = layer.quantize(recipe).report
    for site in LLAMA.sites:
        # Each of the greedy searches keeps the prefix with the least peak, doing nothing included.
        assert coarse[site.name].peak_after <= coarse[site.name].peak_before * (1 + 1e-5)
        assert 0 < fine[site.name].output_nmse < 1e-3 < coarse[site.name].output_nmse < 0.2


def test_rotation_lowers_the_output_error_at_the_outlier_sites(
    make_layer: Callable[..., Layer], recipe: Recipe
) -> None:
    layer = make_layer()
    plain = layer.quantize(replace(recipe, transform=TransformConfig())).report
    turned = layer.quantize(recipe).report
    for site in ("attn_in", "mlp_in"):  # where the tiny models have outlier channels
        assert turned[site].output_nmse < plain[site].output_nmse


def test_non_finite_scale_names_the_layer(make_layer: Callable[..., Layer], recipe: Recipe) -> None:
    layer = make_layer()
    W = layer.tensors["mlp.down_proj.weight"].float()
    W[0, 0], W[0, 1] = 3e38, -3e38  # finite, but their distance is not
    layer.tensors["mlp.down_proj.weight"] = W
    with pytest.raises(CalibrationError, match=r"layer 7 mlp\.down_proj: the weight's scale is NaN or Inf"):
        layer.quantize(replace(recipe, transform=TransformConfig()), 7)


def test_group_size_that_does_not_fit_is_named(make_layer: Callable[..., Layer], recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match=r"weight\.group_size 40 has no divisor of the width 94"):
        make_layer(intermediate_size=94).quantize(replace(recipe, weight=WeightConfig(group_size=40)))


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_experts_that_see_no_token_are_rounded_and_counted(
    tiny_model: Callable[..., Path], recipe: Recipe, solver: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """One token reaches two of four experts; the other two have weights to round all the same."""
    source = SourceCheckpoint(tiny_model("mixtral"))
    skeleton = Skeleton(source, CPU)
    tensors = skeleton.load(source, 0)
    recorder = StatisticsRecorder(source.architecture.sites, row_stride=1, moment_stride=1, mean_squares=True)
    with torch.no_grad(), skeleton.layer(0, tensors) as module, recorder.attached(module):
        skeleton.forward(module, torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(1)).bfloat16())
    statistics = recorder.finish()
    for site in source.architecture.sites[2:]:
        reached = statistics[site.name].reached
        assert reached is not None
        assert sorted(reached.tolist()) == [0, 0, 1, 1]
    assert statistics["mlp_out"].rows.shape == (2, 96)
    shape = LayerShape(kv_heads=skeleton.kv_heads, head_dim=skeleton.head_dim)
    recipe = replace(recipe, weight=WeightConfig(solver=solver))
    with caplog.at_level(logging.WARNING):
        result = quantize_layer(tensors, statistics, source.architecture, shape, recipe, layer=0)
    assert "layer 0: no calibration token was sent to 2 experts" in caplog.text
    assert [result.report[site].unseen_experts for site in ("attn_in", "mlp_in", "mlp_out")] == [0, 2, 2]
    scales = [tensor for name, tensor in result.tensors.items() if name.endswith("down_proj.weight_scale")]
    assert len(scales) == 4
    assert all(bool(torch.isfinite(scale).all()) and bool((scale > 0).all()) for scale in scales)


def test_keys_are_smoothed_by_their_statistics_alone(make_layer: Callable[..., Layer], recipe: Recipe) -> None:
    layer = make_layer()
    smoothing = replace(recipe, kv_cache=replace(recipe.kv_cache, smooth_keys=True))
    with pytest.raises(CalibrationError, match="layer 0: the recipe smooths keys, and the calibration kept no stat"):
        layer.quantize(smoothing)
    sums = torch.rand(3, layer.shape.kv_heads, layer.shape.head_dim, dtype=torch.float64)
    keys = KeyStatistics(torch.tensor(5), sums[0], 5 + sums[1], sums[2])
    made = quantize_layer(
        layer.tensors, layer.statistics, layer.source.architecture, layer.shape, smoothing, layer=0, keys=keys
    ).tensors
    plain = layer.quantize(recipe).tensors
    names = {"self_attn.key_smoothing.center", "self_attn.key_smoothing.smooth_scale"}
    assert made.keys() - plain.keys() == names
    assert all(torch.equal(made[name], tensor) for name, tensor in plain.items())
    torch.testing.assert_close(made["self_attn.key_smoothing.center"], (sums[0] / 5).float())
