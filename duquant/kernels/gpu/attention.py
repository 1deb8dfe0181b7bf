"""Launches of attention over an INT4 KV cache."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from duquant.errors import KernelUnavailableError
from duquant.kernels.gpu.attention_kernels import combine_kernel, decode_kernel, sink_kernel
from duquant.kernels.gpu.cache import MAX_HEAD_DIM, MAX_SINKS, grid_strides, padded_pairs, rotation_halves
from duquant.kernels.gpu.configs import attention_config
from duquant.quantizers.kv import KVQuantizer, PackedKV

_OUT = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def int4_kv_attention(
    Q: Float[Tensor, "batch heads queries head_dim"],
    keys: PackedKV,
    values: PackedKV,
    quantizer: KVQuantizer,
    *,
    scaling: float,
    mask: Tensor | None,
    sinks: tuple[Tensor, Tensor] | None = None,
) -> Float[Tensor, "batch heads queries head_dim"]:
    """Return attention over a packed cache; scores and sums in float32, products of float16 operands.

    Queries are rotated instead of keys, and the result is rotated back once instead of every value, in these kernels.

    Raises:
        KernelUnavailableError: the cache has not 4 bits, or heads of an odd size or above 256.
    """
    batch, heads, queries, head_dim = Q.shape
    kv_heads, tokens = keys.packed.shape[1:3]
    if quantizer.config.bits != 4:
        raise KernelUnavailableError(f"GPU attention reads 4-bit caches, not {quantizer.config.bits}-bit ones")
    if head_dim % 2 or head_dim > MAX_HEAD_DIM:
        raise KernelUnavailableError(f"GPU attention takes even heads of up to {MAX_HEAD_DIM}, not {head_dim}")
    if Q.numel() == 0:
        return torch.empty_like(Q)
    first = 0 if sinks is None else sinks[0].shape[2]
    if first > MAX_SINKS:
        raise KernelUnavailableError(f"GPU attention takes up to {MAX_SINKS} tokens that are not packed, not {first}")
    shared = heads // kv_heads
    Q = Q if Q.stride(3) == 1 else Q.contiguous()
    R = rotation_halves(quantizer, Q.device)
    config = attention_config(batch * kv_heads, shared * queries, tokens, head_dim)
    packed_splits = triton.cdiv(tokens, config.tokens * config.steps)
    splits = packed_splits + (sinks is not None)
    tiles = triton.cdiv(shared * queries, config.rows)
    pairs = padded_pairs(head_dim)
    padded = tiles * config.rows
    sums = torch.empty(batch * kv_heads, splits, padded, 2, pairs, dtype=torch.float32, device=Q.device)
    stats = torch.empty(batch * kv_heads, splits, padded, 2, dtype=torch.float32, device=Q.device)
    kind = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
    seen = Q if mask is None else mask.expand(batch, heads, queries, first + tokens)
    strides = (0, 0, 0, 0) if mask is None else seen.stride()
    common = {
        "SHARED": shared, "HEAD_DIM": head_dim, "PAIRS": pairs, "ROWS": config.rows, "MASK": kind,
        "HAS_R": R is not None, "num_warps": config.warps,
    }  # fmt: skip
    decode_kernel[(batch * kv_heads, packed_splits, tiles)](
        Q, Q if R is None else R, *keys, *values, seen if mask is None else seen[..., first:], sums, stats,
        kv_heads, queries, tokens, splits, scaling, *Q.stride()[:3],
        *grid_strides(keys), *grid_strides(values), *strides,
        TOKENS=config.tokens, STEPS=config.steps, STAGES=config.stages, **common,
    )  # fmt: skip
    if sinks is not None:
        K, V = (part if part.stride(3) == 1 else part.contiguous() for part in sinks)
        sink_kernel[(batch * kv_heads, tiles)](
            Q, Q if R is None else R, K, V, seen, sums, stats,
            kv_heads, queries, first, splits, scaling, *Q.stride()[:3], *K.stride()[:3], *V.stride()[:3], *strides,
            SINKS=max(16, int(triton.next_power_of_2(first))), **common,
        )  # fmt: skip
    out = torch.empty(batch, heads, queries, head_dim, dtype=Q.dtype, device=Q.device)
    combine_kernel[(batch * kv_heads, tiles)](
        sums, stats, Q if R is None else R, out, shared * queries, padded, splits,
        HEAD_DIM=head_dim, PAIRS=pairs, ROWS=config.rows, HAS_R=R is not None, OUT=_OUT[out.dtype], num_warps=8,
    )  # fmt: skip
    return out
