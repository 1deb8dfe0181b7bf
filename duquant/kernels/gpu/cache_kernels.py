"""Triton kernels that write and read the packed KV cache; KVQuantizer defines what they do.

Rotations take three TF32 products for one, which is as exact as float32 arithmetic and runs on the tensor cores. Launch
with `enable_fp_fusion=False`: a fused product would round the ends of a range another way.
"""

from typing import no_type_check

import triton
import triton.language as tl

from duquant.kernels.gpu.transform_kernels import round_to_even


@triton.jit
@no_type_check
def row_offsets(rows, heads, tokens, batch_stride, head_stride, token_stride):
    """Return where the rows (batch, head, token), counted through, lie in a strided tensor, (rows, 1)."""
    rows = rows.to(tl.int64)
    token, head, batch = rows % tokens, (rows // tokens) % heads, rows // tokens // heads
    return (batch * batch_stride + head * head_stride + token * token_stride)[:, None]


@triton.jit
@no_type_check
def quantize_kv_kernel(
    X_ptr, R_ptr, codes_ptr, scale_ptr, low_ptr, rows, heads, tokens, clip_ratio,
    X_batch, X_head, X_token, codes_batch, codes_head, codes_token,
    scale_batch, scale_head, scale_token, low_batch, low_head, low_token,
    HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, HAS_R: tl.constexpr,
):  # fmt: skip
    """Rotate, round and pack ROWS rows; R is float32 (2, HEAD_DIM, HEAD_DIM / 2), even and odd columns."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    pair = tl.arange(0, PAIRS)
    is_pair = pair < HEAD_DIM // 2
    mask = is_row[:, None] & is_pair[None, :]
    start = X_ptr + row_offsets(row, heads, tokens, X_batch, X_head, X_token)
    if HAS_R:
        channel = tl.arange(0, 2 * PAIRS)
        is_channel = channel < HEAD_DIM
        X = tl.load(start + channel[None, :], mask=is_row[:, None] & is_channel[None, :], other=0.0).to(tl.float32)
        R_offsets = channel[:, None] * (HEAD_DIM // 2) + pair[None, :]
        R_mask = is_channel[:, None] & is_pair[None, :]
        R_even = tl.load(R_ptr + R_offsets, mask=R_mask, other=0.0)
        R_odd = tl.load(R_ptr + HEAD_DIM * (HEAD_DIM // 2) + R_offsets, mask=R_mask, other=0.0)
        even = tl.dot(X, R_even, input_precision="tf32x3")
        odd = tl.dot(X, R_odd, input_precision="tf32x3")
    else:
        even = tl.load(start + 2 * pair[None, :], mask=mask, other=0.0).to(tl.float32)
        odd = tl.load(start + 2 * pair[None, :] + 1, mask=mask, other=0.0).to(tl.float32)
    infinity = float("inf")
    low = tl.min(tl.where(is_pair[None, :], tl.minimum(even, odd), infinity), axis=1) * clip_ratio
    high = tl.max(tl.where(is_pair[None, :], tl.maximum(even, odd), -infinity), axis=1) * clip_ratio
    # The largest float16, and the smallest normal one: 65504 and 2^-14.
    low16 = tl.minimum(tl.maximum(low, -65504.0), 65504.0).to(tl.float16)
    span = tl.div_rn(high - low, tl.full(low.shape, 15.0, tl.float32))
    scale16 = tl.minimum(tl.maximum(span, 6.103515625e-05), 65504.0).to(tl.float16)
    scale, low = scale16.to(tl.float32)[:, None], low16.to(tl.float32)[:, None]
    even_steps = tl.div_rn(even - low, tl.broadcast_to(scale, even.shape))
    odd_steps = tl.div_rn(odd - low, tl.broadcast_to(scale, odd.shape))
    # Clamped before and not after: rounding works for small numbers.
    even_code = round_to_even(tl.minimum(tl.maximum(even_steps, 0.0), 15.0)).to(tl.int32)
    odd_code = round_to_even(tl.minimum(tl.maximum(odd_steps, 0.0), 15.0)).to(tl.int32)
    codes = codes_ptr + row_offsets(row, heads, tokens, codes_batch, codes_head, codes_token) + pair[None, :]
    tl.store(codes, (even_code | (odd_code << 4)).to(tl.uint8), mask=mask)
    scales = scale_ptr + row_offsets(row, heads, tokens, scale_batch, scale_head, scale_token)
    lows = low_ptr + row_offsets(row, heads, tokens, low_batch, low_head, low_token)
    tl.store(scales, scale16[:, None], mask=is_row[:, None])
    tl.store(lows, low16[:, None], mask=is_row[:, None])


@triton.jit
@no_type_check
def dequantize_kv_kernel(
    codes_ptr, scale_ptr, low_ptr, R_ptr, Y_ptr, rows, heads, tokens,
    codes_batch, codes_head, codes_token, scale_batch, scale_head, scale_token, low_batch, low_head, low_token,
    HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, HAS_R: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Y (rows, HEAD_DIM), contiguous: what the codes stand for, rotated back."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    pair = tl.arange(0, PAIRS)
    is_pair = pair < HEAD_DIM // 2
    mask = is_row[:, None] & is_pair[None, :]
    codes = codes_ptr + row_offsets(row, heads, tokens, codes_batch, codes_head, codes_token) + pair[None, :]
    packed = tl.load(codes, mask=mask, other=0)
    scales = scale_ptr + row_offsets(row, heads, tokens, scale_batch, scale_head, scale_token)
    lows = low_ptr + row_offsets(row, heads, tokens, low_batch, low_head, low_token)
    scale = tl.load(scales, mask=is_row[:, None], other=0.0).to(tl.float32)
    low = tl.load(lows, mask=is_row[:, None], other=0.0).to(tl.float32)
    even = tl.where(is_pair[None, :], (packed & 0x0F).to(tl.float32) * scale + low, 0.0)
    odd = tl.where(is_pair[None, :], (packed >> 4).to(tl.float32) * scale + low, 0.0)
    start = Y_ptr + row[:, None].to(tl.int64) * HEAD_DIM
    if HAS_R:
        channel = tl.arange(0, 2 * PAIRS)
        is_channel = channel < HEAD_DIM
        R_offsets = channel[None, :] * (HEAD_DIM // 2) + pair[:, None]
        R_mask = is_pair[:, None] & is_channel[None, :]
        R_even = tl.load(R_ptr + R_offsets, mask=R_mask, other=0.0)
        R_odd = tl.load(R_ptr + HEAD_DIM * (HEAD_DIM // 2) + R_offsets, mask=R_mask, other=0.0)
        Y = tl.dot(even, R_even, input_precision="tf32x3") + tl.dot(odd, R_odd, input_precision="tf32x3")
        tl.store(start + channel[None, :], Y.to(OUT), mask=is_row[:, None] & is_channel[None, :])
    else:
        tl.store(start + 2 * pair[None, :], even.to(OUT), mask=mask)
        tl.store(start + 2 * pair[None, :] + 1, odd.to(OUT), mask=mask)
