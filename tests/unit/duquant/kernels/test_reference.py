"""The reference kernels against float64 products of dequantized operands."""

from dataclasses import replace

import pytest
import torch

from duquant.config import ActivationConfig, TransformConfig, WeightConfig
from duquant.errors import ShapeError
from duquant.kernels import LinearWeight, PackedWeight, QuantizedActivation, describe, fake_linear, int4_linear
from duquant.kernels.reference import ReferenceBackend
from duquant.quantizers.affine import Grid, dequantize
from duquant.quantizers.packing import pack
from duquant.quantizers.weight import quantize_weight
from duquant.transforms.site import SiteTransform, search_transform

EPS = torch.finfo(torch.float32).eps
NO_CLIP = torch.ones(2)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def transform_quantize(
    X: torch.Tensor, transform: SiteTransform, config: ActivationConfig, clip_ratio: torch.Tensor
) -> QuantizedActivation:
    reference = ReferenceBackend()
    return reference.transform_quantize_pack(X, reference.prepare_transform(transform, config, clip_ratio))


def prepared(W: PackedWeight) -> LinearWeight:
    return ReferenceBackend().prepare_weight([W])


def packed_weight(W: torch.Tensor, config: WeightConfig) -> tuple[PackedWeight, torch.Tensor]:
    q = quantize_weight(W, config)
    packed = PackedWeight(pack(q.codes, bits=q.bits), q.scale, q.zero_point, W.shape[1], q.bits)
    scale = q.scale.double().repeat_interleave(W.shape[1] // q.scale.shape[1], dim=1)
    zero_point = q.zero_point.double().repeat_interleave(W.shape[1] // q.scale.shape[1], dim=1)
    return packed, (q.codes.double() - zero_point) * scale


@pytest.mark.parametrize("tokens", [1, 2, 7, 33])
@pytest.mark.parametrize("width", [48, 64, 100])
@pytest.mark.parametrize("weight", [WeightConfig(), WeightConfig(symmetric=True), WeightConfig(bits=8)], ids=str)
@pytest.mark.parametrize("act_bits", [4, 8])
def test_int4_linear_equals_the_float64_product(tokens: int, width: int, weight: WeightConfig, act_bits: int) -> None:
    W, exact_W = packed_weight(normal(10, width), weight)
    X = transform_quantize(normal(tokens, width, seed=1), SiteTransform(), ActivationConfig(bits=act_bits), NO_CLIP)
    exact_X = (X.codes.double() - X.zero_point.double()) * X.scale.double()
    expected = exact_X @ exact_W.T
    # Whole numbers are exact; what rounds is a handful of float32 products of the two brackets.
    bracket = 127 * 127 * width * X.scale.double() * W.scale.double().amax(1) if weight.bits == 8 else 0.0
    magnitude = exact_X.abs() @ exact_W.abs().T + X.scale.double() * X.zero_point.double().abs() * exact_W.abs().sum(1)
    assert bool(((int4_linear(X, prepared(W)) - expected).abs() <= 8 * EPS * (magnitude + bracket)).all())


@pytest.mark.parametrize("group_size", [8, 16, 32])
@pytest.mark.parametrize("bits", [4, 8])
def test_groups_equal_the_float64_product(group_size: int, bits: int) -> None:
    W, exact_W = packed_weight(normal(9, 96), WeightConfig(bits=bits, group_size=group_size))
    X = transform_quantize(normal(5, 96, seed=1), SiteTransform(), ActivationConfig(), NO_CLIP)
    exact_X = (X.codes.double() - X.zero_point.double()) * X.scale.double()
    expected = exact_X @ exact_W.T
    magnitude = exact_X.abs() @ exact_W.abs().T + (X.scale * X.zero_point.abs()).double() * exact_W.abs().sum(1)
    # One rounding more for each group that is added.
    assert bool(((int4_linear(X, prepared(W)) - expected).abs() <= (8 + 96 // group_size) * EPS * magnitude * 2).all())


@pytest.mark.parametrize("offset", [50.0, -50.0])
def test_zero_points_outside_the_code_range_are_exact_too(offset: float) -> None:
    W, exact_W = packed_weight(normal(10, 64), WeightConfig())
    X = transform_quantize(normal(4, 64, seed=1) + offset, SiteTransform(), ActivationConfig(), NO_CLIP)
    assert float(X.zero_point.abs().min()) > 8
    exact_X = dequantize(X.codes, Grid(X.scale, X.zero_point, 4)).double()
    magnitude = exact_X.abs() @ exact_W.abs().T + (X.scale * X.zero_point.abs()).double() * exact_W.abs().sum(1)
    assert bool(((int4_linear(X, prepared(W)) - exact_X @ exact_W.T).abs() <= 8 * EPS * magnitude).all())


def test_zero_rows_give_zero() -> None:
    W, _ = packed_weight(normal(10, 64), WeightConfig())
    X = transform_quantize(torch.zeros(3, 64), SiteTransform(), ActivationConfig(), NO_CLIP)
    assert float(int4_linear(X, prepared(W)).abs().max()) <= 1e-9


@pytest.mark.parametrize("config", [WeightConfig(), WeightConfig(group_size=16), WeightConfig(bits=8)], ids=str)
def test_fake_linear_is_the_product_with_the_dequantized_weight(config: WeightConfig) -> None:
    W, exact_W = packed_weight(normal(10, 64), config)
    X = normal(5, 64, seed=1)
    magnitude = X.double().abs() @ exact_W.abs().T
    assert bool(((fake_linear(X, W) - X.double() @ exact_W.T).abs() <= 64 * EPS * magnitude).all())


def test_activation_is_rounded_after_its_transform() -> None:
    X = normal(6, 64)
    T = search_transform(X, TransformConfig(rotation="hadamard", permutation="zigzag"), torch.Generator())
    clip = torch.tensor([0.9, 0.8])
    q = transform_quantize(X, T, ActivationConfig(), clip)
    plain = transform_quantize(T.apply(X), SiteTransform(), ActivationConfig(), clip)
    assert torch.equal(q.codes, plain.codes)
    assert torch.equal(q.row_sum, q.codes.double().sum(1, keepdim=True).float())


def test_bfloat16_activations_are_transformed_in_float32() -> None:
    X = normal(6, 64).bfloat16()
    T = search_transform(X, TransformConfig(rotation="hadamard"), torch.Generator())
    first, second = (transform_quantize(x, T, ActivationConfig(), NO_CLIP) for x in (X, X.float()))
    assert torch.equal(first.codes, second.codes)


def test_other_width_is_a_shape_error() -> None:
    W, _ = packed_weight(normal(10, 64), WeightConfig())
    X = transform_quantize(normal(2, 48), SiteTransform(), ActivationConfig(), NO_CLIP)
    with pytest.raises(ShapeError, match="activation has 48 channels, the weight 64"):
        int4_linear(X, prepared(W))


@pytest.mark.parametrize("words", [7, 9])
def test_corrupt_pack_is_a_shape_error(words: int) -> None:
    W, _ = packed_weight(normal(10, 64), WeightConfig())
    damaged = replace(W, packed=torch.zeros(10, words, dtype=torch.int32))
    X = transform_quantize(normal(2, 64), SiteTransform(), ActivationConfig(), NO_CLIP)
    with pytest.raises(ShapeError, match="corrupt"):
        int4_linear(X, prepared(damaged))
    with pytest.raises(ShapeError, match="corrupt"):
        fake_linear(normal(2, 64), damaged)


def test_reference_backend_is_always_available() -> None:
    assert {"backend": "reference", "available": True, "reason": "plain torch, any device"} in describe()
