"""Tile sizes by shape and GPU: a small fixed table, so that nothing is tuned at run time.

Chosen by what compiles without spills and by what is published for int8 products of these shapes; `make bench-gpu`
measures its neighbours, too, so that the table can follow the measurements.
"""

from dataclasses import dataclass

DECODE_ROWS = 64
"""Up to so many rows a product is bound by reading the weight."""
_WAVES_OF_PROGRAMS = 264
"""Two for each multiprocessor of an H100 or H200: enough bytes in flight to keep the memory busy."""


@dataclass(frozen=True)
class LinearConfig:
    """Tile of tokens x output channels x bytes of a row (two channels each)."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    split: int = 1
    """Programs that share a tile's sum; 0 means the kernel for many rows."""
    unpack_activation: bool = False
    """Unpack the activation's codes into planes before the product (many rows), or inside it (few)."""
    unpack_weight: bool = False
    """Unpack the weight before the product, into twice its bytes for the while: pays only for very many rows."""


def linear_config(tokens: int, out_features: int, row_bytes: int, capability: tuple[int, int]) -> LinearConfig:
    """Choose tiles for a product of (tokens, 2 row_bytes) and (out_features, 2 row_bytes).

    >>> linear_config(2048, 4096, 2048, (9, 0)).block_m
    256
    >>> linear_config(1, 4096, 2048, (9, 0)).split
    8
    """
    if tokens <= DECODE_ROWS:
        block_m = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
        block_k = 128
        tiles = -(-out_features // 64)
        split = 1
        while split < 8 and tiles * split < _WAVES_OF_PROGRAMS and row_bytes // (2 * split) >= 2 * block_k:
            split *= 2
        stages = 4 if capability >= (8, 0) and capability not in ((8, 6), (8, 9)) else 3
        return LinearConfig(block_m, 64, block_k, warps=4, stages=stages, split=split)
    if tokens <= 256:
        return LinearConfig(64, 64, 64, warps=4, stages=4, split=0, unpack_activation=True)
    if capability[0] >= 9:
        return LinearConfig(256, 128, 64, warps=8, stages=4, split=0, unpack_activation=True)
    return LinearConfig(128, 128, 32, warps=8, stages=3, split=0, unpack_activation=True)


MAX_BLOCK = 128
"""Largest rotation block: two of its tiles, and the tokens', have to fit into shared memory everywhere."""
MAX_ROW_ELEMENTS = 16384
"""Largest padded row that one program rounds at once; twice as much spills registers."""
PREFILL_TOKENS = 64
"""Tokens of one tile where every block is a program of its own."""


@dataclass(frozen=True)
class RowConfig:
    """Whole rows that one program rounds."""

    tokens: int
    warps: int


def row_config(tokens: int, blocks: int, block: int) -> RowConfig:
    """Choose how many rows of `blocks` x `block` padded channels a program takes.

    Few tokens are spread over as many programs as there are; with many, a program reads R once for several.

    >>> row_config(1, 32, 128), row_config(2048, 32, 128)
    (RowConfig(tokens=1, warps=8), RowConfig(tokens=4, warps=8))
    """
    least = max(1, 16 // blocks)  # the tensor cores take no less than 16 rows
    most = least if tokens <= DECODE_ROWS else max(least, 16384 // (blocks * block))
    return RowConfig(most, warps=4 if most * blocks * block <= 2048 else 8)


@dataclass(frozen=True)
class AttentionConfig:
    """One program takes `rows` rows of queries and `steps` tiles of `tokens` cached tokens."""

    rows: int
    tokens: int
    steps: int
    warps: int
    stages: int


def attention_config(groups: int, rows: int, tokens: int, head_dim: int) -> AttentionConfig:
    """Choose tiles for `groups` heads of keys with `rows` rows of queries each.

    Splits are as long as they can be while every multiprocessor has some. Their length goes in doublings, so that a
    growing cache compiles few variants.

    >>> attention_config(64 * 32, 1, 2048, 128).steps, attention_config(32, 1, 2048, 128).steps
    (32, 2)
    """
    tile = 64 if head_dim <= 128 else 32
    steps = 32
    while steps > 1 and groups * -(-tokens // (tile * steps)) < _WAVES_OF_PROGRAMS:
        steps //= 2
    # With splits longer than the cache, the last doubling would only be masked work.
    while steps > 1 and tile * steps // 2 >= tokens:
        steps //= 2
    return AttentionConfig(16 if rows <= 16 else 32, tile, steps, warps=4, stages=3)
