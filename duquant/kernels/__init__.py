"""INT4 kernels: one signature, backends chosen by device, the same results from all of them.

Things are made ready once (`prepare_transform`, `prepare_weight`: the first backend that can takes them) and then run
by the backend that made them ready. `reference` is the definition; see duquant.kernels.types for what a backend is.
"""

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from duquant.config import ActivationConfig
from duquant.errors import ShapeError
from duquant.kernels.dispatch import BackendStatus, able, describe, first_able
from duquant.kernels.reference import check_linear, fake_linear
from duquant.kernels.types import (
    Backend,
    CacheBackend,
    FusingBackend,
    LinearWeight,
    NormBackend,
    PackedWeight,
    PreparedTransform,
    QuantizedActivation,
)
from duquant.quantizers.kv import KVQuantizer, PackedKV
from duquant.transforms.site import SiteTransform

__all__ = [
    "Backend",
    "BackendStatus",
    "LinearWeight",
    "PackedWeight",
    "PreparedTransform",
    "QuantizedActivation",
    "dequantize_kv",
    "describe",
    "fake_linear",
    "int4_kv_attention",
    "int4_linear",
    "prepare_transform",
    "prepare_weight",
    "quantize_kv",
    "rms_norm",
    "transform_quantize_pack",
    "transformed_linear",
]


def prepare_transform(
    transform: SiteTransform, config: ActivationConfig, clip_ratio: Float[Tensor, "2"]
) -> PreparedTransform:
    """Make a site's transform and rounding ready for the backend of its device.

    Args:
        transform: R1, P, R2 (the smoothing scale is folded into the weights before).
        config: bits (2 to 8) and symmetry of the activation's grids.
        clip_ratio: what the low and the high end of each row's range are multiplied by; its device counts.
    """
    return first_able(
        clip_ratio.device, "transforms", lambda backend: backend.prepare_transform(transform, config, clip_ratio)
    )


def prepare_weight(weights: Sequence[PackedWeight]) -> LinearWeight:
    """Join packed weights that read the same activation (q, k, v) and make them ready for the backend of their device.

    Raises:
        ShapeError: they do not fit together, or a pack is corrupt.
    """
    if not weights:
        raise ShapeError("there is no weight to prepare")
    return first_able(weights[0].packed.device, "linears", lambda backend: backend.prepare_weight(weights))


def transform_quantize_pack(
    X: Float[Tensor, "tokens in_features"], transform: PreparedTransform
) -> QuantizedActivation:
    """Apply a site's R1, P, R2 to rows of activations and round every row to its own grid.

    Grids and codes are those of the reference for the same transformed values. A backend may rotate in bfloat16, with
    float32 sums: a transformed value then differs by about 2^-8 of its block's size, and a code that lies within that
    of a rounding boundary by one.

    Args:
        X: float32, bfloat16 or float16.
        transform: what `prepare_transform` returned.

    Raises:
        ShapeError: the width is not the transform's, or X is not floating point.
    """
    _check_input(X, transform)
    return transform.backend.transform_quantize_pack(X, transform)


def _check_input(X: Tensor, transform: PreparedTransform) -> None:
    if not X.is_floating_point() or X.dim() != 2:
        raise ShapeError(f"activations must be a float matrix (tokens, channels), not {X.dtype} {tuple(X.shape)}")
    T = transform.transform
    width = T.perm.shape[0] if T.perm is not None else None
    if width is not None and width != X.shape[1]:
        raise ShapeError(f"the activation has {X.shape[1]} channels, the transform {width}")
    if T.R1 is not None:
        blocks, n = (T.R1.shape[0] if T.R1.dim() == 3 else None), T.R1.shape[-1]
        if X.shape[1] % n or blocks not in (None, X.shape[1] // n):
            raise ShapeError(f"the activation has {X.shape[1]} channels, the transform blocks of {n}")
    if X.device != transform.clip_ratio.device:
        raise ShapeError(f"the activation is on {X.device}, the transform on {transform.clip_ratio.device}")


def int4_linear(
    X: QuantizedActivation,
    W: LinearWeight,
    *,
    bias: Float[Tensor, " out_features"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "tokens out_features"]:
    """Return X W.T + bias from integer codes, accumulated exactly; the formula is the reference backend's.

    Raises:
        ShapeError: widths, devices, dtypes or the bias's length do not fit together, or a pack is corrupt.
    """
    check_linear(X, W, bias)
    return W.backend.int4_linear(X, W, bias, dtype)


def transformed_linear(
    X: Float[Tensor, "tokens in_features"],
    transform: PreparedTransform,
    W: LinearWeight,
    *,
    bias: Float[Tensor, " out_features"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "tokens out_features"]:
    """Return int4_linear(transform_quantize_pack(X, transform), W): the same bits, in one step where a backend can.

    Raises:
        ShapeError: as the two do.
    """
    backend = W.backend
    # An isinstance check of a protocol takes microseconds, and this runs for every site of every token.
    fused = cast(FusingBackend, backend) if hasattr(backend, "transformed_linear") else None
    if fused is None or backend is not transform.backend:
        return int4_linear(transform_quantize_pack(X, transform), W, bias=bias, dtype=dtype)
    _check_input(X, transform)
    if X.shape[1] != W.in_features or X.device != W.data.device:
        raise ShapeError(
            f"the activation has {X.shape[1]} channels on {X.device}, the weight {W.in_features} on {W.data.device}"
        )
    return fused.transformed_linear(X, transform, W, bias, dtype)


def int4_kv_attention(
    Q: Float[Tensor, "batch heads queries head_dim"],
    keys: PackedKV,
    values: PackedKV,
    quantizer: KVQuantizer,
    *,
    scaling: float,
    mask: Tensor | None = None,
    sinks: tuple[Tensor, Tensor] | None = None,
) -> Float[Tensor, "batch heads queries head_dim"]:
    """Return softmax(Q K^T scaling + mask) V over a packed cache, in the dtype of Q, sums in float32.

    Heads of Q share keys and values in order (grouped-query attention). The packed tensors may have any strides but the
    last axis's.

    Args:
        Q: the newest tokens' queries, after the rotary embedding.
        keys: all tokens' keys, packed.
        values: all tokens' values, packed.
        quantizer: what packed them: bits, and the rotation over the head dimension.
        scaling: what scores are multiplied by.
        mask: broadcasts to (batch, heads, queries, tokens); True (or 0.0) where a token is visible, False (or -inf)
            where it is not. None: the queries are the newest tokens, and each sees those up to itself.
        sinks: keys and values of the tokens before the packed ones, neither packed nor rotated, (batch, kv_heads,
            sinks, head_dim) each. They are the first of the mask's tokens.

    Raises:
        ShapeError: heads are no multiple of the cache's, or sizes differ.
    """
    batch, heads, queries, head_dim = Q.shape
    if keys.packed.shape != values.packed.shape or keys.packed.shape[0] != batch:
        raise ShapeError(f"keys {tuple(keys.packed.shape)}, values {tuple(values.packed.shape)} and {batch} rows of Q")
    if heads % keys.packed.shape[1]:
        raise ShapeError(f"{heads} heads cannot share {keys.packed.shape[1]} heads of keys")
    if head_dim != quantizer.head_dim:
        raise ShapeError(f"queries have head_dim {head_dim}, the cache {quantizer.head_dim}")
    if queries > keys.packed.shape[2] and mask is None:
        raise ShapeError(f"{queries} queries cannot be the newest of {keys.packed.shape[2]} tokens")
    for part in sinks or ():
        expected = (batch, keys.packed.shape[1], sinks[0].shape[2] if sinks else 0, head_dim)
        if part.shape != expected:
            raise ShapeError(f"tokens that are not packed have shape {tuple(part.shape)}; it must be {expected}")
    return first_able(
        Q.device,
        "attention",
        lambda backend: backend.int4_kv_attention(Q, keys, values, quantizer, scaling=scaling, mask=mask, sinks=sinks),
    )


def quantize_kv(X: Float[Tensor, "batch heads tokens head_dim"], quantizer: KVQuantizer, out: PackedKV) -> None:
    """Round keys or values as KVQuantizer.quantize does and write them to `out`, views of a cache's buffers.

    A code may differ from KVQuantizer's by one where the rotation, a float32 sum in another order, ends next to a
    rounding boundary.
    """
    backend = _cache_backend(quantizer, X.device)
    if backend is not None:
        backend.quantize_kv(X, quantizer, out)
        return
    for target, part in zip(out, quantizer.quantize(X), strict=True):
        target.copy_(part)


def dequantize_kv(
    packed: PackedKV, quantizer: KVQuantizer, dtype: torch.dtype
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """Return what the codes stand for, as KVQuantizer.dequantize does."""
    backend = _cache_backend(quantizer, packed.packed.device)
    if backend is not None:
        return backend.dequantize_kv(packed, quantizer, dtype)
    return quantizer.dequantize(packed, dtype)


def rms_norm(
    X: Float[Tensor, "*rows channels"], weight: Float[Tensor, " gains"], epsilon: float
) -> Float[Tensor, "*rows channels"]:
    """Return weight * (X / sqrt(mean(X^2) + epsilon)), the quotient rounded to the dtype of X before the product.

    The mean is summed in float64, so that its order does not show; the rest is as in transformers' Llama.

    Args:
        X: float32 or bfloat16.
        weight: one gain for each channel, in the dtype of X.
        epsilon: added to the mean in float32.

    Raises:
        ShapeError: sizes, dtypes or devices differ, or X is neither float32 nor bfloat16.
    """
    is_like = weight.dtype == X.dtype and weight.device == X.device and weight.shape == X.shape[-1:]
    if X.dtype not in (torch.float32, torch.bfloat16) or not is_like:
        raise ShapeError(
            f"RMSNorm takes rows and a weight of one dtype, float32 or bfloat16, one width and one device, not "
            f"{X.dtype} {tuple(X.shape)} on {X.device} and {weight.dtype} {tuple(weight.shape)} on {weight.device}"
        )
    for backend in able(X.device.type, X.device.index):
        if hasattr(backend, "rms_norm"):
            return cast(NormBackend, backend).rms_norm(X, weight, epsilon)
    mean = X.double().square().mean(-1, keepdim=True).float()
    return weight * (X.float() * torch.rsqrt(mean + epsilon)).to(X.dtype)


def _cache_backend(quantizer: KVQuantizer, device: torch.device) -> CacheBackend | None:
    if quantizer.config.bits == 4:
        for backend in able(device.type, device.index):
            if hasattr(backend, "quantize_kv"):
                return cast(CacheBackend, backend)
    return None
