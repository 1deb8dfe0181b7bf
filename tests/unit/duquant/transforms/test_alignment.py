"""Alignment: the dominant direction ends up along the ones, and nothing else changes."""

from dataclasses import replace

import pytest
import torch

from duquant.config import TransformConfig
from duquant.transforms.alignment import align, dominant_direction, reflect_onto_ones
from duquant.transforms.hadamard import flat_orthogonal
from duquant.transforms.site import Moments, SiteTransform, search_transform

SHARED = TransformConfig(rotation="hadamard", permutation="zigzag", block_size=16)
OWN = replace(SHARED, shared_rotation=False)
BALANCED = replace(OWN, rotation="balanced")
HALF = replace(BALANCED, rotation_dtype="float16")
CONFIGS = {"shared": SHARED, "own": OWN, "balanced": BALANCED, "balanced float16": HALF}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def leaning(tokens: int, width: int) -> torch.Tensor:
    """Rows that have a direction in common, each its own amount of it."""
    return 0.1 * random(tokens, width) + random(tokens, 1, seed=1) * random(width, seed=2)


def found(X: torch.Tensor, W: torch.Tensor, config: TransformConfig) -> SiteTransform:
    return search_transform(X, config, torch.Generator().manual_seed(0), Moments(X.T @ X, W.T @ W))


@pytest.mark.parametrize("blocks", [(), (3,)])
def test_directions_land_on_the_ones_and_the_matrix_stays_orthogonal(blocks: tuple[int, ...]) -> None:
    R = torch.linalg.qr(random(*blocks, 12, 12, dtype=torch.float64)).Q
    v = random(*blocks, 12, seed=1, dtype=torch.float64)
    behind = (v[..., None, :] @ R)[..., 0, :]
    reflected = reflect_onto_ones(R, behind)
    torch.testing.assert_close(reflected.mT @ reflected, torch.eye(12, dtype=torch.float64).expand_as(reflected))
    landed = (v[..., None, :] @ reflected)[..., 0, :]
    torch.testing.assert_close(landed, (v.norm(dim=-1, keepdim=True) * 12**-0.5).expand_as(landed))


@pytest.mark.parametrize("direction", [torch.zeros(4), torch.full((4,), 3.0)])
def test_no_direction_and_the_ones_themselves_reflect_nothing(direction: torch.Tensor) -> None:
    R = flat_orthogonal(4).float()
    assert torch.equal(reflect_onto_ones(R, direction), R)


def test_dominant_direction_is_the_first_singular_vector() -> None:
    X = random(40, 12) + 3 * random(40, 1, seed=1) * random(12, seed=2)
    expected = torch.linalg.svd(X.double()).Vh[0].float()
    direction = dominant_direction(X)
    torch.testing.assert_close(direction * torch.sign(direction @ expected), expected, rtol=0, atol=1e-5)
    assert float((X @ direction).mean()) > 0


@pytest.mark.parametrize("X", [torch.zeros(3, 4), torch.zeros(1, 4)])
def test_rows_of_zeros_have_no_direction(X: torch.Tensor) -> None:
    assert torch.equal(dominant_direction(X), torch.zeros(4))


def test_one_token_and_rows_that_cancel_have_a_direction() -> None:
    row = random(1, 12)
    torch.testing.assert_close(dominant_direction(row), row[0] / row.norm())
    direction = dominant_direction(torch.cat((row, -row)))
    torch.testing.assert_close((row[0] @ direction).abs(), row.norm())


@pytest.mark.parametrize(
    ("X", "expected"),
    [
        ([[1.0, -1.0], [-1.0, 1.0]], [0.5**0.5, 0.5**0.5]),
        ([[10.0, 0.0], [-10.0, 0.0], [0.0, 1.0], [0.0, 1.0]], [1.0, 0.0]),
    ],
    ids=["magnitudes that cancel", "a mean along a small direction"],
)
def test_a_mean_across_the_dominant_direction_does_not_hide_it(X: list[list[float]], expected: list[float]) -> None:
    torch.testing.assert_close(dominant_direction(torch.tensor(X)).abs(), torch.tensor(expected))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
@pytest.mark.parametrize("width", [64, 48, 17])
def test_product_and_tensors_stay_what_they_were(config: TransformConfig, width: int) -> None:
    X, W = leaning(50, width), random(7, width, seed=3)
    plain = found(X, W, config)
    T = align(plain, X)
    TX, TW = T.apply(X), T.for_weights().apply(W)
    exact = X.double() @ W.double().T
    # float32, relative to what is summed after the transform.
    assert bool(((TX @ TW.T - exact).abs() <= 1e-5 * (TX.norm(dim=1)[:, None] * TW.norm(dim=1)).double()).all())
    for before, after in ((plain.R1, T.R1), (plain.R2, T.R2), (plain.perm, T.perm)):
        assert before is not None
        assert after is not None
        assert (before.shape, before.dtype) == (after.shape, after.dtype)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_tokens_of_one_direction_span_a_fraction_of_their_range(config: TransformConfig) -> None:
    X, W = leaning(200, 64), random(7, 64, seed=3)
    plain = found(X, W, config)

    def spans(T: SiteTransform) -> float:
        low, high = torch.aminmax(T.apply(X), dim=1)
        return float(((high - low) / T.apply(X).norm(dim=1)).mean())

    assert spans(align(plain, X)) < 0.8 * spans(plain)


@pytest.mark.parametrize("width", [16, 64])
def test_rows_of_one_direction_alone_become_constant_rows(width: int) -> None:
    """In blocks of their own each block is constant; where one block is all, the whole row is."""
    X = random(9, 1, seed=1) * random(width, seed=2)
    T = align(found(X, X, OWN), X)
    blocks = T.apply(X).view(9, -1, 16)
    bound = 64 * torch.finfo(torch.float32).eps * float(X.abs().max()) * 4
    assert float((blocks.amax(-1) - blocks.amin(-1)).max()) <= bound


def test_nothing_is_changed_in_place() -> None:
    X = leaning(50, 64)
    plain = found(X, X, SHARED)
    assert plain.R2 is not None
    before = plain.R2.clone()
    align(plain, X)
    assert torch.equal(plain.R2, before)
