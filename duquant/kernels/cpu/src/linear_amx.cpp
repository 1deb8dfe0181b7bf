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
constexpr int64_t kSlice = 8;  // chunks: 32 rows of them, unpacked, take 32 KiB

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

inline void store(const Linear& args, int64_t at, __mmask16 mask, __m512 values) {
    if (!args.out_is_bfloat16) {
        _mm512_mask_storeu_ps(static_cast<float*>(args.out) + at, mask, values);
        return;
    }
    // Round to nearest even; NaN stays NaN.
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    rounded = _mm512_srli_epi32(rounded, 16);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc0));
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(args.out) + at, mask, _mm512_cvtepi32_epi16(rounded));
}

// Whether all whole numbers on the way to an output are below 2^24, and so exact in float: sums of 4-bit codes (120 a
// channel, twice) and of weights times the token's zero point (15 a channel).
inline bool fits_float(const Linear& args, float zero_point) {
    const float size = zero_point < 0 ? -zero_point : zero_point;
    return args.x_is_pairs && static_cast<float>(args.channels) * (240.0f + 15.0f * size) < 16777216.0f;
}

// One tile of sums, (rows, tokens), to outputs: what `finish` in epilogue.h does, sixteen rows at once.
void finish_tile(const Linear& args, const int32_t* tile, int64_t row, int64_t token) {
    const int64_t rows = args.rows - row < kTile ? args.rows - row : kTile;
    const int64_t tokens = args.tokens - token < kTile ? args.tokens - token : kTile;
    if (rows <= 0) return;
    const __mmask16 mask = static_cast<__mmask16>((1u << rows) - 1u);
    __m512i sums[kTile];
    for (int64_t r = 0; r < kTile; ++r) sums[r] = _mm512_load_si512(tile + r * kTile);
    transpose_16x16(sums);
    const __m512 z = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, args.zero_point + row), _mm512_set1_ps(8.0f));
    const __m512 weight_sum = _mm512_maskz_loadu_ps(mask, args.weight_sum + row);
    const __m512 s_w = _mm512_maskz_loadu_ps(mask, args.scale + row);
    const __m512 bias = args.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, args.bias + row);
    const __m512d z_low = _mm512_cvtps_pd(_mm512_castps512_ps256(z));
    const __m512d z_high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(z, 1));
    const __m512d sum_low = _mm512_cvtps_pd(_mm512_castps512_ps256(weight_sum));
    const __m512d sum_high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(weight_sum, 1));
    for (int64_t t = 0; t < tokens; ++t) {
        const float row_sum = args.x_row_sum[token + t], zero_point = args.x_zero_point[token + t];
        __m512 whole;
        if (fits_float(args, zero_point)) {
            whole = _mm512_fnmadd_ps(z, _mm512_set1_ps(row_sum), _mm512_cvtepi32_ps(sums[t]));
            whole = _mm512_fnmadd_ps(weight_sum, _mm512_set1_ps(zero_point), whole);
        } else {
            const __m512d by_z = _mm512_set1_pd(row_sum), by_sum = _mm512_set1_pd(zero_point);
            __m512d low = _mm512_cvtepi32_pd(_mm512_castsi512_si256(sums[t]));
            __m512d high = _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(sums[t], 1));
            low = _mm512_fnmadd_pd(sum_low, by_sum, _mm512_fnmadd_pd(z_low, by_z, low));
            high = _mm512_fnmadd_pd(sum_high, by_sum, _mm512_fnmadd_pd(z_high, by_z, high));
            whole = _mm512_castps256_ps512(_mm512_cvtpd_ps(low));
            whole = _mm512_insertf32x8(whole, _mm512_cvtpd_ps(high), 1);
        }
        whole = _mm512_mul_ps(_mm512_mul_ps(whole, s_w), _mm512_set1_ps(args.x_scale[token + t]));
        if (args.bias != nullptr) whole = _mm512_add_ps(whole, bias);
        store(args, (token + t) * args.rows + row, mask, whole);
    }
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
        // The same chunk of the next rows: 64 streams are more than the hardware foresees.
        for (int64_t r = 0; r < 4 * kTile; ++r) {
            const uint8_t* next = row_at(args, row + 4 * kTile + r) + c * kChunkBytes;
            _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
        }
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

// Fetch a slice's weights from memory while another is multiplied: `lines` of its cache lines from `first` on.
inline void fetch_ahead(const Linear& args, int64_t row, int64_t c, int64_t first, int64_t lines) {
    for (int64_t i = first; i < first + lines && i < 2 * kTile * kSlice; ++i) {
        const uint8_t* line = row_at(args, row + i / kSlice) + (c + i % kSlice) * kChunkBytes;
        _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T1);
    }
}

// 32 rows by all tokens, 32 at a time. Channels come in slices that stay in the first-level cache once unpacked, so that
// only the tokens' operands stream; sums wait in memory between slices.
void rows_by_all_tiles(const LinearJob& job, int64_t row, uint8_t* unpacked, int32_t* sums) {
    const Linear& args = job.args;
    const int64_t all_steps = 2 * job.chunks, token_tiles = (args.tokens + kTile - 1) / kTile;
    for (int64_t slice = 0; slice < job.chunks; slice += kSlice) {
        const int64_t chunks = job.chunks - slice < kSlice ? job.chunks - slice : kSlice;
        const bool is_last = slice + chunks == job.chunks;
        for (int64_t c = 0; c < chunks; ++c) {
            const __mmask64 mask = chunk_mask(args, slice + c);
            // (step, row tile): the two row tiles of a step lie next to each other.
            for (int64_t t = 0; t < 2; ++t) {
                unpack(args, row + t * kTile, slice + c, mask, unpacked + (4 * c + t) * kTileBytes, 2 * kTileBytes);
            }
        }
        // Spread over all steps, so that they do not wait for one another.
        const int64_t steps = 2 * chunks * ((token_tiles + 1) / 2), lines = (2 * kTile * kSlice + steps - 1) / steps;
        int64_t ahead = 0;
        for (int64_t first = 0; first < token_tiles; first += 2) {
            const int8_t* left = job.tiles + (first * all_steps + 2 * slice) * kTileBytes;
            // A lone last tile is computed twice, and used once.
            const int8_t* right = first + 1 < token_tiles ? left + all_steps * kTileBytes : left;
            int32_t* here = sums + first * 2 * kTile * kTile;
            if (slice == 0) {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            } else {
                _tile_loadd(0, here, 64);
                _tile_loadd(1, here + 256, 64);
                _tile_loadd(2, here + 512, 64);
                _tile_loadd(3, here + 768, 64);
            }
            for (int64_t s = 0; s < 2 * chunks; ++s) {
                fetch_ahead(args, is_last ? row + 2 * kTile : row, is_last ? 0 : slice + kSlice, ahead, lines);
                ahead += lines;
                _tile_loadd(4, unpacked + 2 * s * kTileBytes, 64);
                _tile_loadd(6, left + s * kTileBytes, 64);
                _tile_loadd(7, right + s * kTileBytes, 64);
                _tile_dpbusd(0, 4, 6);
                _tile_dpbusd(1, 4, 7);
                _tile_loadd(5, unpacked + (2 * s + 1) * kTileBytes, 64);
                _tile_dpbusd(2, 5, 6);
                _tile_dpbusd(3, 5, 7);
            }
            _tile_stored(0, here, 64);
            _tile_stored(1, here + 256, 64);
            _tile_stored(2, here + 512, 64);
            _tile_stored(3, here + 768, 64);
            if (!is_last) continue;
            const int64_t token = first * kTile;
            finish_tile(args, here, row, token);
            finish_tile(args, here + 512, row + kTile, token);
            if (first + 1 < token_tiles) {
                finish_tile(args, here + 256, row, token + kTile);
                finish_tile(args, here + 768, row + kTile, token + kTile);
            }
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
    const int64_t pairs = (job.args.tokens + 2 * kTile - 1) / (2 * kTile);
    int32_t* sums = static_cast<int32_t*>(scratch(3, pairs * 4 * kTileBytes));
    if (job.args.tokens <= kTile) {
        uint8_t* unpacked = static_cast<uint8_t*>(scratch(2, 16 * kTileBytes));
        for (int64_t row = begin; row < end; row += 4 * kTile) rows_by_one_tile(job, row, unpacked, sums);
    } else {
        uint8_t* unpacked = static_cast<uint8_t*>(scratch(2, kSlice * 4 * kTileBytes));
        for (int64_t row = begin; row < end; row += 2 * kTile) rows_by_all_tiles(job, row, unpacked, sums);
    }
    _tile_release();
}

}  // namespace duquant
