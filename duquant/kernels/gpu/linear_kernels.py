"""Triton kernels of the INT4 linear: a tiled product for many rows, a split-K one for few.

Both compute Y.T tiles: the weight is the left operand of the tensor cores, which takes it from registers, so that
unpacking nibbles costs no trip through shared memory. Codes are multiplied as int8 and summed in int32: exact. INT4
tensor cores are gone since Hopper (mma.s4 is emulated there), so 4 bits are the storage and 8 the arithmetic.

Channels are never reordered: low nibbles of a weight meet the even channels, high ones the odd ones, and a sum does not
care for the order. So weights stay as they lie in the artifact.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def unpack_nibbles(packed, USE_ASM: tl.constexpr):
    """Return (low, high) nibbles of uint8 as int8 in 0..15. The assembly does four bytes at once."""
    if USE_ASM:
        low, high = tl.inline_asm_elementwise(
            "and.b32 $0, $2, 0x0F0F0F0F; shr.b32 $1, $2, 4; and.b32 $1, $1, 0x0F0F0F0F;",
            "=&r,=&r,r",
            [packed],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        low = (packed & 0x0F).to(tl.int8)
        high = (packed >> 4).to(tl.int8)
    return low, high


@triton.jit
@no_type_check
def load_pairs(
    even_ptr, odd_ptr, rows, columns, row_stride, num_columns, IS_PACKED: tl.constexpr, EVEN_K: tl.constexpr,
    USE_ASM: tl.constexpr,
):  # fmt: skip
    """Return a tile of activation codes of the even and of the odd channels.

    Packed rows hold q + 8 in nibbles; otherwise there are two planes of centred int8 codes. Masked bytes are zero on
    the weight's side, so what they are here does not matter.
    """
    offsets = rows[:, None].to(tl.int64) * row_stride + columns[None, :]
    mask = columns[None, :] < num_columns
    if IS_PACKED:
        packed = tl.load(even_ptr + offsets) if EVEN_K else tl.load(even_ptr + offsets, mask=mask, other=0)
        even, odd = unpack_nibbles(packed, USE_ASM)
    elif EVEN_K:
        even, odd = tl.load(even_ptr + offsets), tl.load(odd_ptr + offsets)
    else:
        even = tl.load(even_ptr + offsets, mask=mask, other=0)
        odd = tl.load(odd_ptr + offsets, mask=mask, other=0)
    return even, odd


@triton.jit
@no_type_check
def load_weight(
    weight_ptr, rows, columns, row_stride, num_columns, plane, IS_UNPACKED: tl.constexpr, EVEN_K: tl.constexpr,
    USE_ASM: tl.constexpr,
):  # fmt: skip
    """Return a tile of weight codes + 8 of the even and of the odd channels, from nibbles or from two planes."""
    offsets = rows[:, None].to(tl.int64) * row_stride + columns[None, :]
    mask = columns[None, :] < num_columns
    if IS_UNPACKED:
        # Planes are only made of rows that fill their tiles.
        even = tl.load(weight_ptr + offsets)
        odd = tl.load(weight_ptr + plane + offsets)
    elif EVEN_K:
        even, odd = unpack_nibbles(tl.load(weight_ptr + offsets, eviction_policy="evict_first"), USE_ASM)
    else:
        even, odd = unpack_nibbles(tl.load(weight_ptr + offsets, mask=mask, other=0), USE_ASM)
    return even, odd


@triton.jit
@no_type_check
def finish(
    accumulated, Y_ptr, X_scale_ptr, X_zero_ptr, X_sum_ptr, W_scale_ptr, W_zero_ptr, W_sum_ptr, bias_ptr,
    M, N, K, offs_m, offs_n, HAS_BIAS: tl.constexpr, IS_PACKED: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Correct for the zero points in exact integers, round once, scale, add the bias, store: the reference's formula.

    `accumulated` (n, m) holds sums of u_w u_x with u = q + 8 where the operand was packed, and q where it was not:
    q_w.q_x = u_w.u_x - 8 sum(q_x) [- 8 sum(q_w) - 64 K, for packed activations].
    """
    mask_m, mask_n = offs_m < M, offs_n < N
    X_scale = tl.load(X_scale_ptr + offs_m, mask=mask_m, other=0.0)
    X_zero = tl.load(X_zero_ptr + offs_m, mask=mask_m, other=0.0).to(tl.int64)
    X_sum = tl.load(X_sum_ptr + offs_m, mask=mask_m, other=0.0).to(tl.int32)
    W_scale = tl.load(W_scale_ptr + offs_n, mask=mask_n, other=0.0)
    W_zero = tl.load(W_zero_ptr + offs_n, mask=mask_n, other=0.0).to(tl.int32)
    W_sum = tl.load(W_sum_ptr + offs_n, mask=mask_n, other=0.0).to(tl.int32)  # of q_w - z_w
    small = accumulated - (W_zero + 8)[:, None] * X_sum[None, :]
    if IS_PACKED:
        small -= (8 * (W_sum + K * W_zero) + 64 * K)[:, None]
    # A row far from zero has a zero point near 1e4, and this product then leaves the 32 bits.
    bracket = small.to(tl.int64) - W_sum.to(tl.int64)[:, None] * X_zero[None, :]
    Y = bracket.to(tl.float32) * W_scale[:, None] * X_scale[None, :]
    if HAS_BIAS:
        Y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    targets = Y_ptr + offs_m[None, :].to(tl.int64) * N + offs_n[:, None]
    tl.store(targets, Y.to(OUT), mask=mask_m[None, :] & mask_n[:, None])


@triton.jit(do_not_specialize=["M"])
@no_type_check
def linear_kernel(
    X_ptr, W_ptr, Y_ptr, X_scale_ptr, X_zero_ptr, X_sum_ptr, W_scale_ptr, W_zero_ptr, W_sum_ptr, bias_ptr,
    M, N, K, X_bytes, X_stride, W_stride, X_plane, W_plane,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, STEPS: tl.constexpr,
    STAGES: tl.constexpr, HAS_BIAS: tl.constexpr, IS_PACKED: tl.constexpr, IS_UNPACKED: tl.constexpr,
    EVEN_K: tl.constexpr, USE_ASM: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Y (M, N) = X W.T; one program makes a tile of BLOCK_M tokens and BLOCK_N output channels.

    X: uint8 (M, X_bytes) packed, or two int8 planes (2, M, X_bytes), `X_plane` elements apart. W: uint8 (N, W_stride)
    packed, or two int8 planes of codes + 8, `W_plane` apart (IS_UNPACKED). BLOCK_K counts bytes, two channels each.
    GROUP tiles of tokens share a weight tile while it is in L2.
    """
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = program // (GROUP * tiles_n)
    first_m = group * GROUP
    group_size = tl.minimum(tiles_m - first_m, GROUP)
    tile_m = first_m + (program % (GROUP * tiles_n)) % group_size
    tile_n = (program % (GROUP * tiles_n)) // group_size
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows beyond the end are read again from the start: no masks in the loop, and they are not stored.
    rows_m, rows_n = offs_m % M, offs_n % N
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    for step in tl.range(STEPS, num_stages=STAGES):
        columns = step * BLOCK_K + tl.arange(0, BLOCK_K)
        W_even, W_odd = load_weight(
            W_ptr, rows_n, columns, W_stride, X_bytes, W_plane, IS_UNPACKED, EVEN_K, USE_ASM
        )  # fmt: skip
        X_even, X_odd = load_pairs(
            X_ptr, X_ptr + X_plane, rows_m, columns, X_stride, X_bytes, IS_PACKED, EVEN_K, USE_ASM
        )  # fmt: skip
        accumulator = tl.dot(W_even, tl.trans(X_even), accumulator, out_dtype=tl.int32)
        accumulator = tl.dot(W_odd, tl.trans(X_odd), accumulator, out_dtype=tl.int32)
    finish(
        accumulator, Y_ptr, X_scale_ptr, X_zero_ptr, X_sum_ptr, W_scale_ptr, W_zero_ptr, W_sum_ptr, bias_ptr,
        M, N, K, offs_m, offs_n, HAS_BIAS, IS_PACKED, OUT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
@no_type_check
def split_linear_kernel(
    X_ptr, W_ptr, Y_ptr, X_scale_ptr, X_zero_ptr, X_sum_ptr, W_scale_ptr, W_zero_ptr, W_sum_ptr, bias_ptr,
    partial_ptr, arrived_ptr, M, N, K, X_bytes, X_stride, W_stride, X_plane,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, STEPS: tl.constexpr,
    STAGES: tl.constexpr, HAS_BIAS: tl.constexpr, IS_PACKED: tl.constexpr, EVEN_K: tl.constexpr,
    USE_ASM: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """As linear_kernel for few tokens, when reading the weight is all that takes time: SPLIT programs share a tile.

    Each sums STEPS blocks of every row into its own int32 partial (SPLIT, tiles, BLOCK_N, BLOCK_M); the last to
    arrive adds them up, whole numbers, so the order does not matter and the bits are always the same. It sets
    `arrived` back to zero for the next launch.
    """
    tile_n, split, tile_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_m, rows_n = offs_m % M, offs_n % N
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    for step in tl.range(STEPS, num_stages=STAGES):
        columns = (split * STEPS + step) * BLOCK_K + tl.arange(0, BLOCK_K)
        W_even, W_odd = load_weight(W_ptr, rows_n, columns, W_stride, X_bytes, 0, False, EVEN_K, USE_ASM)
        X_even, X_odd = load_pairs(
            X_ptr, X_ptr + X_plane, rows_m, columns, X_stride, X_bytes, IS_PACKED, EVEN_K, USE_ASM
        )  # fmt: skip
        accumulator = tl.dot(W_even, tl.trans(X_even), accumulator, out_dtype=tl.int32)
        accumulator = tl.dot(W_odd, tl.trans(X_odd), accumulator, out_dtype=tl.int32)
    is_last = True
    if SPLIT > 1:
        tiles = tl.num_programs(0) * tl.num_programs(2)
        tile = tile_m * tl.num_programs(0) + tile_n
        inside = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        mine = partial_ptr + (split * tiles + tile) * (BLOCK_N * BLOCK_M) + inside
        tl.store(mine, accumulator)
        # All threads have stored before one of them says so; whoever sees the last arrival sees the stores.
        tl.debug_barrier()
        is_last = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLIT - 1
        if is_last:
            accumulator = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
            for other in tl.static_range(SPLIT):
                theirs = partial_ptr + (other * tiles + tile) * (BLOCK_N * BLOCK_M) + inside
                accumulator += tl.load(theirs, cache_modifier=".cg")
            tl.store(arrived_ptr + tile, 0)
    if is_last:
        finish(
            accumulator, Y_ptr, X_scale_ptr, X_zero_ptr, X_sum_ptr, W_scale_ptr, W_zero_ptr, W_sum_ptr, bias_ptr,
            M, N, K, offs_m, offs_n, HAS_BIAS, IS_PACKED, OUT,
        )  # fmt: skip


@triton.jit
@no_type_check
def planes_kernel(data_ptr, planes_ptr, count, plane, OFFSET: tl.constexpr, USE_ASM: tl.constexpr, BLOCK: tl.constexpr):
    """Unpack `count` bytes into two int8 planes, low nibbles and high ones (even and odd channels), minus OFFSET."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    low, high = unpack_nibbles(tl.load(data_ptr + offsets, mask=mask, other=0), USE_ASM)
    tl.store(planes_ptr + offsets, low - OFFSET, mask=mask)
    tl.store(planes_ptr + plane + offsets, high - OFFSET, mask=mask)
