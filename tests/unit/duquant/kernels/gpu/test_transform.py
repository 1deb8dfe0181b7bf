"""The GPU transform rounds as the reference does, up to what rotations in bfloat16 allow."""

import math

import pytest
import torch

from duquant.config import ActivationConfig
from duquant.errors import KernelUnavailableError
from duquant.kernels.gpu.backend import GpuBackend
from duquant.kernels.gpu.linear import PlanarActivation
from duquant.kernels.reference import ReferenceBackend
from duquant.kernels.types import QuantizedActivation
from duquant.transforms.site import SiteTransform

REFERENCE, GPU = ReferenceBackend(), GpuBackend()
CLIP = (0.9, 0.95)


def rotations(n: int, blocks: int | None, seed: int) -> torch.Tensor:
    """Orthogonal matrices, rounded to bfloat16, so that only the products' rounding is left."""
    shape = (n, n) if blocks is None else (blocks, n, n)
    gaussian = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(gaussian)[0].bfloat16().float()


def both(
    tokens: int, width: int, transform: SiteTransform, config: ActivationConfig, device: torch.device
) -> tuple[torch.Tensor, QuantizedActivation, QuantizedActivation]:
    """Return (X, the GPU kernels' result, the reference's)."""
    X = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1)).bfloat16()
    X[:, 3] *= 20
    parts = [None if part is None else part.to(device) for part in (transform.R1, transform.perm, transform.R2)]
    there = SiteTransform(*parts)
    X, clip = X.to(device), torch.tensor(CLIP, device=device)
    found, expected = (
        backend.transform_quantize_pack(X, backend.prepare_transform(there, config, clip))
        for backend in (GPU, REFERENCE)
    )
    return X, found, expected


def check_consistency(result: QuantizedActivation) -> None:
    """Row sums and planes belong to the codes."""
    assert torch.equal(result.row_sum[:, 0], result.codes.int().sum(1).float())
    if isinstance(result, PlanarActivation) and result.planes is not None:
        pairs = torch.stack(tuple(result.planes), dim=-1).view(result.data.shape[0], -1)
        assert torch.equal(pairs[:, : result.in_features], result.codes)


@pytest.mark.parametrize(
    ("tokens", "width", "config"),
    [
        (3, 96, ActivationConfig()),
        (3, 101, ActivationConfig(bits=3)),
        (70, 256, ActivationConfig(symmetric=True)),
        (5, 64, ActivationConfig(bits=8)),
    ],
)
def test_without_rotations_the_bits_are_the_reference_s(
    tokens: int, width: int, config: ActivationConfig, device: torch.device
) -> None:
    _, found, expected = both(tokens, width, SiteTransform(), config, device)
    assert torch.equal(found.data, expected.data)
    assert torch.equal(found.scale, expected.scale)
    assert torch.equal(found.zero_point, expected.zero_point)
    check_consistency(found)


@pytest.mark.parametrize(
    ("parts", "tokens"),
    [("R1", 2), ("R1 R2", 2), ("R1 P", 2), ("P R2", 2), ("R1 P R2", 2), ("R1", 67), ("R1 P", 67), ("R1 P R2", 67)],
)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "each block"])
def test_transformed_codes_are_within_one_of_the_reference(
    parts: str, tokens: int, shared: bool, device: torch.device
) -> None:
    width, n = 96, 48  # a block that is no power of two
    blocks = None if shared else width // n
    transform = SiteTransform(
        R1=rotations(n, blocks, 2) if "R1" in parts else None,
        perm=torch.randperm(width, generator=torch.Generator().manual_seed(3)) if "P" in parts else None,
        R2=rotations(n, blocks, 4) if "R2" in parts else None,
    )
    X, found, expected = both(tokens, width, transform, ActivationConfig(), device)
    check_consistency(found)
    # One bfloat16 rounding between the rotations, of values no larger than the norm of their block; the second
    # rotation adds n of those errors, each times an entry of an orthogonal matrix: at most sqrt(n) of the largest.
    block_norm = X.float().view(tokens, -1, n).norm(dim=-1).amax(1, keepdim=True)
    bound = 2**-7 * math.sqrt(n) * block_norm
    values, exact = ((r.codes.float() - r.zero_point) * r.scale for r in (found, expected))
    assert bool(((found.scale - expected.scale).abs() <= 2 * bound / 15).all())
    # Clipped values move with the ends of the range, others by one step of either grid and the error.
    assert bool(((values - exact).abs() <= expected.scale + found.scale + 3 * bound).all())
    moved = (found.codes.int() + (expected.zero_point - found.zero_point).int() - expected.codes.int()).abs()
    assert int(moved.max()) <= 1
    assert float((moved > 0).float().mean()) < 0.05


def test_wide_inputs_are_rounded_to_bfloat16_first(device: torch.device) -> None:
    config, clip = ActivationConfig(), torch.ones(2, device=device)
    transform = SiteTransform(R1=rotations(32, None, 2).to(device))
    prepared = GPU.prepare_transform(transform, config, clip)
    X = torch.randn(2, 64, generator=torch.Generator().manual_seed(5)).bfloat16().to(device)
    narrow, wide = (GPU.transform_quantize_pack(rows, prepared) for rows in (X, X.float()))
    assert torch.equal(narrow.data, wide.data)


def test_strided_rows_are_read_in_place(device: torch.device) -> None:
    prepared = GPU.prepare_transform(SiteTransform(), ActivationConfig(), torch.ones(2, device=device))
    X = torch.randn(4, 128, generator=torch.Generator().manual_seed(6)).to(device)
    left = GPU.transform_quantize_pack(X[:, :64], prepared)
    assert torch.equal(left.data, GPU.transform_quantize_pack(X[:, :64].contiguous(), prepared).data)


@pytest.mark.parametrize("n", [27, 256])
def test_blocks_that_the_kernels_cannot_rotate_are_refused(n: int, device: torch.device) -> None:
    transform = SiteTransform(R1=torch.eye(n, device=device))
    with pytest.raises(KernelUnavailableError, match="even blocks of up to 128"):
        GPU.prepare_transform(transform, ActivationConfig(), torch.ones(2, device=device))
