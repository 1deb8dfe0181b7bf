"""The GPU linear gives the reference's bits, whatever the tiles."""

import pytest
import torch

from duquant.config import ActivationConfig, WeightConfig
from duquant.errors import KernelUnavailableError
from duquant.kernels.gpu.configs import LinearConfig
from duquant.kernels.gpu.linear import int4_linear, require_linear
from duquant.kernels.reference import ReferenceBackend
from duquant.kernels.types import LinearWeight, PackedWeight, QuantizedActivation
from duquant.quantizers.packing import pack
from duquant.quantizers.weight import quantize_weight
from duquant.transforms.site import SiteTransform

REFERENCE = ReferenceBackend()
SMALL_TILES = LinearConfig(32, 32, 32, warps=4, stages=2, split=0, unpack_activation=True)


def operands(
    tokens: int, rows: int, width: int, device: torch.device, *, bits: int = 4, config: WeightConfig | None = None
) -> tuple[QuantizedActivation, LinearWeight]:
    generator = torch.Generator().manual_seed(tokens + rows + width)
    config = config or WeightConfig()
    q = quantize_weight(torch.randn(rows, width, generator=generator), config)
    parts = (pack(q.codes, bits=config.bits), q.scale, q.zero_point)
    W = REFERENCE.prepare_weight([PackedWeight(*(part.to(device) for part in parts), width, config.bits)])
    X = torch.randn(tokens, width, generator=generator)
    X[0] += 1000.0  # far from zero: a zero point of about 10^4 and corrections beyond 32 bits
    clip = torch.ones(2, device=device)
    prepared = REFERENCE.prepare_transform(SiteTransform(), ActivationConfig(bits=bits), clip)
    return REFERENCE.transform_quantize_pack(X.to(device), prepared), W


@pytest.mark.parametrize(
    ("tokens", "rows", "width", "config"),
    [
        (1, 70, 96, None),
        (5, 40, 101, None),  # odd width: half a byte to spare
        (3, 40, 512, LinearConfig(16, 32, 64, warps=4, stages=2, split=4)),
        (20, 33, 300, LinearConfig(16, 32, 32, warps=4, stages=2, split=2)),  # the last share is not full
        (33, 50, 128, SMALL_TILES),
        (70, 66, 100, SMALL_TILES),
        (33, 50, 128, LinearConfig(32, 32, 32, warps=4, stages=2, split=0, unpack_weight=True)),
    ],
)
def test_every_tiling_gives_the_bits_of_the_reference(
    tokens: int, rows: int, width: int, config: LinearConfig | None, device: torch.device
) -> None:
    X, W = operands(tokens, rows, width, device)
    expected = REFERENCE.int4_linear(X, W, None, torch.float32)
    assert torch.equal(int4_linear(X, W, None, torch.float32, config=config), expected)


@pytest.mark.parametrize("config", [None, SMALL_TILES])
def test_codes_of_one_byte_and_a_bias_are_taken_too(config: LinearConfig | None, device: torch.device) -> None:
    X, W = operands(9, 40, 96, device, bits=8)
    assert not X.is_packed
    bias = torch.randn(40, generator=torch.Generator().manual_seed(0)).to(device)
    expected = REFERENCE.int4_linear(X, W, bias, torch.float32)
    assert torch.equal(int4_linear(X, W, bias, torch.float32, config=config), expected)


def test_results_in_bfloat16_are_the_rounded_ones(device: torch.device) -> None:
    X, W = operands(3, 40, 64, device)
    exact = REFERENCE.int4_linear(X, W, None, torch.float32)
    result = int4_linear(X, W, None, torch.bfloat16)
    # The interpreter cuts bits off instead of rounding: within a step of bfloat16, where a GPU is within half of one.
    assert bool(((result.float() - exact).abs() <= exact.abs() * 2**-7).all())


def test_a_second_launch_finds_its_counters_as_the_first_did(device: torch.device) -> None:
    split = LinearConfig(16, 32, 32, warps=4, stages=2, split=4)
    X, W = operands(2, 40, 256, device)
    expected = REFERENCE.int4_linear(X, W, None, torch.float32)
    for _ in range(2):
        assert torch.equal(int4_linear(X, W, None, torch.float32, config=split), expected)


def test_no_tokens_give_no_rows(device: torch.device) -> None:
    X, W = operands(1, 8, 64, device)
    nothing = QuantizedActivation(X.data[:0], X.scale[:0], X.zero_point[:0], X.row_sum[:0], 64, 4)
    assert int4_linear(nothing, W, None, torch.float32).shape == (0, 8)


@pytest.mark.parametrize("config", [WeightConfig(bits=8), WeightConfig(group_size=32)], ids=["8 bits", "groups"])
def test_what_the_kernels_cannot_do_is_said(config: WeightConfig, device: torch.device) -> None:
    _, W = operands(1, 8, 64, device, config=config)
    with pytest.raises(KernelUnavailableError, match=r"8-bit|groups"):
        require_linear(W)


def test_an_odd_result_dtype_is_refused(device: torch.device) -> None:
    X, W = operands(1, 8, 64, device)
    with pytest.raises(KernelUnavailableError, match="float64"):
        int4_linear(X, W, None, torch.float64)
