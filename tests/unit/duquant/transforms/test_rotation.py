"""Laws of the block rotations and of the greedy search."""

import math

import pytest
import torch

from duquant.transforms import rotation
from duquant.transforms.hadamard import hadamard_factor, is_prime
from duquant.transforms.rotation import (
    apply_rotation,
    greedy_rotation,
    hadamard_rotation,
    kronecker_sides,
    resolve_block_size,
)

EPS32 = torch.finfo(torch.float32).eps
EPS64 = torch.finfo(torch.float64).eps


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def heavy_tailed(tokens: int, channels: int, seed: int = 0) -> torch.Tensor:
    X = torch.randn(tokens, channels, generator=generator(seed))
    X[:, channels // 3] *= 30
    X[0] *= 20
    return X


@pytest.mark.parametrize("width", [1, 2, 17, 64, 72, 576, 1536, 4096, 5120, 11008, 13824])
def test_sides_of_a_kronecker_product_are_hadamard_orders_where_there_are_any(width: int) -> None:
    n1, n2 = kronecker_sides(width)
    assert n1 * n2 == width
    assert n1 >= n2
    pairs = [(width // n, n) for n in range(1, width + 1) if width % n == 0]
    both = [pair for pair in pairs if all(hadamard_factor(n) is not None for n in pair)]
    assert ((n1, n2) in both) is bool(both)
    assert n1 + n2 == min(sum(pair) for pair in both or pairs)


def assert_orthogonal(R: torch.Tensor, tolerance: float) -> None:
    eye = torch.eye(R.shape[-1], dtype=R.dtype).expand(R.shape)
    torch.testing.assert_close(R.transpose(-1, -2) @ R, eye, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("width", "requested", "expected"),
    [
        (4096, 128, 128),
        (576, 128, 96),
        (1536, 128, 128),
        (960, 128, 120),
        (1538, 128, 1538),  # 2 * 769
        (131, 128, 131),  # a prime
        (127, 128, 127),
        (64, 128, 64),
        (128, 128, 128),
        (6, 4, 6),  # below the request, a divisor must equal it
        (34, 16, 34),  # 17 is above the request, 2 would be too small
        (1, 2, 1),
        (7, 2, 7),
    ],
)
def test_block_size_of_known_widths(width: int, requested: int, expected: int) -> None:
    assert resolve_block_size(width, requested) == expected


@pytest.mark.parametrize("requested", [2, 3, 16, 100, 128, 4096])
def test_block_size_always_divides_the_width(requested: int) -> None:
    for width in range(1, 700):
        size = resolve_block_size(width, requested)
        assert width % size == 0
        assert size <= requested or size == width
        if is_prime(width) and width > requested:
            assert size == width


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("n", [16, 24, 48])
def test_greedy_rotation_is_orthogonal(n: int, shared: bool) -> None:
    R = greedy_rotation(heavy_tailed(20, 48), n, steps=64, shared=shared, generator=generator())
    assert R.dtype == torch.float64
    assert R.shape == ((n, n) if shared else (48 // n, n, n))
    assert_orthogonal(R, 64 * n * EPS64)  # 64 products of orthogonal matrices of order n


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
@pytest.mark.parametrize("seed", range(4))
def test_greedy_search_never_raises_the_peak(steps: int, shared: bool, seed: int) -> None:
    X = heavy_tailed(17, 60, seed)
    R = greedy_rotation(X, 20, steps=steps, shared=shared, generator=generator(seed))
    before, after = X.view(-1, 3, 20).abs(), apply_rotation(X.double(), R).view(-1, 3, 20).abs()
    slack = 1 + steps * 20 * EPS32  # the search itself runs in float32
    if shared:
        assert float(after.max()) <= float(before.max()) * slack
    else:
        assert bool((after.amax((0, 2)) <= before.amax((0, 2)).double() * slack).all())


def test_greedy_search_keeps_a_peak_that_nothing_can_lower() -> None:
    flat = torch.ones(3, 16)  # already uniform: |x| / sqrt(n) is the least possible peak
    R = greedy_rotation(flat, 16, steps=20, shared=True, generator=generator())
    assert torch.equal(R, torch.eye(16, dtype=torch.float64))


@pytest.mark.parametrize("outlier", [0, 1, 13, 31])
@pytest.mark.parametrize("shared", [True, False])
def test_one_step_spreads_the_outlier_channel_over_its_block(outlier: int, shared: bool) -> None:
    n = 32
    X = torch.zeros(5, 64)
    X[2, n + outlier] = -80.0
    R = greedy_rotation(X, n, steps=1, shared=shared, generator=generator())
    peak = float(apply_rotation(X.double(), R).abs().max())
    assert peak == pytest.approx(80 / math.sqrt(n), rel=n * EPS64)


def test_one_step_finds_the_outlier_among_ordinary_channels() -> None:
    n = 64
    X = torch.randn(50, n, generator=generator()) * 0.01
    X[31, 17] = 100.0
    R = greedy_rotation(X, n, steps=1, shared=True, generator=generator())
    # The outlier's share is exactly flat; the rest adds at most the norm of the small part.
    rest = float(X.abs().where(X.abs() < 1, 0.0).norm(dim=1).max())
    assert float(apply_rotation(X.double(), R).abs().max()) <= 100 / math.sqrt(n) + rest


@pytest.mark.parametrize("shared", [True, False])
def test_pruning_rows_that_cannot_peak_changes_nothing(shared: bool) -> None:
    X = heavy_tailed(300, 32)
    X[10:] *= 0.001  # far below max norm / sqrt(n)
    pruned = rotation._search_rows(X, 16, shared)
    assert pruned.shape[1] < 300
    full = greedy_rotation(X, 16, steps=40, shared=shared, generator=generator(5))
    without_small_rows = greedy_rotation(X[:10], 16, steps=40, shared=shared, generator=generator(5))
    assert torch.equal(full, without_small_rows)


def test_every_row_that_can_peak_is_kept() -> None:
    X = heavy_tailed(100, 32)
    kept = {tuple(row) for row in rotation._search_rows(X, 16, shared=True)[0].tolist()}
    rows = X.view(-1, 16)
    can_peak = rows.norm(dim=1) >= rows.norm(dim=1).max() / 4 * (1 + 16 * EPS32)
    assert {tuple(row) for row in rows[can_peak].tolist()} <= kept


def test_search_bounds_the_rows_it_looks_at() -> None:
    X = torch.ones(rotation.MAX_SEARCH_ROWS + 7, 16)
    assert rotation._search_rows(X, 16, shared=True).shape == (1, rotation.MAX_SEARCH_ROWS, 16)


def test_greedy_search_depends_on_its_generator_alone() -> None:
    X = heavy_tailed(20, 32)
    torch.manual_seed(1)
    first = greedy_rotation(X, 16, steps=9, shared=True, generator=generator(3))
    torch.manual_seed(2)
    assert torch.equal(first, greedy_rotation(X, 16, steps=9, shared=True, generator=generator(3)))


def test_greedy_search_leaves_its_input_alone() -> None:
    X = heavy_tailed(20, 32)
    before = X.clone()
    greedy_rotation(X, 16, steps=9, shared=False, generator=generator())
    assert torch.equal(X, before)


def test_greedy_search_takes_strided_input() -> None:
    X = heavy_tailed(20, 32)
    strided = X.T.contiguous().T
    first = greedy_rotation(X, 16, steps=5, shared=True, generator=generator())
    assert torch.equal(first, greedy_rotation(strided, 16, steps=5, shared=True, generator=generator()))


@pytest.mark.parametrize("n", [2, 5, 16, 96])
def test_pool_matrices_are_orthogonal_with_a_flat_first_row(n: int) -> None:
    pool = rotation._spreading_pool(n, generator())
    assert_orthogonal(pool, 8 * n * EPS64)
    torch.testing.assert_close(pool[:, 0], torch.full_like(pool[:, 0], 1 / math.sqrt(n)), atol=4 * EPS64, rtol=0)


@pytest.mark.parametrize("blocks", [None, 1, 3])
@pytest.mark.parametrize("n", [16, 18, 96])
def test_hadamard_rotation_is_orthogonal(n: int, blocks: int | None) -> None:
    R = hadamard_rotation(n, blocks, generator())
    assert R.shape == ((n, n) if blocks is None else (blocks, n, n))
    assert_orthogonal(R, 4 * n * EPS64)


def test_rotation_of_each_block_equals_one_block_diagonal_matrix() -> None:
    R = hadamard_rotation(6, 4, generator()) @ hadamard_rotation(6, None, generator(1))
    X = torch.randn(3, 2, 24, generator=generator(), dtype=torch.float64)
    expected = X @ torch.block_diag(*R)
    torch.testing.assert_close(apply_rotation(X, R), expected, atol=64 * EPS64, rtol=0)
    shared = apply_rotation(X, R[0])
    torch.testing.assert_close(shared, X @ torch.block_diag(*[R[0]] * 4), atol=64 * EPS64, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rotation_keeps_the_dtype_of_its_input(dtype: torch.dtype) -> None:
    X = torch.ones(2, 32, dtype=dtype)
    assert apply_rotation(X, hadamard_rotation(16, None, generator())).dtype == dtype
