"""Triton kernels of attention over an INT4 KV cache: split-KV flash decoding, and the sum over its splits.

Centred codes c = code - 8 are exact in float16, so keys and values are never dequantized. With
k = middle + scale * c and middle = low + 8 scale: q.k = scale * (q.c) + middle * sum(q), and
sum p v = sum (p * scale) c + sum p middle. Grids are float16, so p * scale is within its range, and queries are divided
by their largest magnitude first. Even channels sit in the low nibbles, odd ones in the high; both are products of their
own.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def load_codes(ptr, token, mask_token, pair, mask_pair, token_stride):
    """Return centred (even, odd) codes of a tile (tokens, pairs) as float16."""
    offsets = token[:, None].to(tl.int64) * token_stride + pair[None, :]
    packed = tl.load(ptr + offsets, mask=mask_token[:, None] & mask_pair[None, :], other=0)
    return (packed & 0x0F).to(tl.float16) - 8.0, (packed >> 4).to(tl.float16) - 8.0


@triton.jit
@no_type_check
def load_grid(scale_ptr, low_ptr, token, mask_token, scale_stride, low_stride):
    """Return (scale, middle) of a tile's tokens, float32; zeros beyond the end."""
    scale = tl.load(scale_ptr + token.to(tl.int64) * scale_stride, mask=mask_token, other=0.0)
    low = tl.load(low_ptr + token.to(tl.int64) * low_stride, mask=mask_token, other=0.0)
    scale = scale.to(tl.float32)
    return scale, low.to(tl.float32) + 8.0 * scale


@triton.jit
@no_type_check
def load_rotated(
    row_ptr, is_row, pair, is_pair, R_ptr, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, HAS_R: tl.constexpr
):
    """Return the even and the odd channels of rotated rows, float32 (rows, PAIRS).

    `row_ptr` (rows, 1) points at rows; R is float32 (2, HEAD_DIM, HEAD_DIM / 2): even and odd columns of the rotation.
    """
    mask = is_row[:, None] & is_pair[None, :]
    if HAS_R:
        channel = tl.arange(0, 2 * PAIRS)
        is_channel = channel < HEAD_DIM
        X = tl.load(row_ptr + channel[None, :], mask=is_row[:, None] & is_channel[None, :], other=0.0).to(tl.float32)
        R_offsets = channel[:, None] * (HEAD_DIM // 2) + pair[None, :]
        R_mask = is_channel[:, None] & is_pair[None, :]
        R_even = tl.load(R_ptr + R_offsets, mask=R_mask, other=0.0)
        R_odd = tl.load(R_ptr + HEAD_DIM * (HEAD_DIM // 2) + R_offsets, mask=R_mask, other=0.0)
        # TF32: bfloat16 rows are exact in it, and more precision would take the registers of another program.
        even, odd = tl.dot(X, R_even), tl.dot(X, R_odd)
    else:
        even = tl.load(row_ptr + 2 * pair[None, :], mask=mask, other=0.0).to(tl.float32)
        odd = tl.load(row_ptr + 2 * pair[None, :] + 1, mask=mask, other=0.0).to(tl.float32)
    return even, odd


@triton.jit
@no_type_check
def load_queries(
    row_ptr, is_row, pair, is_pair, R_ptr, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, HAS_R: tl.constexpr
):
    """Return (even, odd, sum, size): rotated rows over their largest magnitude, in float16, and their sums."""
    even, odd = load_rotated(row_ptr, is_row, pair, is_pair, R_ptr, HEAD_DIM, PAIRS, HAS_R)
    size = tl.maximum(tl.max(tl.maximum(tl.abs(even), tl.abs(odd)), axis=1), 1e-30)
    even, odd = (even / size[:, None]).to(tl.float16), (odd / size[:, None]).to(tl.float16)
    # Of the rounded values, so that the term with `middle` uses the very ones that the products see.
    return even, odd, tl.sum(even.to(tl.float32) + odd.to(tl.float32), axis=1), size


@triton.jit
@no_type_check
def score_tile(
    scores, visible, token, query, full_head, batch, tokens, queries, mask_ptr, mask_batch, mask_head, mask_query,
    mask_token, MASK: tl.constexpr,
):  # fmt: skip
    """Return the scores after the mask: -inf where a row does not see a token."""
    if MASK == 0:
        visible = visible & (token[None, :] <= (tokens - queries + query)[:, None])
    else:
        at = batch * mask_batch + full_head[:, None] * mask_head + query[:, None].to(tl.int64) * mask_query
        at += token[None, :].to(tl.int64) * mask_token
        if MASK == 1:
            visible = visible & (tl.load(mask_ptr + at, mask=visible, other=0) != 0)
        else:
            scores += tl.load(mask_ptr + at, mask=visible, other=0.0).to(tl.float32)
    return tl.where(visible, scores, float("-inf"))


@triton.jit
@no_type_check
def decode_kernel(
    Q_ptr, R_ptr, K_ptr, K_scale_ptr, K_low_ptr, V_ptr, V_scale_ptr, V_low_ptr, mask_ptr, sums_ptr, stats_ptr,
    kv_heads, queries, tokens, splits, scaling, Q_batch, Q_head, Q_query,
    K_batch, K_head, K_token, K_scale_batch, K_scale_head, K_scale_token, K_low_batch, K_low_head, K_low_token,
    V_batch, V_head, V_token, V_scale_batch, V_scale_head, V_scale_token, V_low_batch, V_low_head, V_low_token,
    mask_batch, mask_head, mask_query, mask_token,
    SHARED: tl.constexpr, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    STEPS: tl.constexpr, MASK: tl.constexpr, HAS_R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend to STEPS tiles of TOKENS cached tokens; store weighted sums, the largest score and the sum of weights.

    Q: (batch, kv_heads * SHARED, queries, HEAD_DIM), any dtype; its rows here: row r is query r % queries of head
    r // queries among the SHARED ones that read the same keys. One program takes ROWS of these rows. `sums` is
    (batch * kv_heads, splits, rows, 2, PAIRS), `stats` (batch * kv_heads, splits, rows, 2), rows padded to ROWS;
    `splits` counts one more than are made here when sink_kernel makes the last.
    MASK: 0 none (row sees tokens up to its own), 1 bool, 2 added to the scores.
    """
    group, split, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, head = (group // kv_heads).to(tl.int64), (group % kv_heads).to(tl.int64)
    rows = tile * ROWS + tl.arange(0, ROWS)
    is_row = rows < SHARED * queries
    query = rows % queries
    pair = tl.arange(0, PAIRS)
    is_pair = pair < HEAD_DIM // 2
    full_head = head * SHARED + rows // queries
    row_ptr = Q_ptr + (batch * Q_batch + full_head * Q_head + query * Q_query)[:, None]
    Q_even, Q_odd, Q_sum, Q_size = load_queries(row_ptr, is_row, pair, is_pair, R_ptr, HEAD_DIM, PAIRS, HAS_R)
    K_ptr += batch * K_batch + head * K_head
    K_scale_ptr += batch * K_scale_batch + head * K_scale_head
    K_low_ptr += batch * K_low_batch + head * K_low_head
    V_ptr += batch * V_batch + head * V_head
    V_scale_ptr += batch * V_scale_batch + head * V_scale_head
    V_low_ptr += batch * V_low_batch + head * V_low_head
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    weight_sum = tl.zeros((ROWS,), dtype=tl.float32)
    middle_sum = tl.zeros((ROWS,), dtype=tl.float32)
    even_sum = tl.zeros((ROWS, PAIRS), dtype=tl.float32)
    odd_sum = tl.zeros((ROWS, PAIRS), dtype=tl.float32)
    for step in tl.range(STEPS, num_stages=STAGES):
        token = (split * STEPS + step) * TOKENS + tl.arange(0, TOKENS)
        is_token = token < tokens
        K_even, K_odd = load_codes(K_ptr, token, is_token, pair, is_pair, K_token)
        K_scale, K_middle = load_grid(K_scale_ptr, K_low_ptr, token, is_token, K_scale_token, K_low_token)
        scores = tl.dot(Q_even, tl.trans(K_even)) + tl.dot(Q_odd, tl.trans(K_odd))
        scores = (scores * K_scale[None, :] + Q_sum[:, None] * K_middle[None, :]) * (Q_size * scaling)[:, None]
        scores = score_tile(
            scores, is_row[:, None] & is_token[None, :], token, query, full_head, batch,
            tokens, queries, mask_ptr, mask_batch, mask_head, mask_query, mask_token, MASK,
        )  # fmt: skip
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        # Rows that have seen no token yet have -inf here; a finite stand-in keeps their exponentials zero, not NaN.
        reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp(scores - reference[:, None])
        shrink = tl.exp(largest - reference)
        V_even, V_odd = load_codes(V_ptr, token, is_token, pair, is_pair, V_token)
        V_scale, V_middle = load_grid(V_scale_ptr, V_low_ptr, token, is_token, V_scale_token, V_low_token)
        scaled = (weights * V_scale[None, :]).to(tl.float16)
        even_sum = even_sum * shrink[:, None] + tl.dot(scaled, V_even)
        odd_sum = odd_sum * shrink[:, None] + tl.dot(scaled, V_odd)
        middle_sum = middle_sum * shrink + tl.sum(weights * V_middle[None, :], axis=1)
        weight_sum = weight_sum * shrink + tl.sum(weights, axis=1)
        largest = new_largest
    padded = tl.num_programs(2) * ROWS
    at = (group.to(tl.int64) * splits + split) * padded + rows
    tl.store(sums_ptr + at[:, None] * (2 * PAIRS) + pair[None, :], even_sum + middle_sum[:, None])
    tl.store(sums_ptr + at[:, None] * (2 * PAIRS) + PAIRS + pair[None, :], odd_sum + middle_sum[:, None])
    tl.store(stats_ptr + at * 2, largest)
    tl.store(stats_ptr + at * 2 + 1, weight_sum)


@triton.jit
@no_type_check
def sink_kernel(
    Q_ptr, R_ptr, K_ptr, V_ptr, mask_ptr, sums_ptr, stats_ptr,
    kv_heads, queries, sinks, splits, scaling, Q_batch, Q_head, Q_query, K_batch, K_head, K_token, V_batch, V_head,
    V_token, mask_batch, mask_head, mask_query, mask_token,
    SHARED: tl.constexpr, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, SINKS: tl.constexpr,
    MASK: tl.constexpr, HAS_R: tl.constexpr,
):  # fmt: skip
    """Attend to the first tokens, which are not packed (batch, kv_heads, sinks, HEAD_DIM): one more split, the last.

    Rows, `sums` and `stats` as in decode_kernel; SINKS is a power of two of at least 16. Keys and values are rotated
    here, so that combine_kernel finds all splits in one basis.
    """
    group, tile = tl.program_id(0), tl.program_id(1)
    batch, head = (group // kv_heads).to(tl.int64), (group % kv_heads).to(tl.int64)
    rows = tile * ROWS + tl.arange(0, ROWS)
    is_row = rows < SHARED * queries
    query = rows % queries
    pair = tl.arange(0, PAIRS)
    is_pair = pair < HEAD_DIM // 2
    token = tl.arange(0, SINKS)
    is_token = token < sinks
    full_head = head * SHARED + rows // queries
    Q_rows = Q_ptr + (batch * Q_batch + full_head * Q_head + query * Q_query)[:, None]
    K_rows = K_ptr + batch * K_batch + head * K_head + token[:, None] * K_token
    V_rows = V_ptr + batch * V_batch + head * V_head + token[:, None] * V_token
    Q_even, Q_odd = load_rotated(Q_rows, is_row, pair, is_pair, R_ptr, HEAD_DIM, PAIRS, HAS_R)
    K_even, K_odd = load_rotated(K_rows, is_token, pair, is_pair, R_ptr, HEAD_DIM, PAIRS, HAS_R)
    scores = tl.dot(Q_even, tl.trans(K_even), input_precision="tf32x3")
    scores += tl.dot(Q_odd, tl.trans(K_odd), input_precision="tf32x3")
    # Sinks are older than all queries: without a mask every row sees them.
    scores = score_tile(
        scores * scaling, is_row[:, None] & is_token[None, :], token, query, full_head, batch,
        sinks + queries, queries, mask_ptr, mask_batch, mask_head, mask_query, mask_token, MASK,
    )  # fmt: skip
    largest = tl.max(scores, axis=1)
    weights = tl.exp(scores - tl.where(largest == float("-inf"), 0.0, largest)[:, None])
    V_even, V_odd = load_rotated(V_rows, is_token, pair, is_pair, R_ptr, HEAD_DIM, PAIRS, HAS_R)
    even, odd = tl.dot(weights, V_even, input_precision="tf32x3"), tl.dot(weights, V_odd, input_precision="tf32x3")
    at = (group.to(tl.int64) * splits + splits - 1) * (tl.num_programs(1) * ROWS) + rows
    tl.store(sums_ptr + at[:, None] * (2 * PAIRS) + pair[None, :], even)
    tl.store(sums_ptr + at[:, None] * (2 * PAIRS) + PAIRS + pair[None, :], odd)
    tl.store(stats_ptr + at * 2, largest)
    tl.store(stats_ptr + at * 2 + 1, tl.sum(weights, axis=1))


@triton.jit
@no_type_check
def combine_kernel(
    sums_ptr, stats_ptr, R_ptr, Y_ptr, rows, padded, splits,
    HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, HAS_R: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Y (batch * kv_heads, rows, HEAD_DIM): the splits' sums, brought to one largest score, over the weights' sum.

    The sum is then rotated back; R is as in load_queries.
    """
    group = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    pair = tl.arange(0, PAIRS)
    is_pair = pair < HEAD_DIM // 2
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    weight_sum = tl.zeros((ROWS,), dtype=tl.float32)
    even = tl.zeros((ROWS, PAIRS), dtype=tl.float32)
    odd = tl.zeros((ROWS, PAIRS), dtype=tl.float32)
    split = 0
    while split < splits:
        at = (group * splits + split) * padded + row
        theirs = tl.load(stats_ptr + at * 2)
        new_largest = tl.maximum(largest, theirs)
        reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        mine, share = tl.exp(largest - reference), tl.exp(theirs - reference)
        weight_sum = weight_sum * mine + tl.load(stats_ptr + at * 2 + 1) * share
        sums = sums_ptr + at[:, None] * (2 * PAIRS) + pair[None, :]
        even = even * mine[:, None] + tl.load(sums) * share[:, None]
        odd = odd * mine[:, None] + tl.load(sums + PAIRS) * share[:, None]
        largest = new_largest
        split += 1
    # Rows of padding have no weights; a real row that sees no token gives NaN, as a softmax over nothing does.
    weight_sum = tl.where(row < rows, weight_sum, 1.0)[:, None]
    even, odd = even / weight_sum, odd / weight_sum
    if HAS_R:
        channel = tl.arange(0, 2 * PAIRS)
        is_channel = channel < HEAD_DIM
        R_offsets = channel[None, :] * (HEAD_DIM // 2) + pair[:, None]
        R_mask = is_pair[:, None] & is_channel[None, :]
        even = tl.where(is_pair[None, :], even, 0.0)
        odd = tl.where(is_pair[None, :], odd, 0.0)
        R_even = tl.load(R_ptr + R_offsets, mask=R_mask, other=0.0)
        R_odd = tl.load(R_ptr + HEAD_DIM * (HEAD_DIM // 2) + R_offsets, mask=R_mask, other=0.0)
        Y = tl.dot(even, R_even, input_precision="tf32x3") + tl.dot(odd, R_odd, input_precision="tf32x3")
        target = Y_ptr + (group * rows + row)[:, None] * HEAD_DIM + channel[None, :]
        tl.store(target, Y.to(OUT), mask=(row < rows)[:, None] & is_channel[None, :])
    else:
        target = Y_ptr + (group * rows + row)[:, None] * HEAD_DIM + 2 * pair[None, :]
        mask = (row < rows)[:, None] & is_pair[None, :]
        tl.store(target, even.to(OUT), mask=mask)
        tl.store(target + 1, odd.to(OUT), mask=mask)
