"""T(X) T(W).T = X W.T at every kind of site."""

from dataclasses import replace
from itertools import product
from typing import Literal

import pytest
import torch

from duquant.config import TransformConfig
from duquant.transforms.site import Moments, SiteTransform, search_transform

FULL = TransformConfig(smooth_alpha=0.5, rotation="greedy", permutation="zigzag", block_size=16, greedy_steps=12)
CONFIGS = [
    replace(FULL, rotation=rotation, permutation=permutation, shared_rotation=shared)
    for rotation, permutation, shared in product(("greedy", "hadamard"), ("none", "zigzag"), (True, False))
] + [replace(FULL, rotation="hadamard", permutation="transpose")]


def sample(*shape: int, seed: int = 0) -> torch.Tensor:
    X = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    X[..., 3] *= 50
    return X


def found(X: torch.Tensor, config: TransformConfig, seed: int = 0) -> SiteTransform:
    return search_transform(X, config, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.rotation}-{c.permutation}-{c.shared_rotation}")
@pytest.mark.parametrize("width", [64, 48, 72, 17, 34])
def test_transform_leaves_the_product_unchanged(width: int, config: TransformConfig) -> None:
    X, W = sample(9, width), torch.randn(7, width, generator=torch.Generator().manual_seed(1))
    T = found(X, config)
    exact = X.double() @ W.double().T
    error = (T.apply(X) @ T.apply(W).T - exact).abs()
    # 1e-5 in float32, relative to what is summed.
    assert bool((error <= 1e-5 * (X.double().norm(dim=1)[:, None] * W.double().norm(dim=1))).all())


@pytest.mark.parametrize("width", [576, 1536])
@pytest.mark.parametrize("rotation", ["greedy", "hadamard"])
def test_real_widths_and_default_blocks_keep_the_product_to_1e_5(width: int, rotation: str) -> None:
    X, W = sample(32, width), torch.randn(24, width, generator=torch.Generator().manual_seed(1))
    T = found(X, TransformConfig(rotation=rotation, permutation="zigzag", greedy_steps=64))
    exact = X.double() @ W.double().T
    assert float((T.apply(X) @ T.apply(W).T - exact).norm() / exact.norm()) <= 1e-5


@pytest.mark.parametrize("width", [576, 1536, 64, 960])
def test_two_factors_make_one_hadamard_matrix_over_all_channels(width: int) -> None:
    T = found(sample(2, width), TransformConfig(rotation="hadamard", permutation="transpose"))
    whole = T.apply(torch.eye(width, dtype=torch.float64))
    torch.testing.assert_close(whole.abs(), torch.full_like(whole, width**-0.5), rtol=1e-6, atol=0)
    torch.testing.assert_close(whole @ whole.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 64), (2, 64), (7, 64), (1, 1, 64), (3, 5, 64)])
def test_batch_shape_does_not_matter(shape: tuple[int, ...]) -> None:
    T = found(sample(9, 64), FULL)
    X = sample(*shape, seed=2)
    together = T.apply(X)
    assert together.shape == X.shape
    for row, expected in zip(X.reshape(-1, 64), together.reshape(-1, 64), strict=True):
        bound = 64 * torch.finfo(torch.float32).eps * float(row.norm())
        torch.testing.assert_close(T.apply(row[None])[0], expected, atol=bound, rtol=0)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.rotation}-{c.permutation}-{c.shared_rotation}")
def test_one_token_is_enough_to_search_on(config: TransformConfig) -> None:
    X = sample(1, 64)
    T = found(X, config)
    torch.testing.assert_close(T.apply(X).norm(), X.norm(), rtol=1e-5, atol=0)


def test_transform_keeps_the_norm_of_every_row_in_float64() -> None:
    X = sample(9, 64)
    T = found(X, FULL)
    rows = X.double()
    # R is stored in float32; each of two rotations of 16 channels adds at most 16 of its roundings.
    bound = 2 * 16 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(T.apply(rows).norm(dim=1), rows.norm(dim=1), rtol=bound, atol=0)


def test_greedy_zigzag_greedy_lowers_the_peak_of_an_outlier_channel() -> None:
    X = sample(64, 64)
    assert float(found(X, FULL).apply(X).abs().max()) < float(X.abs().max())


def test_no_rotation_is_the_identity() -> None:
    T = found(sample(4, 16), TransformConfig())
    assert (T.R1, T.perm, T.R2) == (None, None, None)
    X = sample(4, 16)
    assert torch.equal(T.apply(X), X)


def test_without_a_permutation_there_is_one_rotation() -> None:
    T = found(sample(4, 64), replace(FULL, permutation="none"))
    assert T.R1 is not None
    assert T.perm is None
    assert T.R2 is None


def test_search_depends_on_its_generator_alone() -> None:
    X = sample(20, 64)
    torch.manual_seed(1)
    first = found(X, FULL, seed=4)
    torch.manual_seed(2)
    second, other = found(X, FULL, seed=4), found(X, FULL, seed=5)
    assert first.R1 is not None and second.R1 is not None and other.R1 is not None  # noqa: PT018
    assert torch.equal(first.R1, second.R1)
    assert not torch.equal(first.R1, other.R1)


def test_rotations_are_kept_in_float32() -> None:
    T = found(sample(4, 64).bfloat16(), FULL)
    assert T.R1 is not None and T.R1.dtype == torch.float32  # noqa: PT018
    assert T.R2 is not None and T.R2.dtype == torch.float32  # noqa: PT018


BALANCED = replace(FULL, rotation="balanced", shared_rotation=False)


def moments(X: torch.Tensor, W: torch.Tensor) -> Moments:
    return Moments(X.T @ X, W.T @ W)


@pytest.mark.parametrize("permutation", ["none", "zigzag"])
@pytest.mark.parametrize("width", [64, 48, 72, 17, 34])
@pytest.mark.parametrize("tokens", [1, 9, 200])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_balanced_blocks_leave_the_product_unchanged(
    dtype: Literal["float32", "float16"], tokens: int, width: int, permutation: Literal["none", "zigzag"]
) -> None:
    X, W = sample(tokens, width), torch.randn(7, width, generator=torch.Generator().manual_seed(1))
    config = replace(BALANCED, permutation=permutation, rotation_dtype=dtype)
    T = search_transform(X, config, torch.Generator().manual_seed(0), moments(X, W))
    exact = X.double() @ W.double().T
    TX, TW = T.apply(X), T.for_weights().apply(W)
    # float32, relative to what is summed after the transform.
    assert bool(((TX @ TW.T - exact).abs() <= 1e-5 * (TX.norm(dim=1)[:, None] * TW.norm(dim=1)).double()).all())


def test_moments_under_a_transform_are_those_of_the_transformed() -> None:
    X, W = sample(50, 48), torch.randn(7, 48, generator=torch.Generator().manual_seed(1))
    T = search_transform(X, BALANCED, torch.Generator().manual_seed(0), moments(X, W))
    found, expected = moments(X, W).under(T), moments(T.apply(X), T.for_weights().apply(W))
    torch.testing.assert_close(found.inputs, expected.inputs, rtol=1e-3, atol=1e-3 * float(expected.inputs.abs().max()))
    torch.testing.assert_close(
        found.weights, expected.weights, rtol=1e-3, atol=1e-3 * float(expected.weights.abs().max())
    )


def test_balanced_blocks_are_kept_in_the_dtype_that_is_asked_for() -> None:
    X, W = sample(50, 48), torch.randn(7, 48, generator=torch.Generator().manual_seed(1))
    config = replace(BALANCED, rotation_dtype="float16")
    T = search_transform(X, config, torch.Generator().manual_seed(0), moments(X, W))
    assert T.R1 is not None and T.R1.dtype == torch.float16  # noqa: PT018
    assert T.R2 is not None and T.R2.dtype == torch.float16  # noqa: PT018


def test_an_orthogonal_transform_is_its_own_for_weights() -> None:
    T = found(sample(9, 64), FULL)
    assert T.for_weights() is T


def test_balanced_blocks_lower_the_expected_error_below_any_smoothing() -> None:
    mixing = torch.randn(64, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    X = (torch.randn(400, 64, generator=torch.Generator().manual_seed(4)).double() @ mixing).float()
    W = torch.randn(32, 64, generator=torch.Generator().manual_seed(5))

    def expected_error(A: torch.Tensor, B: torch.Tensor) -> float:
        return float(A.square().sum() * B.square().sum())

    T = search_transform(X, BALANCED, torch.Generator().manual_seed(0), moments(X, W))
    # No scale for each channel does better than this one.
    scale = (X.norm(dim=0) / W.norm(dim=0)).sqrt()
    assert expected_error(T.apply(X), T.for_weights().apply(W)) < expected_error(X / scale, W * scale)
