"""The KV cache quantizer: per token and head, asymmetric, packed, optionally rotated over the head dimension.

Keys are quantized after the rotary embedding. Rotating keys and queries by the same orthogonal matrix leaves every
attention score unchanged; instead of rotating the queries, dequantized keys are rotated back: the same product.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float16, UInt8
from torch import Tensor

from duquant.config import KVCacheConfig
from duquant.transforms.hadamard import flat_orthogonal


class PackedKV(NamedTuple):
    """Codes of keys or values: `packed` holds 8/bits codes a byte, first in the low bits; x = low + scale * code."""

    packed: UInt8[Tensor, "batch heads tokens bytes"]
    scale: Float16[Tensor, "batch heads tokens 1"]
    low: Float16[Tensor, "batch heads tokens 1"]


class KVQuantizer:
    """Quantizes and restores tensors of shape (batch, heads, tokens, head_dim)."""

    def __init__(self, config: KVCacheConfig, head_dim: int) -> None:
        self.config = config
        self.head_dim = head_dim
        self._rotation = flat_orthogonal(head_dim).float() if config.rotate else None
        self._inverse = None if self._rotation is None else self._rotation.T.contiguous()

    def quantize(self, X: Float[Tensor, "batch heads tokens head_dim"]) -> PackedKV:
        """Round to the cache's bits. Scale and low end are float16, and codes are chosen for the rounded ones."""
        values = X.float()
        rotation = self.rotation_on(X.device)
        if rotation is not None:
            values = values @ rotation
        low, high = torch.aminmax(values, dim=-1, keepdim=True)
        low, high = low * self.config.clip_ratio, high * self.config.clip_ratio
        levels = 2**self.config.bits - 1
        limit = torch.finfo(torch.float16).max
        low16 = low.clamp(-limit, limit).half()
        # The smallest normal float16 keeps constant rows finite; rounding the scale costs less than half a step.
        scale16 = ((high - low) / levels).clamp(2**-14, limit).half()
        codes = ((values - low16.float()) / scale16.float()).round_().clamp_(0, levels).to(torch.uint8)
        return PackedKV(_pack_bytes(codes, self.config.bits), scale16, low16)

    def dequantize(self, packed: PackedKV, dtype: torch.dtype) -> Float[Tensor, "batch heads tokens head_dim"]:
        """Return what the codes stand for, rotated back."""
        codes = _unpack_bytes(packed.packed, self.head_dim, self.config.bits)
        values = codes.float().mul_(packed.scale.float()).add_(packed.low.float())
        inverse = self.inverse_on(values.device)
        if inverse is not None:
            values = values @ inverse
        return values.to(dtype)

    def empty(self, batch: int, heads: int, tokens: int, device: torch.device) -> PackedKV:
        """Return room for that many tokens, not filled."""
        per_byte = 8 // self.config.bits
        shape = (batch, heads, tokens)
        grids = [torch.empty((*shape, 1), dtype=torch.float16, device=device) for _ in range(2)]
        return PackedKV(torch.empty((*shape, -(-self.head_dim // per_byte)), dtype=torch.uint8, device=device), *grids)

    def rotation_on(self, device: torch.device) -> Float[Tensor, "head_dim head_dim"] | None:
        """Return what rows are multiplied by (from the right) before rounding, or None."""
        if self._rotation is not None and self._rotation.device != device:
            self._rotation = self._rotation.to(device)
        return self._rotation

    def inverse_on(self, device: torch.device) -> Float[Tensor, "head_dim head_dim"] | None:
        """Return what restored rows are multiplied by (from the right), contiguous, or None."""
        if self._inverse is not None and self._inverse.device != device:
            self._inverse = self._inverse.to(device)
        return self._inverse


def _pack_bytes(codes: Tensor, bits: int) -> Tensor:
    """Pack along the last axis, 8 / bits codes a byte; a last byte that is not full is padded with zeros."""
    per_byte = 8 // bits
    if per_byte == 1:
        return codes
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_byte))
    fields = codes.view(*codes.shape[:-1], -1, per_byte)
    packed = fields[..., 0].clone()
    for index in range(1, per_byte):
        packed |= fields[..., index] << (bits * index)
    return packed


def _unpack_bytes(packed: Tensor, channels: int, bits: int) -> Tensor:
    per_byte = 8 // bits
    if per_byte == 1:
        return packed
    mask = 2**bits - 1
    fields = torch.stack([(packed >> (bits * index)) & mask for index in range(per_byte)], dim=-1)
    return fields.view(*packed.shape[:-1], -1)[..., :channels]
