"""Launches of attention over an INT4 KV cache."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from duquant.errors import KernelUnavailableError
from duquant.kernels.gpu.attention_kernels import combine_kernel, decode_kernel
from duquant.kernels.gpu.configs import attention_config
from duquant.quantizers.kv import KVQuantizer, PackedKV

_MAX_HEAD_DIM = 256


def int4_kv_attention(
    Q: Float[Tensor, "batch heads queries head_dim"],
    keys: PackedKV,
    values: PackedKV,
    quantizer: KVQuantizer,
    *,
    scaling: float,
    mask: Tensor | None,
) -> Float[Tensor, "batch heads queries head_dim"]:
    """Return attention over a packed cache; scores and sums in float32, products of float16 operands.

    Queries are rotated instead of keys, and the result is rotated back once instead of every value.

    Raises:
        KernelUnavailableError: the cache has not 4 bits, or heads of an odd size or above 256.
    """
    batch, heads, queries, head_dim = Q.shape
    kv_heads, tokens = keys.packed.shape[1:3]
    if quantizer.config.bits != 4:
        raise KernelUnavailableError(f"GPU attention reads 4-bit caches, not {quantizer.config.bits}-bit ones")
    if head_dim % 2 or head_dim > _MAX_HEAD_DIM:
        raise KernelUnavailableError(f"GPU attention takes even heads of up to {_MAX_HEAD_DIM}, not {head_dim}")
    if Q.numel() == 0:
        return torch.empty_like(Q)
    shared = heads // kv_heads
    rotation = quantizer.rotation_on(Q.device)
    rows = Q.float() if rotation is None else Q.float() @ rotation
    rows = rows.reshape(batch * kv_heads, shared * queries, head_dim).contiguous()
    config = attention_config(batch * kv_heads, shared * queries, tokens, head_dim)
    splits = triton.cdiv(tokens, config.tokens * config.steps)
    tiles = triton.cdiv(shared * queries, config.rows)
    pairs = max(16, triton.next_power_of_2(head_dim // 2))
    padded = tiles * config.rows
    sums = torch.empty(batch * kv_heads, splits, padded, 2, pairs, dtype=torch.float32, device=Q.device)
    stats = torch.empty(batch * kv_heads, splits, padded, 2, dtype=torch.float32, device=Q.device)
    kind = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
    seen = rows if mask is None else mask.expand(batch, heads, queries, tokens)
    strides = (0, 0, 0, 0) if mask is None else seen.stride()
    decode_kernel[(batch * kv_heads, splits, tiles)](
        rows, keys.packed, keys.scale, keys.low, values.packed, values.scale, values.low, seen, sums, stats,
        kv_heads, queries, tokens, scaling,
        *_strides(keys), *_strides(values), *strides,
        SHARED=shared, HEAD_DIM=head_dim, PAIRS=pairs, ROWS=config.rows, TOKENS=config.tokens, STEPS=config.steps,
        MASK=kind, STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    out = torch.empty(batch, heads, queries, head_dim, dtype=torch.float32 if rotation is not None else Q.dtype,
                      device=Q.device)  # fmt: skip
    combine_kernel[(batch * kv_heads, shared * queries)](
        sums, stats, out, shared * queries, padded, splits,
        HEAD_DIM=head_dim, PAIRS=pairs, SPLITS_PAD=triton.next_power_of_2(splits), OUT=_OUT[out.dtype], num_warps=4,
    )  # fmt: skip
    return out if rotation is None else (out @ rotation.T).to(Q.dtype)


_OUT = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _strides(packed: PackedKV) -> tuple[int, ...]:
    """Return the batch, head and token strides of codes, scales and low ends."""
    assert packed.packed.stride(3) == 1
    return tuple(stride for part in packed for stride in part.stride()[:3])
