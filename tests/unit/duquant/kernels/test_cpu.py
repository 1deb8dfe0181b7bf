"""The CPU kernels on every instruction set of the machine, against int64 arithmetic and the reference."""

from dataclasses import replace

import pytest
import torch

from duquant.config import ActivationConfig, TransformConfig
from duquant.errors import KernelUnavailableError, ShapeError
from duquant.kernels import (
    LinearWeight,
    PackedWeight,
    QuantizedActivation,
    int4_linear,
    prepare_transform,
    prepare_weight,
    transform_quantize_pack,
    transformed_linear,
)
from duquant.kernels.cpu import CpuBackend
from duquant.kernels.onednn import OneDnnBackend
from duquant.kernels.reference import ReferenceBackend
from duquant.kernels.settings import BACKENDS
from duquant.kernels.types import pack_pairs
from duquant.quantizers.packing import pack
from duquant.transforms.site import SiteTransform, search_transform

CLIP = torch.tensor([0.9, 0.8])
# Rows and channels: ones, odd, around 16, 32, 64 and 128, and a model's.
SHAPES = [(1, 1), (5, 7), (16, 64), (33, 100), (64, 127), (70, 129), (31, 256), (130, 576)]
TOKENS = [1, 2, 3, 4, 5, 15, 16, 17, 32, 33, 65]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_weight(rows: int, channels: int, seed: int = 0) -> tuple[PackedWeight, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (rows, channels), dtype=torch.int8, generator=generator)
    zero_point = torch.randint(-8, 8, (rows, 1), generator=generator).float()
    scale = torch.rand(rows, 1, generator=generator) + 0.1
    return PackedWeight(pack(codes, bits=4), scale, zero_point, channels, 4), codes


def random_activation(tokens: int, channels: int, bits: int, offset: int) -> QuantizedActivation:
    """Codes that reach both ends, zero points far outside the codes' range when `offset` is large."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (tokens, channels), generator=generator)
    codes = codes.to(torch.int8)
    return QuantizedActivation(
        data=pack_pairs(codes) if bits == 4 else codes,
        scale=torch.rand(tokens, 1, generator=generator) + 0.1,
        zero_point=torch.randint(-8, 8, (tokens, 1), generator=generator).float() + offset,
        row_sum=codes.sum(1, keepdim=True).float(),
        in_features=channels,
        bits=bits,
    )


def by_int64(X: QuantizedActivation, W: PackedWeight, codes: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The definition with integers of 64 bits: one rounding to float32, then one each for scales and bias."""
    whole = (X.codes.long() - X.zero_point.long()) @ (codes.long() - W.zero_point.long()).T
    Y = whole.float() * W.scale.T * X.scale
    return Y if bias is None else Y + bias


def prepared(W: PackedWeight) -> LinearWeight:
    weight = prepare_weight([W])
    assert isinstance(weight.backend, CpuBackend)
    return weight


@pytest.mark.parametrize(("rows", "channels"), SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_linear_has_every_bit_of_int64_products(isa: str, rows: int, channels: int, bits: int) -> None:
    W, codes = random_weight(rows, channels)
    bias = random(rows, seed=2)
    weight = prepared(W)
    for tokens in TOKENS:
        for offset in (0, 10_000):
            X = random_activation(tokens, channels, bits, offset)
            assert torch.equal(int4_linear(X, weight), by_int64(X, W, codes, None)), (tokens, offset)
            expected = by_int64(X, W, codes, bias)
            assert torch.equal(int4_linear(X, weight, bias=bias), expected), (tokens, offset)
            half = int4_linear(X, weight, bias=bias, dtype=torch.bfloat16)
            assert torch.equal(half, expected.bfloat16()), (tokens, offset)


def test_extreme_codes_do_not_overflow(isa: str) -> None:
    """Every product as large as it gets, on a wide row."""
    channels = 28_672
    codes = torch.full((3, channels), 7, dtype=torch.int8)
    W = PackedWeight(pack(codes, bits=4), torch.ones(3, 1), torch.full((3, 1), -8.0), channels, 4)
    for value in (-128, 127):
        x = torch.full((17, channels), value, dtype=torch.int8)
        grid = torch.ones(17, 1)
        X = QuantizedActivation(x, grid, torch.full((17, 1), 1e4), x.sum(1, keepdim=True).float(), channels, 8)
        assert torch.equal(int4_linear(X, prepared(W)), by_int64(X, W, codes, None))


def test_reference_has_the_same_bits_as_int64_products() -> None:
    W, codes = random_weight(33, 100)
    reference = ReferenceBackend()
    for bits, offset in ((4, 0), (4, 10_000), (8, 0)):
        X = random_activation(9, 100, bits, offset)
        Y = reference.int4_linear(X, reference.prepare_weight([W]), None, torch.float32)
        assert torch.equal(Y, by_int64(X, W, codes, None))


ROWS = {
    "normal": random(17, 100) * 3,
    "far from zero": random(5, 65) + 40,
    "one value": torch.full((3, 64), 2.5),
    "zeros": torch.zeros(2, 31),
    "tiny": random(4, 48) * 1e-20,
    "huge": random(4, 48) * 1e20,
    "one channel": random(6, 1),
    "outlier": torch.cat((random(3, 127), torch.full((3, 1), 1e4)), dim=1),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_the_reference_bit_by_bit(isa: str, name: str, bits: int, dtype: torch.dtype) -> None:
    X = ROWS[name].to(dtype)
    for is_symmetric in (False, True):
        config = ActivationConfig(bits=bits, symmetric=is_symmetric)
        ours = transform_quantize_pack(X, prepare_transform(SiteTransform(), config, CLIP))
        reference = ReferenceBackend()
        theirs = reference.transform_quantize_pack(X, reference.prepare_transform(SiteTransform(), config, CLIP))
        for field in ("data", "scale", "zero_point", "row_sum"):
            assert torch.equal(getattr(ours, field), getattr(theirs, field)), field
        assert (ours.in_features, ours.bits) == (theirs.in_features, theirs.bits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_float_types_are_rounded_as_float32(dtype: torch.dtype) -> None:
    T = prepare_transform(SiteTransform(), ActivationConfig(), CLIP)
    X = random(5, 64).to(dtype)
    assert torch.equal(transform_quantize_pack(X, T).data, transform_quantize_pack(X.float(), T).data)


def found_transform(X: torch.Tensor, **changes: object) -> SiteTransform:
    config = replace(TransformConfig(rotation="hadamard", permutation="zigzag", greedy_steps=8), **changes)
    return search_transform(X.float(), config, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("channels", "changes"),
    [
        (64, {"permutation": "none"}),
        (256, {}),
        (576, {}),
        (256, {"rotation": "greedy"}),
        (384, {"shared_rotation": False}),
        (96, {"block_size": 16}),
        (36, {}),
    ],
)
@pytest.mark.parametrize("tokens", [1, 16, 33])
def test_transformed_rows_are_near_the_exact_transform(
    isa: str, channels: int, changes: dict[str, object], tokens: int
) -> None:
    X = (random(tokens, channels) * (1 + random(channels, seed=3).abs() * 4)).bfloat16()
    T = found_transform(X, **changes)
    q = transform_quantize_pack(X, prepare_transform(T, ActivationConfig(), torch.ones(2)))
    exact = T.apply(X.double())
    restored = (q.codes.double() - q.zero_point.double()) * q.scale.double()
    # Half a step of rounding. Entries of R1 and R2 and what lies between them are rounded to bfloat16: each changes a
    # value by at most 2^-9 of its block's length, and a rotation passes on lengths as they are.
    n = T.R1.shape[-1] if T.R1 is not None else 1
    length = X.double().view(tokens, -1, n).norm(dim=-1).amax(-1, keepdim=True) * n**0.5
    assert bool(((restored - exact).abs() <= q.scale.double() * 0.5 + 3 * 2**-9 * length).all())
    assert torch.equal(q.row_sum, q.codes.sum(1, keepdim=True, dtype=torch.int32).float())
    assert q.codes.min() >= -8
    assert q.codes.max() <= 7


def test_bfloat16_rotations_cost_no_accuracy() -> None:
    """The squared error of the codes is that of a float32 transform, to a hundredth."""
    X = (random(256, 512) * (1 + random(512, seed=3).abs() * 4)).bfloat16()
    for rotation in ("hadamard", "greedy"):
        T = found_transform(X, rotation=rotation)
        exact = T.apply(X.double())
        reference = ReferenceBackend()
        errors = []
        for q in (
            transform_quantize_pack(X, prepare_transform(T, ActivationConfig(), torch.ones(2))),
            reference.transform_quantize_pack(X, reference.prepare_transform(T, ActivationConfig(), torch.ones(2))),
        ):
            errors.append(float(((q.codes.double() - q.zero_point) * q.scale - exact).square().mean()))
        assert abs(errors[0] / errors[1] - 1) < 0.01


def test_row_is_the_same_in_any_batch(isa: str) -> None:
    X = random(70, 256).bfloat16()
    T = prepare_transform(found_transform(X), ActivationConfig(), CLIP)
    together = transform_quantize_pack(X, T)
    for token in (0, 15, 16, 31, 32, 69):
        alone = transform_quantize_pack(X[token : token + 1], T)
        if isa == "amx":
            assert torch.equal(alone.data[0], together.data[token])
            assert torch.equal(alone.scale[0], together.scale[token])
        else:
            # The rotations are torch's products there, whose last bit depends on the batch on some CPUs (AMD's).
            assert (alone.codes[0].int() - together.codes[token].int()).abs().max() <= 1
            assert (alone.codes[0] != together.codes[token]).sum() <= 1
            torch.testing.assert_close(alone.scale[0], together.scale[token], rtol=1e-6, atol=0)


@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_step_has_the_bits_of_two(isa: str, tokens: int, dtype: torch.dtype) -> None:
    X = random(tokens, 256).to(dtype)
    T = prepare_transform(found_transform(X), ActivationConfig(), CLIP)
    weights = [random_weight(rows, 256, seed)[0] for seed, rows in enumerate((48, 16, 17))]
    joined, bias = prepare_weight(weights), random(81)
    Y = transformed_linear(X, T, joined, bias=bias, dtype=dtype)
    assert torch.equal(Y, int4_linear(transform_quantize_pack(X, T), joined, bias=bias, dtype=dtype))
    parts = [int4_linear(transform_quantize_pack(X, T), prepare_weight([W])) for W in weights]
    assert torch.equal(transformed_linear(X, T, joined), torch.cat(parts, dim=1))


@pytest.mark.parametrize("tokens", [1, 40])
def test_threads_change_no_bit(isa: str, tokens: int) -> None:
    """Large enough that the threads are really used."""
    W, _ = random_weight(1024, 2048)
    X = random(tokens, 2048).bfloat16()
    T = prepare_transform(found_transform(X), ActivationConfig(), CLIP)
    weight = prepared(W)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            q = transform_quantize_pack(X, T)
            results.append((q.data, int4_linear(q, weight)))
        finally:
            torch.set_num_threads(1)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("backend", ["", "onednn", "reference"])
def test_no_tokens_give_no_rows(backend: str, fresh_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend:
        monkeypatch.setenv(BACKENDS, backend)
    X = torch.empty(0, 64)
    q = transform_quantize_pack(X, prepare_transform(SiteTransform(), ActivationConfig(), CLIP))
    assert int4_linear(q, prepare_weight([random_weight(5, 64)[0]])).shape == (0, 5)


def test_words_are_not_copied_and_take_a_quarter_of_bfloat16() -> None:
    W, _ = random_weight(512, 576)
    weight = prepared(W)
    assert weight.data.data_ptr() == W.packed.data_ptr()
    held = sum(t.numel() * t.element_size() for t in (weight.data, weight.scale, weight.zero_point, weight.weight_sum))
    assert held <= 0.27 * 512 * 576 * 2
    assert torch.equal(weight.backend.restore_weight(weight), W.packed)


def test_weights_without_a_kernel_fall_to_the_reference(caplog: pytest.LogCaptureFixture) -> None:
    codes = torch.randint(-128, 128, (5, 64), dtype=torch.int8)
    W = PackedWeight(pack(codes, bits=8), torch.ones(5, 1), torch.zeros(5, 1), 64, 8)
    assert prepare_weight([W]).backend.name == "reference"
    for backend in (CpuBackend(), OneDnnBackend()):
        with pytest.raises(KernelUnavailableError, match="8-bit"):
            backend.prepare_weight([W])


@pytest.mark.parametrize(("tokens", "rows", "channels"), [(1, 5, 64), (9, 12, 33), (40, 70, 136)])
def test_onednn_has_every_bit_of_int64_products(tokens: int, rows: int, channels: int) -> None:
    backend = OneDnnBackend()
    W, codes = random_weight(rows, channels)
    T = backend.prepare_transform(SiteTransform(), ActivationConfig(), CLIP)
    q = backend.transform_quantize_pack(random(tokens, channels), T)
    prepared, bias = backend.prepare_weight([W]), random(1, rows)[0]
    assert torch.equal(int4_linear(q, prepared, bias=bias), by_int64(q, W, codes, bias))
    assert torch.equal(backend.restore_weight(prepared), W.packed)


def test_operands_of_two_backends_work_together() -> None:
    """An activation rounded by one backend is read by the other."""
    X = random(9, 64)
    W, codes = random_weight(12, 64)
    reference, ours = ReferenceBackend(), CpuBackend()
    T = reference.prepare_transform(SiteTransform(), ActivationConfig(), CLIP)
    q = reference.transform_quantize_pack(X, T)
    assert torch.equal(int4_linear(q, ours.prepare_weight([W])), by_int64(q, W, codes, None))
    assert torch.equal(
        transformed_linear(X, T, ours.prepare_weight([W])), int4_linear(q, reference.prepare_weight([W]))
    )


# --- what callers can get wrong --------------------------------------------------------------------------------------


def test_activation_of_another_width_is_refused() -> None:
    W, _ = random_weight(5, 64)
    X = random_activation(2, 48, 4, 0)
    with pytest.raises(ShapeError, match="activation has 48 channels, the weight 64"):
        int4_linear(X, prepared(W))
    T = prepare_transform(SiteTransform(), ActivationConfig(), CLIP)
    with pytest.raises(ShapeError, match="activation has 48 channels on cpu, the weight 64"):
        transformed_linear(random(2, 48), T, prepared(W))


def test_codes_that_do_not_fill_their_rows_are_refused() -> None:
    X = random_activation(2, 64, 4, 0)
    with pytest.raises(ShapeError, match="31 bytes a row do not hold 64 channels"):
        int4_linear(replace(X, data=X.data[:, :31]), prepared(random_weight(5, 64)[0]))


def test_codes_of_another_type_are_refused() -> None:
    X = random_activation(2, 64, 8, 0)
    with pytest.raises(ShapeError, match=r"activation codes are torch\.int32"):
        int4_linear(replace(X, data=X.data.int()), prepared(random_weight(5, 64)[0]))


def test_grids_of_other_rows_are_refused() -> None:
    X = random_activation(2, 64, 4, 0)
    grid = torch.ones(1, 1)
    with pytest.raises(ShapeError, match="2 rows of codes with grids"):
        int4_linear(replace(X, scale=grid, zero_point=grid, row_sum=grid), prepared(random_weight(5, 64)[0]))


def test_another_device_is_refused() -> None:
    X = random_activation(2, 64, 4, 0)
    with pytest.raises(ShapeError, match="activation is on meta, the weight on cpu"):
        int4_linear(replace(X, data=X.data.to("meta")), prepared(random_weight(5, 64)[0]))
    T = prepare_transform(SiteTransform(), ActivationConfig(), CLIP)
    with pytest.raises(ShapeError, match="activation is on meta, the transform on cpu"):
        transform_quantize_pack(torch.empty(2, 64, device="meta"), T)
    with pytest.raises(KernelUnavailableError, match="do not run on cuda"):
        CpuBackend().require(torch.device("cuda"))


def test_bias_of_another_length_is_refused() -> None:
    with pytest.raises(ShapeError, match="bias has shape"):
        int4_linear(random_activation(2, 64, 4, 0), prepared(random_weight(5, 64)[0]), bias=torch.zeros(4))


def test_transform_of_another_width_is_refused() -> None:
    T = found_transform(random(8, 128))
    ready = prepare_transform(T, ActivationConfig(), CLIP)
    with pytest.raises(ShapeError, match="activation has 96 channels, the transform 128"):
        transform_quantize_pack(random(2, 96), ready)
    only = prepare_transform(SiteTransform(R1=T.R1), ActivationConfig(), CLIP)
    with pytest.raises(ShapeError, match="activation has 96 channels, the transform blocks of 128"):
        transform_quantize_pack(random(2, 96), only)


@pytest.mark.parametrize("words", [7, 9])
def test_corrupt_packs_are_refused(words: int) -> None:
    W, _ = random_weight(5, 64)
    with pytest.raises(ShapeError, match="corrupt"):
        prepare_weight([replace(W, packed=torch.zeros(5, words, dtype=torch.int32))])


def test_groups_that_do_not_divide_the_width_are_refused() -> None:
    W, _ = random_weight(5, 64)
    with pytest.raises(ShapeError, match="3 groups do not divide 64 channels; the pack is corrupt"):
        prepare_weight([replace(W, scale=torch.ones(5, 3), zero_point=torch.zeros(5, 3))])


def test_weights_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ShapeError, match="weights of one site differ"):
        prepare_weight([random_weight(5, 64)[0], random_weight(5, 48)[0]])
    with pytest.raises(ShapeError, match="no weight"):
        prepare_weight([])
