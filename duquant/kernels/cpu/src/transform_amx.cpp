// R1, P, R2, rounding and packing of 32 tokens in one go, rotations with AMX-BF16.
//
// Everything lies channel by channel with the tokens side by side: a permutation of channels is then a choice of cache
// lines, a row's range is a minimum over registers, and eight codes shift into the words that are stored. Products are
// C = R^T X^T: the rotation is the left operand, two channels of sixteen tokens a row of the right one. Hadamard matrices
// need no products: their butterflies are additions of whole registers.
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

// 32 channels of a token. The same of the next block are asked for: tokens are far apart, and nothing else foresees them.
inline __m512i token_line(const Group& group, const uint16_t* x, int64_t token, int64_t channel, int64_t block) {
    if (token >= group.count) return _mm512_setzero_si512();
    const uint16_t* at = x + token * group.args.channels + channel;
    _mm_prefetch(reinterpret_cast<const char*>(at + block), _MM_HINT_T0);
    return _mm512_loadu_si512(at);
}

// Right operands of one block from the rows of X: (depth tile, token tile).
void gather_inputs(const Group& group, int64_t channel, int64_t block, uint8_t* right) {
    const uint16_t* x = static_cast<const uint16_t*>(group.args.x) + group.first * group.args.channels + channel;
    for (int64_t k = 0; k < block / kDepth; ++k) {
        for (int64_t tile = 0; tile < group.tiles; ++tile) {
            __m512i lanes[kTile];
            for (int64_t t = 0; t < kTile; ++t) {
                const int64_t token = tile * kTile + t;
                lanes[t] = token_line(group, x, token, k * kDepth, block);
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

// --- rotations by a Hadamard matrix with signs: additions only ---------------------------------------------------------

// The Hadamard matrix of order kCount over registers. Unrolled, or the values would live in memory.
template <int kCount>
inline __attribute__((always_inline)) void butterflies(__m512 (&v)[kCount]) {
#pragma GCC unroll 8
    for (int step = 1; step < kCount; step *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < kCount; ++i) {
            if (i & step) continue;
            const __m512 a = v[i], b = v[i + step];
            v[i] = _mm512_add_ps(a, b);
            v[i + step] = _mm512_sub_ps(a, b);
        }
    }
}

// Sixteen channels, each with its sign (a mask of the sign bit), through the Hadamard matrix of order 16.
inline __attribute__((always_inline)) void mix_sixteen(__m512i (&bits)[kTile], const int32_t* signs, float* out) {
    __m512 v[kTile];
    for (int i = 0; i < kTile; ++i) v[i] = _mm512_castsi512_ps(_mm512_xor_si512(bits[i], _mm512_set1_epi32(signs[i])));
    butterflies(v);
    for (int i = 0; i < kTile; ++i) _mm512_store_ps(out + i * kTokens, v[i]);
}

// The first half of a block's transform, from the rows of X.
void mix_inputs(const Group& group, int64_t channel, int64_t block, const int32_t* signs, float* out) {
    const uint16_t* x = static_cast<const uint16_t*>(group.args.x) + group.first * group.args.channels + channel;
    for (int64_t k = 0; k < block; k += kDepth) {
        for (int64_t tile = 0; tile < group.tiles; ++tile) {
            __m512i lanes[kTile];
            for (int64_t t = 0; t < kTile; ++t) {
                const int64_t token = tile * kTile + t;
                lanes[t] = token_line(group, x, token, k, block);
            }
            transpose_16x16(lanes);
            for (int64_t half = 0; half < 2; ++half) {
                __m512i bits[kTile];
                for (int i = 0; i < kTile / 2; ++i) {
                    const __m512i pair = lanes[half * kTile / 2 + i];
                    bits[2 * i] = _mm512_slli_epi32(pair, 16);
                    bits[2 * i + 1] = _mm512_and_si512(pair, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u)));
                }
                const int64_t first = k + half * kTile;
                mix_sixteen(bits, signs + first, out + first * kTokens + tile * kTile);
            }
        }
    }
}

// The same from channels of the scratch, permuted.
void mix_rotated(
    const Group& group, const uint16_t* rotated, const int32_t* perm, int64_t block, const int32_t* signs, float* out) {
    // The tokens of a tile in the upper halves of sixteen words: bfloat16 as float32.
    const __m512i lower = _mm512_set_epi32(15 << 16, 14 << 16, 13 << 16, 12 << 16, 11 << 16, 10 << 16, 9 << 16, 8 << 16,
                                           7 << 16, 6 << 16, 5 << 16, 4 << 16, 3 << 16, 2 << 16, 1 << 16, 0);
    const __m512i of_tile[2] = {lower, _mm512_add_epi32(lower, _mm512_set1_epi32(kTile << 16))};
    for (int64_t first = 0; first < block; first += kTile) {
        for (int64_t tile = 0; tile < group.tiles; ++tile) {
            __m512i bits[kTile];
            for (int i = 0; i < kTile; ++i) {
                const __m512i line = _mm512_load_si512(rotated + perm[first + i] * kTokens);
                bits[i] = _mm512_maskz_permutexvar_epi16(0xaaaaaaaau, of_tile[tile], line);
            }
            mix_sixteen(bits, signs + first, out + first * kTokens + tile * kTile);
        }
    }
}

// The Hadamard matrix of order kParts over channels that are `apart`; `use(channel, half, values)` takes what comes out.
template <int kParts, typename Use>
inline void mix_parts(const Group& group, const float* product, int64_t apart, Use use) {
    for (int64_t c = 0; c < apart; ++c) {
        for (int64_t half = 0; half < group.tiles; ++half) {
            __m512 v[kParts];
            for (int i = 0; i < kParts; ++i) v[i] = _mm512_load_ps(product + (i * apart + c) * kTokens + half * kTile);
            butterflies(v);
            for (int i = 0; i < kParts; ++i) use(i * apart + c, half, v[i]);
        }
    }
}

// Hand a block's values to `use`; those of a Hadamard matrix need the second half of their transform first.
template <typename Use>
inline void finish_block(const Group& group, const float* product, Use use) {
    const int64_t block = group.args.block;
    switch (group.args.is_hadamard ? block / kTile : 1) {
        case 2: mix_parts<2>(group, product, kTile, use); break;
        case 4: mix_parts<4>(group, product, kTile, use); break;
        case 8: mix_parts<8>(group, product, kTile, use); break;
        case 16: mix_parts<16>(group, product, kTile, use); break;
        default: mix_parts<1>(group, product, block, use); break;
    }
}

inline const uint8_t* tiles_of(const void* rotations, bool is_shared, int64_t index, int64_t block) {
    return static_cast<const uint8_t*>(rotations) + (is_shared ? 0 : index * block * block * 2);
}

inline const int32_t* signs_of(const void* rotations, bool is_shared, int64_t index, int64_t block) {
    return static_cast<const int32_t*>(rotations) + (is_shared ? 0 : index * block);
}

struct Range {
    __m512 low[2], high[2];
};

// Sixteen tokens' codes of eight channels, as sixteen words. Channels c and c + 4 share a register of 16-bit lanes.
inline __m512i word_of_codes(const float* values, __m512 by, __m512 zero, __m512i least, __m512i most) {
    const __m512i turn = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
    __m512i packed = _mm512_setzero_si512();
    for (int64_t i = 3; i >= 0; --i) {
        const __m512 first = _mm512_load_ps(values + i * kTile), second = _mm512_load_ps(values + (i + 4) * kTile);
        const __m512i codes = _mm512_packs_epi32(_mm512_cvtps_epi32(_mm512_fmadd_ps(first, by, zero)),
                                                 _mm512_cvtps_epi32(_mm512_fmadd_ps(second, by, zero)));
        packed = _mm512_or_si512(_mm512_slli_epi16(packed, 4), _mm512_min_epi16(_mm512_max_epi16(codes, least), most));
    }
    return _mm512_shuffle_epi8(packed, turn);
}

// Codes of one tile of tokens, sixteen words turned into sixteen tokens' lines. `values` is (channels, 16 tokens).
void write_codes(const Group& group, const float* values, int64_t tile, const float* inverse, const float* zero_point) {
    const Quantize& args = group.args;
    const int64_t words = args.channels / 8, row_bytes = args.channels / 2;
    const int64_t tokens = group.count - tile * kTile < kTile ? group.count - tile * kTile : kTile;
    const __m512 by = _mm512_load_ps(inverse + tile * kTile);
    const int32_t half = 1 << (args.bits - 1);
    // Stored as q + 8: the offset joins the zero point.
    const __m512 zero = _mm512_add_ps(_mm512_load_ps(zero_point + tile * kTile), _mm512_set1_ps(8.0f));
    const __m512i least = _mm512_set1_epi16(static_cast<int16_t>(8 - half));
    const __m512i most = _mm512_set1_epi16(static_cast<int16_t>(7 + half));
    const __m512i nibbles = _mm512_set1_epi8(15), ones = _mm512_set1_epi8(1);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t word = 0; word < words; word += kTile) {
        const int64_t width = words - word < kTile ? words - word : kTile;
        __m512i lanes[kTile];
        for (int64_t w = 0; w < kTile; ++w) {
            lanes[w] = _mm512_setzero_si512();
            if (w >= width) continue;
            lanes[w] = word_of_codes(values + (word + w) * 8 * kTile, by, zero, least, most);
            sum = _mm512_dpbusd_epi32(sum, _mm512_and_si512(lanes[w], nibbles), ones);
            sum = _mm512_dpbusd_epi32(sum, _mm512_and_si512(_mm512_srli_epi32(lanes[w], 4), nibbles), ones);
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
    const auto rotated_values = [&](int64_t b) {
        // The tiles apart: each is read through from end to end.
        float* out = values + b * block * kTile;
        finish_block(group, product, [&](int64_t channel, int64_t half, __m512 value) {
            _mm512_store_ps(out + half * args.channels * kTile + channel * kTile, value);
            range.low[half] = _mm512_min_ps(range.low[half], value);
            range.high[half] = _mm512_max_ps(range.high[half], value);
        });
    };
    for (int64_t b = 0; b < blocks; ++b) {
        if (args.is_hadamard) {
            mix_inputs(group, b * block, block, signs_of(args.r1, args.r1_is_shared, b, block), product);
        } else {
            gather_inputs(group, b * block, block, right);
            rotate_block(group, tiles_of(args.r1, args.r1_is_shared, b, block), right, block, product);
        }
        if (args.r2 == nullptr) {
            rotated_values(b);
            continue;
        }
        uint16_t* out = rotated + b * block * kTokens;
        finish_block(group, product, [out](int64_t channel, int64_t half, __m512 value) {
            _mm256_store_si256(reinterpret_cast<__m256i*>(out + channel * kTokens + half * kTile),
                               (__m256i)_mm512_cvtneps_pbh(value));
        });
    }
    for (int64_t b = 0; args.r2 != nullptr && b < blocks; ++b) {
        const int32_t* perm = args.perm + b * block;
        if (args.is_hadamard) {
            mix_rotated(group, rotated, perm, block, signs_of(args.r2, args.r2_is_shared, b, block), product);
        } else {
            gather_rotated(group, rotated, perm, block, right);
            rotate_block(group, tiles_of(args.r2, args.r2_is_shared, b, block), right, block, product);
        }
        rotated_values(b);
    }
    alignas(64) float low[kTokens], high[kTokens], inverse[kTokens], zero_point[kTokens];
    for (int half = 0; half < 2; ++half) {
        _mm512_store_ps(low + half * kTile, range.low[half]);
        _mm512_store_ps(high + half * kTile, range.high[half]);
    }
    for (int64_t t = 0; t < group.tiles * kTile; ++t) {
        const Grid grid = make_grid(args, low[t], high[t]);
        inverse[t] = 1.0f / grid.scale;
        zero_point[t] = grid.zero_point;
        if (t < group.count) {
            args.scale[group.first + t] = grid.scale * args.gain;
            args.zero_point[group.first + t] = grid.zero_point;
        }
    }
    for (int64_t tile = 0; tile < group.tiles; ++tile) {
        write_codes(group, values + tile * args.channels * kTile, tile, inverse, zero_point);
    }
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
