"""Triton kernels of transform, rounding and packing.

Rotations run on the tensor cores in bfloat16 with float32 sums. The last rotation makes its even and its odd output
channels by two products, so that a byte's two codes end up in one thread. Every kernel here must be launched with
`enable_fp_fusion=False`: `round_to_even` counts on a product being rounded before the sum that follows it.
"""

from typing import no_type_check

import triton
import triton.language as tl

_MAGIC = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding and subtracting it rounds |x| < 2^22 to a whole number, half to even."""
_MIN_RELATIVE_SCALE = tl.constexpr(1e-4)
_TINY = tl.constexpr(1e-12)


@triton.jit
@no_type_check
def round_to_even(x):
    """Return x rounded to whole numbers."""
    return (x + _MAGIC) - _MAGIC


@triton.jit
@no_type_check
def rotate(X, R, IN_FLOAT32: tl.constexpr):
    """Return X R, summed in float32; the operands are bfloat16 (or those values in float32, for the interpreter)."""
    if IN_FLOAT32:
        return tl.dot(X.to(tl.float32), R.to(tl.float32), input_precision="ieee")
    return tl.dot(X, R)


@triton.jit
@no_type_check
def row_grid(low, high, clip_ptr, BITS: tl.constexpr, IS_SYMMETRIC: tl.constexpr):
    """Return (scale, zero_point) of rows that span low..high: duquant.quantizers.affine.make_grid, to the bit."""
    low = low * tl.load(clip_ptr)
    high = high * tl.load(clip_ptr + 1)
    magnitude = tl.maximum(tl.abs(low), tl.abs(high))
    if IS_SYMMETRIC:
        scale = tl.maximum(tl.div_rn(magnitude, tl.full(low.shape, 2.0 ** (BITS - 1) - 0.5, tl.float32)), _TINY)
        zero_point = tl.zeros(low.shape, dtype=tl.float32)
    else:
        span = tl.div_rn(high - low, tl.full(low.shape, 2.0**BITS - 1.0, tl.float32))
        scale = tl.maximum(tl.maximum(span, magnitude * _MIN_RELATIVE_SCALE), _TINY)
        zero_point = -(2.0 ** (BITS - 1)) - round_to_even(tl.div_rn(low, scale))
    return scale, zero_point


@triton.jit
@no_type_check
def to_codes(x, reciprocal, zero_point, BITS: tl.constexpr):
    """Return centred codes as int32."""
    code = round_to_even(x * reciprocal) + zero_point
    return tl.minimum(tl.maximum(code, -(2.0 ** (BITS - 1))), 2.0 ** (BITS - 1) - 1.0).to(tl.int32)


@triton.jit
@no_type_check
def store_codes(
    even, odd, data_ptr, planes_ptr, first, token, pair, mask_even, mask_odd, width, half, plane,
    BITS: tl.constexpr, HAS_PLANES: tl.constexpr,
):  # fmt: skip
    """Store codes of channels 2 pair and 2 pair + 1: two a byte up to 4 bits, one a byte above; and into planes.

    `first` is the row that the pointers are moved to, in 64 bits, `token` counts from there: offsets of whole tiles in
    64 bits would take too many registers.
    """
    data_ptr += first * (half if BITS <= 4 else width)
    planes_ptr += first * half
    if BITS <= 4:
        high = tl.where(mask_odd, odd + 8, 0)  # the last high nibble of an odd width is zero
        packed = ((even + 8) | (high << 4)).to(tl.uint8)
        tl.store(data_ptr + token * half + pair, packed, mask=mask_even)
    else:
        tl.store(data_ptr + token * width + 2 * pair, even.to(tl.int8), mask=mask_even)
        tl.store(data_ptr + token * width + 2 * pair + 1, odd.to(tl.int8), mask=mask_odd)
    if HAS_PLANES:
        tl.store(planes_ptr + token * half + pair, even.to(tl.int8), mask=mask_even)
        tl.store(planes_ptr + plane + token * half + pair, tl.where(mask_odd, odd, 0).to(tl.int8), mask=mask_even)


@triton.jit(do_not_specialize=["M"])
@no_type_check
def rotate_permute_kernel(
    X_ptr, R_ptr, target_ptr, Y_ptr, M, H, X_stride, R_stride,
    N: tl.constexpr, N_PAD: tl.constexpr, TOKENS: tl.constexpr, HAS_R: tl.constexpr, HAS_PERM: tl.constexpr,
    IS_TILED: tl.constexpr, IN_FLOAT32: tl.constexpr,
):  # fmt: skip
    """Y = (X R1)[:, P] in bfloat16; one program makes TOKENS tokens of one block, and stores by channel.

    `target` (H,) says where each channel goes. Y is (tiles, H, TOKENS) when IS_TILED, so that what one channel
    stores, and what a block of the next kernel reads, is contiguous; else (M, H), for few tokens.
    """
    tile, block = tl.program_id(0), tl.program_id(1)
    token = tile * TOKENS + tl.arange(0, TOKENS)
    inside = tl.arange(0, N_PAD)
    channel = block * N + inside
    mask = (token < M)[:, None] & (inside < N)[None, :]
    X = tl.load(X_ptr + token[:, None].to(tl.int64) * X_stride + channel[None, :], mask=mask, other=0.0)
    X = X.to(tl.float32).to(tl.bfloat16)
    if HAS_R:
        square = (inside < N)[:, None] & (inside < N)[None, :]
        R = tl.load(R_ptr + block * R_stride + inside[:, None] * N + inside[None, :], mask=square, other=0.0)
        X = rotate(X, R, IN_FLOAT32).to(tl.bfloat16)
    target = channel
    if HAS_PERM:
        target = tl.load(target_ptr + channel, mask=inside < N, other=0)
    if IS_TILED:
        # Tokens beyond the end are zeros there, not what was in memory before.
        offsets = tile.to(tl.int64) * TOKENS * H + target[None, :] * TOKENS + tl.arange(0, TOKENS)[:, None]
        tl.store(Y_ptr + offsets, X, mask=(inside < N)[None, :])
    else:
        tl.store(Y_ptr + token[:, None].to(tl.int64) * H + target[None, :], X, mask=mask)


@triton.jit(do_not_specialize=["M"])
@no_type_check
def quantize_rows_kernel(
    X_ptr, R_ptr, clip_ptr, data_ptr, planes_ptr, scale_ptr, zero_ptr, sum_ptr, M, H, half, X_stride, plane,
    N: tl.constexpr, N_PAD: tl.constexpr, BLOCKS_PAD: tl.constexpr, TOKENS: tl.constexpr, HAS_R: tl.constexpr,
    BITS: tl.constexpr, IS_SYMMETRIC: tl.constexpr, HAS_PLANES: tl.constexpr, IN_FLOAT32: tl.constexpr,
):  # fmt: skip
    """Rotate by one shared R (or not), choose each row's grid, round and pack: one program, TOKENS whole rows.

    Blocks of all rows are the rows of one matrix, (TOKENS * BLOCKS_PAD, N_PAD), so one pass over memory does it all.
    """
    rows = tl.arange(0, TOKENS * BLOCKS_PAD)
    first = tl.program_id(0).to(tl.int64) * TOKENS
    token = rows // BLOCKS_PAD
    left = (M - first).to(tl.int32)
    block = rows % BLOCKS_PAD
    pair_inside = tl.arange(0, N_PAD // 2)
    pair = block[:, None] * (N // 2) + pair_inside[None, :]
    inside_block = (token < left)[:, None] & (pair_inside < N // 2)[None, :]
    mask_even = inside_block & (2 * pair < H)
    mask_odd = inside_block & (2 * pair + 1 < H)
    row_ptr = X_ptr + first * X_stride + token[:, None] * X_stride
    if HAS_R:
        inside = tl.arange(0, N_PAD)
        channel = block[:, None] * N + inside[None, :]
        mask = (token < left)[:, None] & (inside < N)[None, :] & (channel < H)
        X = tl.load(row_ptr + channel, mask=mask, other=0.0).to(tl.float32).to(tl.bfloat16)
        half_R = (inside < N)[:, None] & (pair_inside < N // 2)[None, :]
        offsets = inside[:, None] * (N // 2) + pair_inside[None, :]
        even = rotate(X, tl.load(R_ptr + offsets, mask=half_R, other=0.0), IN_FLOAT32)
        odd = rotate(X, tl.load(R_ptr + N * (N // 2) + offsets, mask=half_R, other=0.0), IN_FLOAT32)
    else:
        even = tl.load(row_ptr + 2 * pair, mask=mask_even, other=0.0).to(tl.float32)
        odd = tl.load(row_ptr + 2 * pair + 1, mask=mask_odd, other=0.0).to(tl.float32)
    infinity = float("inf")
    low = tl.minimum(tl.where(mask_even, even, infinity), tl.where(mask_odd, odd, infinity))
    high = tl.maximum(tl.where(mask_even, even, -infinity), tl.where(mask_odd, odd, -infinity))
    low = tl.min(tl.reshape(tl.min(low, axis=1), (TOKENS, BLOCKS_PAD)), axis=1)
    high = tl.max(tl.reshape(tl.max(high, axis=1), (TOKENS, BLOCKS_PAD)), axis=1)
    row = first + tl.arange(0, TOKENS)
    # Rows beyond the end have no range; any will do, as nothing of them is stored.
    low, high = tl.where(row < M, low, 0.0), tl.where(row < M, high, 0.0)
    scale, zero_point = row_grid(low, high, clip_ptr, BITS, IS_SYMMETRIC)
    reciprocal = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    each_reciprocal = tl.reshape(tl.broadcast_to(reciprocal[:, None], (TOKENS, BLOCKS_PAD)), (TOKENS * BLOCKS_PAD,))
    each_zero = tl.reshape(tl.broadcast_to(zero_point[:, None], (TOKENS, BLOCKS_PAD)), (TOKENS * BLOCKS_PAD,))
    even_code = to_codes(even, each_reciprocal[:, None], each_zero[:, None], BITS)
    odd_code = to_codes(odd, each_reciprocal[:, None], each_zero[:, None], BITS)
    code_sum = tl.where(mask_even, even_code, 0) + tl.where(mask_odd, odd_code, 0)
    code_sum = tl.sum(tl.reshape(tl.sum(code_sum, axis=1), (TOKENS, BLOCKS_PAD)), axis=1)
    tl.store(scale_ptr + row, scale, mask=row < M)
    tl.store(zero_ptr + row, zero_point, mask=row < M)
    tl.store(sum_ptr + row, code_sum.to(tl.float32), mask=row < M)
    store_codes(
        even_code, odd_code, data_ptr, planes_ptr, first, token[:, None], pair, mask_even, mask_odd, H, half, plane,
        BITS, HAS_PLANES,
    )  # fmt: skip


@triton.jit
@no_type_check
def rotate_tile(
    Y_ptr, R_ptr, tile, block, H, R_stride,
    N: tl.constexpr, N_PAD: tl.constexpr, TOKENS: tl.constexpr, HAS_R: tl.constexpr, IN_FLOAT32: tl.constexpr,
):  # fmt: skip
    """Return even and odd channels of one rotated block, (TOKENS, N_PAD // 2), from the tiled layout."""
    slot = tl.arange(0, TOKENS)
    pair_inside = tl.arange(0, N_PAD // 2)
    start = Y_ptr + tile.to(tl.int64) * TOKENS * H + block * N * TOKENS
    if HAS_R:
        inside = tl.arange(0, N_PAD)
        Y = tl.load(start + inside[:, None] * TOKENS + slot[None, :], mask=(inside < N)[:, None], other=0.0)
        Y = tl.trans(Y)  # (TOKENS, N_PAD)
        half_R = (inside < N)[:, None] & (pair_inside < N // 2)[None, :]
        R = R_ptr + block * R_stride + inside[:, None] * (N // 2) + pair_inside[None, :]
        even = rotate(Y, tl.load(R, mask=half_R, other=0.0), IN_FLOAT32)
        odd = rotate(Y, tl.load(R + N * (N // 2), mask=half_R, other=0.0), IN_FLOAT32)
    else:
        mask = (pair_inside < N // 2)[None, :]
        even = tl.load(start + 2 * pair_inside[None, :] * TOKENS + slot[:, None], mask=mask, other=0.0).to(tl.float32)
        odd = tl.load(start + (2 * pair_inside[None, :] + 1) * TOKENS + slot[:, None], mask=mask, other=0.0)
        odd = odd.to(tl.float32)
    return even, odd


@triton.jit(do_not_specialize=["M"])
@no_type_check
def block_range_kernel(
    Y_ptr, R_ptr, low_ptr, high_ptr, sum_ptr, M, H, R_stride,
    N: tl.constexpr, N_PAD: tl.constexpr, TOKENS: tl.constexpr, HAS_R: tl.constexpr, IN_FLOAT32: tl.constexpr,
):  # fmt: skip
    """Store the smallest and the largest value of each token in one rotated block, (blocks, M); zero the row sums."""
    tile, block = tl.program_id(0), tl.program_id(1)
    even, odd = rotate_tile(Y_ptr, R_ptr, tile, block, H, R_stride, N, N_PAD, TOKENS, HAS_R, IN_FLOAT32)
    mask = (tl.arange(0, N_PAD // 2) < N // 2)[None, :]
    infinity = float("inf")
    low = tl.min(tl.where(mask, tl.minimum(even, odd), infinity), axis=1)
    high = tl.max(tl.where(mask, tl.maximum(even, odd), -infinity), axis=1)
    token = tile * TOKENS + tl.arange(0, TOKENS)
    tl.store(low_ptr + block * M + token, low, mask=token < M)
    tl.store(high_ptr + block * M + token, high, mask=token < M)
    if block == 0:
        tl.store(sum_ptr + token, tl.zeros((TOKENS,), dtype=tl.float32), mask=token < M)


@triton.jit(do_not_specialize=["M"])
@no_type_check
def quantize_blocks_kernel(
    Y_ptr, R_ptr, low_ptr, high_ptr, clip_ptr, data_ptr, planes_ptr, scale_ptr, zero_ptr, sum_ptr, M, H, half, blocks,
    R_stride, plane,
    N: tl.constexpr, N_PAD: tl.constexpr, BLOCKS_PAD: tl.constexpr, TOKENS: tl.constexpr, HAS_R: tl.constexpr,
    BITS: tl.constexpr, IS_SYMMETRIC: tl.constexpr, HAS_PLANES: tl.constexpr, IN_FLOAT32: tl.constexpr,
):  # fmt: skip
    """Rotate once more what block_range_kernel looked at (it is in L2), and round it to the row's grid."""
    tile, block = tl.program_id(0), tl.program_id(1)
    token = tile * TOKENS + tl.arange(0, TOKENS)
    each = tl.arange(0, BLOCKS_PAD)
    # What is beyond the last block repeats the first one: a masked zero could not be told from a value.
    ranges = tl.where(each < blocks, each, 0)[:, None] * M + token[None, :]
    mask = tl.broadcast_to((token < M)[None, :], (BLOCKS_PAD, TOKENS))
    low = tl.min(tl.load(low_ptr + ranges, mask=mask, other=0.0), axis=0)
    high = tl.max(tl.load(high_ptr + ranges, mask=mask, other=0.0), axis=0)
    scale, zero_point = row_grid(low, high, clip_ptr, BITS, IS_SYMMETRIC)
    reciprocal = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    even, odd = rotate_tile(Y_ptr, R_ptr, tile, block, H, R_stride, N, N_PAD, TOKENS, HAS_R, IN_FLOAT32)
    even_code = to_codes(even, reciprocal[:, None], zero_point[:, None], BITS)
    odd_code = to_codes(odd, reciprocal[:, None], zero_point[:, None], BITS)
    pair_inside = tl.arange(0, N_PAD // 2)
    pair = block * (N // 2) + pair_inside[None, :]
    valid = (token < M)[:, None] & (pair_inside < N // 2)[None, :]
    code_sum = tl.sum(tl.where(valid, even_code + odd_code, 0), axis=1)
    # Whole numbers below 2^24: float32 adds them exactly, in any order.
    tl.atomic_add(sum_ptr + token, code_sum.to(tl.float32), mask=token < M, sem="relaxed")
    if block == 0:
        tl.store(scale_ptr + token, scale, mask=token < M)
        tl.store(zero_ptr + token, zero_point, mask=token < M)
    store_codes(
        even_code, odd_code, data_ptr, planes_ptr, tile.to(tl.int64) * TOKENS, tl.arange(0, TOKENS)[:, None], pair,
        valid, valid, H, half, plane, BITS, HAS_PLANES,
    )  # fmt: skip
