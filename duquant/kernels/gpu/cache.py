"""Launches that write and read the packed KV cache, and its rotation as all kernels read it."""

from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from duquant.kernels.gpu.cache_kernels import dequantize_kv_kernel, quantize_kv_kernel
from duquant.quantizers.kv import KVQuantizer, PackedKV

MAX_HEAD_DIM = 256
MAX_SINKS = 64
"""Tokens that are not packed: the kernel takes all of them at once."""
_ROWS = 16
_OUT = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_halves: WeakKeyDictionary[KVQuantizer, dict[torch.device, Tensor]] = WeakKeyDictionary()


def is_supported(quantizer: KVQuantizer) -> bool:
    """Tell whether these kernels know caches of this kind: 4 bits, and even heads that fit into a tile."""
    return quantizer.config.bits == 4 and quantizer.head_dim % 2 == 0 and quantizer.head_dim <= MAX_HEAD_DIM


def rotation_halves(quantizer: KVQuantizer, device: torch.device) -> Float[Tensor, "2 head_dim half"] | None:
    """Return the even and the odd columns of a cache's rotation, float32, made once for each device; None without."""
    R = quantizer.rotation_on(device)
    if R is None:
        return None
    made = _halves.setdefault(quantizer, {})
    if device not in made:
        made[device] = torch.stack((R[:, 0::2], R[:, 1::2])).contiguous()
    return made[device]


def padded_pairs(head_dim: int) -> int:
    """Return how many pairs of channels a tile holds: a power of two that the tensor cores take."""
    return max(16, int(triton.next_power_of_2(head_dim // 2)))


def quantize_kv(X: Float[Tensor, "batch heads tokens head_dim"], quantizer: KVQuantizer, out: PackedKV) -> None:
    """Round keys or values and write them to `out`, which may have any strides but the last axis's."""
    if not is_supported(quantizer):
        for target, part in zip(out, quantizer.quantize(X), strict=True):
            target.copy_(part)
        return
    X = X if X.stride(3) == 1 else X.contiguous()
    _batch, heads, tokens, head_dim = X.shape
    rows = X.numel() // head_dim
    if rows == 0:
        return
    R = rotation_halves(quantizer, X.device)
    quantize_kv_kernel[(triton.cdiv(rows, _ROWS),)](
        X, X if R is None else R, *out, rows, heads, tokens, quantizer.config.clip_ratio,
        *X.stride()[:3], *grid_strides(out),
        HEAD_DIM=head_dim, PAIRS=padded_pairs(head_dim), ROWS=_ROWS, HAS_R=R is not None, num_warps=8,
        enable_fp_fusion=False,
    )  # fmt: skip


def dequantize_kv(
    packed: PackedKV, quantizer: KVQuantizer, dtype: torch.dtype
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """Return what the codes stand for, rotated back."""
    if not is_supported(quantizer) or dtype not in _OUT:
        return quantizer.dequantize(packed, dtype)
    batch, heads, tokens, _bytes = packed.packed.shape
    head_dim, device = quantizer.head_dim, packed.packed.device
    Y = torch.empty(batch, heads, tokens, head_dim, dtype=dtype, device=device)
    rows = batch * heads * tokens
    if rows:
        R = rotation_halves(quantizer, device)
        dequantize_kv_kernel[(triton.cdiv(rows, _ROWS),)](
            *packed, Y if R is None else R, Y, rows, heads, tokens, *grid_strides(packed),
            HEAD_DIM=head_dim, PAIRS=padded_pairs(head_dim), ROWS=_ROWS, HAS_R=R is not None, OUT=_OUT[dtype],
            num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    return Y


def grid_strides(packed: PackedKV) -> tuple[int, ...]:
    """Return the batch, head and token strides of codes, scales and low ends."""
    assert packed.packed.stride(3) == 1
    return tuple(stride for part in packed for stride in part.stride()[:3])
