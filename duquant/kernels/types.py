"""What passes between the kernels: quantized activations, weights and transforms made ready, and what a backend is."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int8, Int32
from torch import Tensor

from duquant.config import ActivationConfig
from duquant.errors import ShapeError
from duquant.quantizers.kv import KVQuantizer, PackedKV
from duquant.quantizers.packing import pack, unpack
from duquant.transforms.site import SiteTransform

CHECKPOINT_LAYOUT = "checkpoint"
"""Weight codes as they lie in the artifact: every backend reads these."""


@dataclass(frozen=True)
class QuantizedActivation:
    """Rows of a site's input after its transform: one grid per row or per group of a row, the codes, and their sums.

    `data` has one of two layouts, told apart by its dtype, and every backend takes both:
    uint8 (tokens, ceil(in_features / 2)), only for bits <= 4: two codes a byte, channel 2j in the low nibble of byte j
    and 2j + 1 in the high one, each stored as q + 8, the last high nibble of an odd width zero;
    int8 (tokens, in_features): one centred code a byte.
    """

    data: Tensor
    scale: Float[Tensor, "tokens groups"]
    """float32."""
    zero_point: Float[Tensor, "tokens groups"]
    """float32, whole numbers, up to about 1e4 in magnitude for rows far from zero."""
    row_sum: Float[Tensor, "tokens groups"]
    """float32, whole numbers: the sum of each row's or group's centred codes."""
    in_features: int
    bits: int

    @property
    def is_packed(self) -> bool:
        """Tell whether two codes share a byte."""
        return self.data.dtype == torch.uint8

    @property
    def codes(self) -> Int8[Tensor, "tokens in_features"]:
        """Return the centred codes, one a byte."""
        return unpack_pairs(self.data, self.in_features) if self.is_packed else self.data


@dataclass(frozen=True)
class PackedWeight:
    """A packed linear weight as it lies in the artifact (see duquant.quantizers.packing)."""

    packed: Int32[Tensor, "out_features words"]
    scale: Float[Tensor, "out_features groups"]
    zero_point: Float[Tensor, "out_features groups"]
    in_features: int
    bits: int


@dataclass(frozen=True)
class LinearWeight:
    """One or more packed weights that read the same activation, their rows one after the other, ready for a backend.

    `data` takes as many bytes as the artifact's words; how they are ordered is the backend's affair (`layout`).
    """

    data: Tensor
    scale: Float[Tensor, "out_features groups"]
    zero_point: Float[Tensor, "out_features groups"]
    weight_sum: Float[Tensor, "out_features groups"]
    """float32, whole numbers: sum over the group of q_w - z_w."""
    in_features: int
    bits: int
    splits: tuple[int, ...]
    """Rows of each of the weights."""
    backend: "Backend" = field(repr=False, compare=False)
    layout: str = CHECKPOINT_LAYOUT
    state: object = field(default=None, repr=False, compare=False)
    """The backend's own."""

    @property
    def out_features(self) -> int:
        """Return the rows of all weights together."""
        return sum(self.splits)


@dataclass(frozen=True)
class PreparedTransform:
    """A site's online transform and the rounding that follows it, ready for a backend."""

    transform: SiteTransform
    config: ActivationConfig
    clip_ratio: Float[Tensor, "2"]
    backend: "Backend" = field(repr=False, compare=False)
    state: object = field(default=None, repr=False, compare=False)
    """The backend's own: rotations in its dtype and layout, for example."""


@runtime_checkable
class Backend(Protocol):
    """One implementation of the kernels. Methods raise KernelUnavailableError for what they cannot do."""

    name: str

    def require(self, device: torch.device) -> str:
        """Return a few words on what runs on `device` (the instruction set, the GPU).

        Raises:
            KernelUnavailableError: this backend does not run there; the message says why.
        """

    def prepare_transform(
        self, transform: SiteTransform, config: ActivationConfig, clip_ratio: Float[Tensor, "2"]
    ) -> PreparedTransform:
        """Make a transform ready."""

    def prepare_weight(self, weights: Sequence[PackedWeight]) -> LinearWeight:
        """Join weights and make them ready; the result may share memory with them when `layout` allows it."""

    def restore_weight(self, weight: LinearWeight) -> Int32[Tensor, "out_features words"]:
        """Return the rows' words in the artifact's layout: what prepare_weight started from."""

    def transform_quantize_pack(
        self, X: Float[Tensor, "tokens in_features"], transform: PreparedTransform
    ) -> QuantizedActivation:
        """See duquant.kernels.transform_quantize_pack."""

    def int4_linear(
        self,
        X: QuantizedActivation,
        W: LinearWeight,
        bias: Float[Tensor, " out_features"] | None,
        dtype: torch.dtype,
    ) -> Float[Tensor, "tokens out_features"]:
        """See duquant.kernels.int4_linear."""

    def int4_kv_attention(
        self,
        Q: Float[Tensor, "batch heads queries head_dim"],
        keys: PackedKV,
        values: PackedKV,
        quantizer: KVQuantizer,
        *,
        scaling: float,
        mask: Tensor | None,
        sinks: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "batch heads queries head_dim"]:
        """See duquant.kernels.int4_kv_attention."""


@runtime_checkable
class FusingBackend(Protocol):
    """A backend that can transform and multiply in one step."""

    def transformed_linear(
        self,
        X: Float[Tensor, "tokens in_features"],
        transform: PreparedTransform,
        W: LinearWeight,
        bias: Float[Tensor, " out_features"] | None,
        dtype: torch.dtype,
    ) -> Float[Tensor, "tokens out_features"]:
        """See duquant.kernels.transformed_linear."""


@runtime_checkable
class CacheBackend(Protocol):
    """A backend with kernels for the packed KV cache itself; others leave it to KVQuantizer."""

    def quantize_kv(
        self, X: Float[Tensor, "batch heads tokens head_dim"], quantizer: KVQuantizer, out: PackedKV
    ) -> None:
        """See duquant.kernels.quantize_kv."""

    def dequantize_kv(
        self, packed: PackedKV, quantizer: KVQuantizer, dtype: torch.dtype
    ) -> Float[Tensor, "batch heads tokens head_dim"]:
        """See duquant.kernels.dequantize_kv."""


@runtime_checkable
class NormBackend(Protocol):
    """A backend with a kernel for RMSNorm."""

    def rms_norm(
        self, X: Float[Tensor, "*rows channels"], weight: Float[Tensor, " channels"], epsilon: float
    ) -> Float[Tensor, "*rows channels"]:
        """See duquant.kernels.rms_norm."""


def pack_pairs(codes: Int8[Tensor, "tokens in_features"]) -> Tensor:
    """Pack centred 4-bit codes two a byte: the packed layout of QuantizedActivation."""
    words = pack(codes, bits=4)
    return words.view(torch.uint8)[:, : -(-codes.shape[1] // 2)].contiguous()


def unpack_pairs(data: Tensor, in_features: int) -> Int8[Tensor, "tokens in_features"]:
    """Undo `pack_pairs`.

    Raises:
        ShapeError: the bytes cannot hold that many channels.
    """
    if data.shape[1] != -(-in_features // 2):
        raise ShapeError(f"{data.shape[1]} bytes of two codes do not hold {in_features} channels")
    pairs = torch.stack((data & 15, data >> 4), dim=-1)  # (tokens, bytes, 2)
    return pairs.flatten(1)[:, :in_features].to(torch.int8).sub_(8)


def join_weights(weights: Sequence[PackedWeight], backend: Backend) -> LinearWeight:
    """Return the weights as one, in the artifact's layout. A single weight's words are not copied.

    Raises:
        ShapeError: there is none, they differ in width, groups or bits, a pack is corrupt, or rows and grids disagree.
    """
    if not weights:
        raise ShapeError("there is no weight to prepare")
    first = weights[0]
    groups = first.scale.shape[1]
    sums = []
    for each in weights:
        if (each.in_features, each.bits, each.scale.shape[1]) != (first.in_features, first.bits, groups):
            raise ShapeError(
                f"weights of one site differ: {each.in_features} channels, {each.scale.shape[1]} groups, {each.bits} "
                f"bits and {first.in_features} channels, {groups} groups, {first.bits} bits"
            )
        rows = each.packed.shape[0]
        if each.scale.shape[0] != rows or each.zero_point.shape != each.scale.shape:
            raise ShapeError(f"{rows} packed rows with scales for {each.scale.shape[0]}; the pack is corrupt")
        if groups == 0 or each.in_features % groups:
            raise ShapeError(f"{groups} groups do not divide {each.in_features} channels; the pack is corrupt")
        codes = unpack(each.packed, each.in_features, bits=each.bits).view(rows, groups, -1)
        sums.append(codes.sum(-1, dtype=torch.int32).float() - codes.shape[-1] * each.zero_point)
    alone = len(weights) == 1
    return LinearWeight(
        data=first.packed if alone else torch.cat([each.packed for each in weights]),
        scale=torch.cat([each.scale for each in weights]),
        zero_point=torch.cat([each.zero_point for each in weights]),
        weight_sum=torch.cat(sums),
        in_features=first.in_features,
        bits=first.bits,
        splits=tuple(each.packed.shape[0] for each in weights),
        backend=backend,
    )
