"""Packing of centred codes into int32 words, byte for byte as compressed-tensors' `pack-quantized` format.

Eight 4-bit (or four 8-bit) codes share a word, the first in the least significant bits, each stored as
q + 2^(bits-1). A width that does not fill its last word is padded with zero bits.
"""

import torch
from jaxtyping import Int8, Int32
from torch import Tensor

from duquant.errors import ShapeError


def pack(codes: Int8[Tensor, "rows channels"], *, bits: int) -> Int32[Tensor, "rows words"]:
    """Pack centred codes along the last axis."""
    per_word = 32 // bits
    rows, channels = codes.shape
    words = -(-channels // per_word)
    # Through bytes, in the order that little-endian machines have in a word: int64 would take ten times the room.
    unsigned = codes.to(torch.int16).add_(2 ** (bits - 1)).to(torch.uint8)
    padded = torch.nn.functional.pad(unsigned, (0, words * per_word - channels))
    packed = padded[:, 0::2] | (padded[:, 1::2] << 4) if bits == 4 else padded
    return packed.reshape(-1).view(torch.int32).view(rows, words)


def unpack(packed: Int32[Tensor, "rows words"], channels: int, *, bits: int) -> Int8[Tensor, "rows channels"]:
    """Undo `pack`.

    Raises:
        ShapeError: the words cannot hold that many channels.
    """
    per_word = 32 // bits
    rows, words = packed.shape
    if words != -(-channels // per_word):
        raise ShapeError(f"{words} words of {per_word} codes do not hold {channels} channels; the pack is corrupt")
    half = 2 ** (bits - 1)
    if bits == 4:
        # Through bytes: a quarter of the memory traffic of shifting int32 words, and this runs in every forward pass.
        raw = packed.contiguous().view(torch.uint8)
        pairs = torch.stack((raw & 15, raw >> 4), dim=-1)  # (rows, words * 4, 2)
        return pairs.view(rows, -1)[:, :channels].to(torch.int8).sub_(half)
    shifts = torch.arange(per_word, device=packed.device, dtype=torch.int32) * bits
    unsigned = (packed[..., None] >> shifts) & (2**bits - 1)  # (rows, words, per_word)
    centred: Tensor = unsigned.view(rows, -1)[:, :channels] - half
    return centred.to(torch.int8)
