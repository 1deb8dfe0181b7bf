"""Packing against compressed-tensors, byte for byte."""

import warnings

import pytest
import torch

from duquant.errors import ShapeError
from duquant.quantizers.packing import pack, unpack

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from compressed_tensors.compressors.pack_quantized import helpers as theirs

WIDTHS = [1, 3, 7, 8, 9, 31, 32, 64, 100]


def codes(rows: int, width: int, bits: int) -> torch.Tensor:
    half = 2 ** (bits - 1)
    made = torch.randint(-half, half, (rows, width), generator=torch.Generator().manual_seed(width), dtype=torch.int8)
    made[0, 0], made[-1, -1] = -half, half - 1
    return made


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", WIDTHS)
def test_unpack_undoes_pack(width: int, bits: int) -> None:
    q = codes(5, width, bits)
    assert torch.equal(unpack(pack(q, bits=bits), width, bits=bits), q)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", WIDTHS)
def test_weights_pack_to_the_bytes_of_compressed_tensors(width: int, bits: int) -> None:
    q = codes(6, width, bits)
    ours, reference = pack(q, bits=bits), theirs.pack_to_int32(q, bits)
    assert ours.dtype == reference.dtype == torch.int32
    assert ours.numpy().tobytes() == reference.contiguous().numpy().tobytes()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "groups"), [(8, 1), (5, 1), (24, 3), (13, 4)])
def test_zero_points_pack_to_the_bytes_of_compressed_tensors(rows: int, groups: int, bits: int) -> None:
    z = codes(rows, groups, bits)
    ours = pack(z.T.contiguous(), bits=bits).T.contiguous()
    reference = theirs.pack_to_int32(z, bits, packed_dim=0).contiguous()
    assert ours.shape == reference.shape
    assert ours.numpy().tobytes() == reference.numpy().tobytes()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", WIDTHS)
def test_compressed_tensors_reads_our_weights(width: int, bits: int) -> None:
    q = codes(6, width, bits)
    assert torch.equal(theirs.unpack_from_int32(pack(q, bits=bits), bits, q.shape), q)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [1, 63, 65, 200])
def test_words_that_do_not_hold_the_width_are_an_error(width: int, bits: int) -> None:
    packed = pack(codes(3, 64, bits), bits=bits)
    if -(-width // (32 // bits)) != packed.shape[1]:
        with pytest.raises(ShapeError, match="corrupt"):
            unpack(packed, width, bits=bits)


def test_first_code_is_in_the_lowest_bits() -> None:
    q = torch.tensor([[-8, -7, -6, -5, -4, -3, -2, 7]], dtype=torch.int8)
    assert pack(q, bits=4).view(torch.uint8).tolist() == [[0x10, 0x32, 0x54, 0xF6]]


def test_strided_codes_pack_like_contiguous_ones() -> None:
    q = codes(16, 12, 4)
    assert torch.equal(pack(q.T, bits=4), pack(q.T.contiguous(), bits=4))
    packed = pack(q, bits=4)
    assert torch.equal(unpack(packed.T.contiguous().T, 12, bits=4), q)
