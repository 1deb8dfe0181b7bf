// Integer products with AMX-INT8: sixteen rows of weights by sixteen tokens by 64 channels in one instruction.
//
// The weights are the unsigned left operand, unpacked row by row (no shuffles: the two nibbles of 64 bytes are two
// operands of 64 channels); the tokens are the signed right operand, whose layout wants 4-byte groups transposed, which
// is done once per call. Sums come out as (rows, tokens) and are transposed on their way to the outputs.
#include <immintrin.h>

#include "epilogue.h"
#include "kernels.h"
#include "transpose.h"

namespace duquant {
namespace {

constexpr int64_t kTile = 16;
constexpr int64_t kTileBytes = 1024;

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline const uint8_t* row_at(const Linear& args, int64_t row) {
    // Past the end the last row is computed again, and not used.
    return args.weight + (row < args.rows ? row : args.rows - 1) * args.row_bytes;
}

// Sixteen rows of one chunk: a tile of even channels, then one of odd ones, `gap` bytes apart.
inline void unpack(const Linear& args, int64_t row, int64_t c, __mmask64 mask, uint8_t* even, int64_t gap) {
    const __m512i low_nibbles = _mm512_set1_epi8(15);
    for (int64_t r = 0; r < kTile; ++r) {
        const __m512i bytes = _mm512_maskz_loadu_epi8(mask, row_at(args, row + r) + c * kChunkBytes);
        _mm512_store_si512(even + r * 64, _mm512_and_si512(bytes, low_nibbles));
        _mm512_store_si512(even + gap + r * 64, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low_nibbles));
    }
}

inline __mmask64 chunk_mask(const Linear& args, int64_t c) {
    const int64_t rest = args.row_bytes - c * kChunkBytes;
    return rest >= kChunkBytes ? ~0ull : (~0ull >> (64 - rest));
}

// One tile of sums, (rows, tokens), to outputs.
void finish_tile(const Linear& args, const int32_t* tile, int64_t row, int64_t token) {
    alignas(64) int32_t turned[kTile * kTile];
    const int64_t rows = args.rows - row < kTile ? args.rows - row : kTile;
    const int64_t tokens = args.tokens - token < kTile ? args.tokens - token : kTile;
    if (rows <= 0) return;
    transpose_16x16(tile, kTile, turned, kTile);
    for (int64_t t = 0; t < tokens; ++t) finish(args, token + t, row, rows, turned + t * kTile);
}

// Few tokens, one tile of them: 64 rows at a time, unpacked just before they are used.
void rows_by_one_tile(const LinearJob& job, int64_t row, uint8_t* unpacked, int32_t* sums) {
    const Linear& args = job.args;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t c = 0; c < job.chunks; ++c) {
        const __mmask64 mask = chunk_mask(args, c);
        // Two buffers in turn: stores of the next chunk need not wait for loads of this one.
        uint8_t* at = unpacked + (c & 1) * 8 * kTileBytes;
        for (int64_t t = 0; t < 4; ++t) unpack(args, row + t * kTile, c, mask, at + t * 2 * kTileBytes, kTileBytes);
        for (int64_t plane = 0; plane < 2; ++plane) {
            _tile_loadd(4, job.tiles + (2 * c + plane) * kTileBytes, 64);
            _tile_loadd(5, at + plane * kTileBytes, 64);
            _tile_dpbusd(0, 5, 4);
            _tile_loadd(6, at + (2 + plane) * kTileBytes, 64);
            _tile_dpbusd(1, 6, 4);
            _tile_loadd(5, at + (4 + plane) * kTileBytes, 64);
            _tile_dpbusd(2, 5, 4);
            _tile_loadd(6, at + (6 + plane) * kTileBytes, 64);
            _tile_dpbusd(3, 6, 4);
        }
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
    for (int64_t t = 0; t < 4; ++t) finish_tile(args, sums + t * 256, row + t * kTile, 0);
}

// 32 rows, unpacked once into the cache, by all tokens, 32 at a time.
void rows_by_all_tiles(const LinearJob& job, int64_t row, uint8_t* unpacked, int32_t* sums) {
    const Linear& args = job.args;
    const int64_t steps = 2 * job.chunks;
    for (int64_t c = 0; c < job.chunks; ++c) {
        const __mmask64 mask = chunk_mask(args, c);
        // (step, row tile): the two row tiles of a step lie next to each other.
        for (int64_t t = 0; t < 2; ++t) {
            unpack(args, row + t * kTile, c, mask, unpacked + (4 * c + t) * kTileBytes, 2 * kTileBytes);
        }
    }
    const int64_t token_tiles = (args.tokens + kTile - 1) / kTile;
    for (int64_t first = 0; first < token_tiles; first += 2) {
        const int8_t* left = job.tiles + first * steps * kTileBytes;
        // A lone last tile is computed twice, and used once.
        const int8_t* right = first + 1 < token_tiles ? left + steps * kTileBytes : left;
        // The next rows' weights come from memory meanwhile.
        const uint8_t* next = row_at(args, row + 2 * kTile);
        const int64_t share = (2 * kTile * args.row_bytes) / (token_tiles > 1 ? (token_tiles + 1) / 2 : 1);
        const uint8_t* ahead = next + (first / 2) * share;
        const int64_t lines = row + 4 * kTile <= args.rows ? share / 64 / steps + 1 : 0;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t s = 0; s < steps; ++s) {
            for (int64_t line = 0; line < lines; ++line) {
                _mm_prefetch(reinterpret_cast<const char*>(ahead + (s * lines + line) * 64), _MM_HINT_T1);
            }
            _tile_loadd(4, unpacked + 2 * s * kTileBytes, 64);
            _tile_loadd(6, left + s * kTileBytes, 64);
            _tile_loadd(7, right + s * kTileBytes, 64);
            _tile_dpbusd(0, 4, 6);
            _tile_dpbusd(1, 4, 7);
            _tile_loadd(5, unpacked + (2 * s + 1) * kTileBytes, 64);
            _tile_dpbusd(2, 5, 6);
            _tile_dpbusd(3, 5, 7);
        }
        _tile_stored(0, sums, 64);
        _tile_stored(1, sums + 256, 64);
        _tile_stored(2, sums + 512, 64);
        _tile_stored(3, sums + 768, 64);
        const int64_t token = first * kTile;
        finish_tile(args, sums, row, token);
        finish_tile(args, sums + 512, row + kTile, token);
        if (first + 1 < token_tiles) {
            finish_tile(args, sums + 256, row, token + kTile);
            finish_tile(args, sums + 768, row + kTile, token + kTile);
        }
    }
}

}  // namespace

void fill_token_tiles(const LinearJob& job, int8_t* tiles, int64_t begin, int64_t end) {
    const int64_t steps = 2 * job.chunks;
    alignas(64) static const int32_t zeros[16] = {};
    for (int64_t tile = begin; tile < end; ++tile) {
        for (int64_t s = 0; s < steps; ++s) {
            __m512i lanes[kTile];
            for (int64_t t = 0; t < kTile; ++t) {
                const int64_t token = tile * kTile + t;
                const void* from = token < job.args.tokens ? job.planes + (token * steps + s) * 64
                                                           : reinterpret_cast<const int8_t*>(zeros);
                lanes[t] = _mm512_load_si512(from);
            }
            transpose_16x16(lanes);
            int8_t* out = tiles + (tile * steps + s) * kTileBytes;
            for (int64_t t = 0; t < kTile; ++t) _mm512_store_si512(out + t * 64, lanes[t]);
        }
    }
}

void linear_rows_amx(const LinearJob& job, int64_t begin, int64_t end) {
    const TileConfig config;
    _tile_loadconfig(&config);
    alignas(64) int32_t sums[4 * kTile * kTile];
    if (job.args.tokens <= kTile) {
        uint8_t* unpacked = static_cast<uint8_t*>(scratch(2, 16 * kTileBytes));
        for (int64_t row = begin; row < end; row += 4 * kTile) rows_by_one_tile(job, row, unpacked, sums);
    } else {
        uint8_t* unpacked = static_cast<uint8_t*>(scratch(2, job.chunks * 4 * kTileBytes));
        for (int64_t row = begin; row < end; row += 2 * kTile) rows_by_all_tiles(job, row, unpacked, sums);
    }
    _tile_release();
}

}  // namespace duquant
