// R1, P, R2, rounding and packing of 32 tokens in one go, rotations with AMX-BF16.
//
// Everything lies channel by channel with the tokens side by side: a permutation of channels is then a choice of cache
// lines, a row's range is a minimum over registers, and eight codes shift into the words that are stored. Products are
// C = R^T X^T: the rotation is the left operand, two channels of sixteen tokens a row of the right one.
#include <immintrin.h>

#include "kernels.h"
#include "rounding.h"
#include "transpose.h"

namespace duquant {
namespace {

constexpr int64_t kTile = 16;
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kTokens = 32;
constexpr int64_t kDepth = 32;  // channels that one instruction sums over

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The tokens of one call; absent ones read as zeros.
struct Group {
    const Quantize& args;
    int64_t first;
    int64_t count;
    int64_t tiles;  // 1 or 2 of sixteen tokens
};

// Right operands of one block from the rows of X: (depth tile, token tile).
void gather_inputs(const Group& group, int64_t channel, int64_t block, uint8_t* right) {
    const uint16_t* x = static_cast<const uint16_t*>(group.args.x) + group.first * group.args.channels + channel;
    for (int64_t k = 0; k < block / kDepth; ++k) {
        for (int64_t tile = 0; tile < group.tiles; ++tile) {
            __m512i lanes[kTile];
            for (int64_t t = 0; t < kTile; ++t) {
                const int64_t token = tile * kTile + t;
                lanes[t] = token < group.count ? _mm512_loadu_si512(x + token * group.args.channels + k * kDepth)
                                               : _mm512_setzero_si512();
            }
            transpose_16x16(lanes);
            uint8_t* out = right + (2 * k + tile) * kTileBytes;
            for (int64_t pair = 0; pair < kTile; ++pair) _mm512_store_si512(out + pair * 64, lanes[pair]);
        }
    }
}

// Right operands of one block from channels of the scratch, permuted: two cache lines, interleaved.
void gather_rotated(const Group& group, const uint16_t* rotated, const int32_t* perm, int64_t block, uint8_t* right) {
    alignas(64) static const uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                  8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t pair = 0; pair < block / 2; ++pair) {
        const __m512i a = _mm512_load_si512(rotated + perm[2 * pair] * kTokens);
        const __m512i b = _mm512_load_si512(rotated + perm[2 * pair + 1] * kTokens);
        uint8_t* out = right + pair / kTile * 2 * kTileBytes + pair % kTile * 64;
        _mm512_store_si512(out, _mm512_permutex2var_epi16(a, low, b));
        if (group.tiles > 1) _mm512_store_si512(out + kTileBytes, _mm512_permutex2var_epi16(a, high, b));
    }
}

// One block's product, (block, 32 tokens) float32 at `out`.
void rotate_block(const Group& group, const uint8_t* left, const uint8_t* right, int64_t block, float* out) {
    const int64_t depth = block / kDepth;
    for (int64_t row = 0; row < block; row += 2 * kTile) {
        const uint8_t* top = left + row / kTile * depth * kTileBytes;
        const uint8_t* bottom = top + depth * kTileBytes;
        float* at = out + row * kTokens;
        _tile_zero(0);
        _tile_zero(2);
        if (group.tiles > 1) {
            _tile_zero(1);
            _tile_zero(3);
            for (int64_t k = 0; k < depth; ++k) {
                _tile_loadd(4, top + k * kTileBytes, 64);
                _tile_loadd(6, right + 2 * k * kTileBytes, 64);
                _tile_loadd(7, right + (2 * k + 1) * kTileBytes, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, bottom + k * kTileBytes, 64);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(1, at + kTile, kTokens * 4);
            _tile_stored(3, at + kTile * kTokens + kTile, kTokens * 4);
        } else {
            for (int64_t k = 0; k < depth; ++k) {
                _tile_loadd(4, top + k * kTileBytes, 64);
                _tile_loadd(6, right + 2 * k * kTileBytes, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(5, bottom + k * kTileBytes, 64);
                _tile_dpbf16ps(2, 5, 6);
            }
        }
        _tile_stored(0, at, kTokens * 4);
        _tile_stored(2, at + kTile * kTokens, kTokens * 4);
    }
}

inline const uint8_t* rotation_of(const void* tiles, bool is_shared, int64_t index, int64_t block) {
    return static_cast<const uint8_t*>(tiles) + (is_shared ? 0 : index * block * block * 2);
}

struct Range {
    __m512 low[2], high[2];
};

inline void widen(const float* values, int64_t channels, Range& range) {
    for (int64_t c = 0; c < channels; ++c) {
        for (int half = 0; half < 2; ++half) {
            const __m512 value = _mm512_load_ps(values + c * kTokens + half * kTile);
            range.low[half] = _mm512_min_ps(range.low[half], value);
            range.high[half] = _mm512_max_ps(range.high[half], value);
        }
    }
}

// Codes of one tile of tokens, eight channels to a word, sixteen words turned into sixteen tokens' lines.
void write_codes(const Group& group, const float* values, int64_t tile, const float* inverse, const float* zero_point) {
    const Quantize& args = group.args;
    const int64_t words = args.channels / 8, row_bytes = args.channels / 2;
    const int64_t tokens = group.count - tile * kTile < kTile ? group.count - tile * kTile : kTile;
    const __m512 by = _mm512_load_ps(inverse + tile * kTile);
    const int32_t half = 1 << (args.bits - 1);
    // Stored as q + 8: the offset joins the zero point.
    const __m512i zero = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_load_ps(zero_point + tile * kTile)), _mm512_set1_epi32(8));
    const __m512i least = _mm512_set1_epi32(8 - half), most = _mm512_set1_epi32(7 + half);
    const __m512i nibbles = _mm512_set1_epi8(15), ones = _mm512_set1_epi8(1);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t word = 0; word < words; word += kTile) {
        const int64_t width = words - word < kTile ? words - word : kTile;
        __m512i lanes[kTile];
        for (int64_t w = 0; w < kTile; ++w) {
            __m512i packed = _mm512_setzero_si512();
            if (w < width) {
                const float* at = values + (word + w) * 8 * kTokens + tile * kTile;
                for (int64_t i = 7; i >= 0; --i) {
                    const __m512 scaled = _mm512_mul_ps(_mm512_load_ps(at + i * kTokens), by);
                    __m512i code = _mm512_add_epi32(_mm512_cvtps_epi32(scaled), zero);
                    code = _mm512_min_epi32(_mm512_max_epi32(code, least), most);
                    packed = _mm512_or_si512(_mm512_slli_epi32(packed, 4), code);
                }
                sum = _mm512_dpbusd_epi32(sum, _mm512_and_si512(packed, nibbles), ones);
                sum = _mm512_dpbusd_epi32(sum, _mm512_and_si512(_mm512_srli_epi32(packed, 4), nibbles), ones);
            }
            lanes[w] = packed;
        }
        transpose_16x16(lanes);
        const __mmask16 mask = static_cast<__mmask16>((1u << width) - 1u);
        uint8_t* out = args.out + (group.first + tile * kTile) * row_bytes + word * 4;
        for (int64_t t = 0; t < tokens; ++t) _mm512_mask_storeu_epi32(out + t * row_bytes, mask, lanes[t]);
    }
    const __m512i offset = _mm512_set1_epi32(static_cast<int32_t>(8 * args.channels));
    const __m512 sums = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, offset));
    const __mmask16 present = static_cast<__mmask16>((1u << tokens) - 1u);
    _mm512_mask_storeu_ps(args.row_sum + group.first + tile * kTile, present, sums);
}

void transform_group(const Group& group, uint16_t* rotated, float* values) {
    const Quantize& args = group.args;
    const int64_t block = args.block, blocks = args.channels / block;
    uint8_t* right = static_cast<uint8_t*>(scratch(5, block * kTokens * 2 + block * kTokens * 4));
    float* product = reinterpret_cast<float*>(right + block * kTokens * 2);
    Range range;
    for (int half = 0; half < 2; ++half) {
        range.low[half] = _mm512_set1_ps(__builtin_inff());
        range.high[half] = _mm512_set1_ps(-__builtin_inff());
    }
    for (int64_t b = 0; b < blocks; ++b) {
        gather_inputs(group, b * block, block, right);
        const uint8_t* left = rotation_of(args.r1, args.r1_is_shared, b, block);
        if (args.r2 == nullptr) {
            rotate_block(group, left, right, block, values + b * block * kTokens);
            widen(values + b * block * kTokens, block, range);
            continue;
        }
        rotate_block(group, left, right, block, product);
        for (int64_t c = 0; c < block; ++c) {
            const __m512 first = _mm512_load_ps(product + c * kTokens), second = _mm512_load_ps(product + c * kTokens + kTile);
            _mm512_store_si512(rotated + (b * block + c) * kTokens, (__m512i)_mm512_cvtne2ps_pbh(second, first));
        }
    }
    for (int64_t b = 0; args.r2 != nullptr && b < blocks; ++b) {
        gather_rotated(group, rotated, args.perm + b * block, block, right);
        const uint8_t* left = rotation_of(args.r2, args.r2_is_shared, b, block);
        rotate_block(group, left, right, block, values + b * block * kTokens);
        widen(values + b * block * kTokens, block, range);
    }
    alignas(64) float low[kTokens], high[kTokens], inverse[kTokens], zero_point[kTokens];
    for (int half = 0; half < 2; ++half) {
        _mm512_store_ps(low + half * kTile, range.low[half]);
        _mm512_store_ps(high + half * kTile, range.high[half]);
    }
    for (int64_t t = 0; t < kTokens; ++t) {
        const Grid grid = make_grid(args, low[t], high[t]);
        inverse[t] = 1.0f / grid.scale;
        zero_point[t] = grid.zero_point;
        if (t < group.count) {
            args.scale[group.first + t] = grid.scale * args.gain;
            args.zero_point[group.first + t] = grid.zero_point;
        }
    }
    for (int64_t tile = 0; tile < group.tiles; ++tile) write_codes(group, values, tile, inverse, zero_point);
}

}  // namespace

void transform_rows_amx(const Quantize& args, int64_t begin, int64_t end) {
    const TileConfig config;
    _tile_loadconfig(&config);
    uint16_t* rotated = static_cast<uint16_t*>(scratch(3, args.channels * kTokens * sizeof(uint16_t)));
    float* values = static_cast<float*>(scratch(4, args.channels * kTokens * sizeof(float)));
    for (int64_t first = begin; first < end; first += kTokens) {
        const int64_t count = end - first < kTokens ? end - first : kTokens;
        transform_group({args, first, count, count > kTile ? 2 : 1}, rotated, values);
    }
    _tile_release();
}

}  // namespace duquant
