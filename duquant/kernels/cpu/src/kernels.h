// The C ABI of the CPU kernels (structs mirrored in library.py) and what the instruction sets implement.
//
// Names as in the Python reference: q_x, q_w codes; s_x, s_w scales; z_x, z_w zero points. Weight codes are stored as
// q + 8, two a byte, channel 2j in the low nibble of byte j: the words of the artifact, read as they are.
#pragma once

#include <cstddef>
#include <cstdint>

// Sources that are compiled for several instruction sets name their functions after each: -DDUQUANT_SUFFIX=avx2.
#define DUQUANT_JOIN2(name, suffix) name##_##suffix
#define DUQUANT_JOIN(name, suffix) DUQUANT_JOIN2(name, suffix)
#define DUQUANT_NAMED(name) DUQUANT_JOIN(name, DUQUANT_SUFFIX)

namespace duquant {

// Channels are handled in chunks of 128: the 64 bytes of a chunk hold 64 even channels in their low nibbles and 64 odd
// ones in their high nibbles. Activations are laid out to match: "planes", 64 even codes, then 64 odd ones, as int8.
constexpr int64_t kChunk = 128;
constexpr int64_t kChunkBytes = kChunk / 2;

struct Linear {
    const uint8_t* weight;
    const float* scale;
    const float* zero_point;
    const float* weight_sum;
    const float* bias;  // or null
    int64_t rows;
    int64_t channels;
    int64_t row_bytes;
    const uint8_t* x;  // codes, in pairs (x_is_pairs) or one a byte
    const float* x_scale;
    const float* x_zero_point;
    const float* x_row_sum;
    int64_t tokens;
    void* out;  // (tokens, rows), float32 or bfloat16
    int32_t x_is_pairs;
    int32_t out_is_bfloat16;
};

struct Quantize {
    const void* x;  // (tokens, channels), float32 or bfloat16
    int64_t tokens;
    int64_t channels;
    const void* r1;       // rotations (see rotations.py), or null; only for bfloat16 x
    const int32_t* perm;  // or null
    const void* r2;       // or null
    int64_t block;        // side of a rotation block; a multiple of 32
    int32_t r1_is_shared;
    int32_t r2_is_shared;
    int32_t is_hadamard;  // both rotations are signs times a Hadamard matrix of entries +1 and -1
    float gain;           // what the scale is multiplied by
    float clip_low;
    float clip_high;
    int32_t bits;
    int32_t is_symmetric;
    int32_t x_is_bfloat16;
    int32_t out_is_pairs;
    uint8_t* out;
    float* scale;
    float* zero_point;
    float* row_sum;
};

// Keys or values of a cache, (batch, heads, tokens, ...): 4-bit codes two a byte, x = low + scale * code, float16.
// The tokens of a head lie next to each other.
struct Cache {
    uint8_t* codes;
    uint16_t* scale;
    uint16_t* low;
    int64_t code_strides[2];  // bytes from one batch row, one head to the next
    int64_t grid_strides[2];  // elements
};

struct KvRows {
    void* x;                // (batch, heads, tokens, head_dim), float32 or bfloat16: read, or written
    const float* rotation;  // (head_dim, head_dim), or null: what rows are multiplied by, from the right, before rounding
                            // or after restoring (then it is the inverse)
    Cache cache;
    int64_t x_strides[3];  // elements from one batch row, one head, one token to the next
    int64_t batch, heads, tokens, head_dim;
    float clip_ratio;
    int32_t x_is_bfloat16;
};

struct Attention {
    const void* q;          // (batch, kv_heads * group, head_dim), float32 or bfloat16
    void* out;              // as q
    const float* rotation;  // what keys and values were multiplied by before rounding, or null
    const float* inverse;   // its inverse, or null
    const float* mask;      // (batch, sinks + tokens), added to scores, or null
    Cache keys, values;
    const void* sink_keys;  // (batch, kv_heads, sinks, head_dim), as q and not rotated: tokens before the packed ones
    const void* sink_values;
    int64_t batch, kv_heads, group, tokens, head_dim, sinks;
    int64_t mask_stride;  // elements of one batch row
    float scaling;
    int32_t is_bfloat16;
};

struct Norm {
    const void* x;       // (tokens, channels), float32 or bfloat16
    const void* weight;  // (channels), as x
    void* out;           // as x
    int64_t tokens, channels;
    float epsilon;
    int32_t is_bfloat16;
};

// What a task needs of a linear: its arguments and the activations' planes.
struct LinearJob {
    Linear args;
    int64_t chunks;
    const int8_t* planes;  // (tokens, chunks, 128)
    const int8_t* tiles;   // AMX: (token tiles, 2 * chunks, 16, 64), else null
};

// Rows of weights, tokens, or heads of keys [begin, end).
void linear_rows_portable(const LinearJob&, int64_t, int64_t);
void quantize_rows_portable(const Quantize&, int64_t, int64_t);
void attend_portable(const Attention&, int64_t, int64_t);
void norm_rows_portable(const Norm&, int64_t, int64_t);
void quantize_kv_portable(const KvRows&, int64_t, int64_t);
void dequantize_kv_portable(const KvRows&, int64_t, int64_t);
#ifdef DUQUANT_AVX2
void linear_rows_avx2(const LinearJob&, int64_t, int64_t);
void quantize_rows_avx2(const Quantize&, int64_t, int64_t);
void attend_avx2(const Attention&, int64_t, int64_t);
void norm_rows_avx2(const Norm&, int64_t, int64_t);
void quantize_kv_avx2(const KvRows&, int64_t, int64_t);
void dequantize_kv_avx2(const KvRows&, int64_t, int64_t);
#endif
#ifdef DUQUANT_AVX512
void linear_rows_vnni(const LinearJob&, int64_t, int64_t);
void quantize_rows_avx512(const Quantize&, int64_t, int64_t);
void attend_avx512(const Attention&, int64_t, int64_t);
void norm_rows_avx512(const Norm&, int64_t, int64_t);
void quantize_kv_avx512(const KvRows&, int64_t, int64_t);
void dequantize_kv_avx512(const KvRows&, int64_t, int64_t);
#endif
#ifdef DUQUANT_AMX
void linear_rows_amx(const LinearJob&, int64_t, int64_t);
void fill_token_tiles(const LinearJob&, int8_t* tiles, int64_t begin, int64_t end);
void transform_rows_amx(const Quantize&, int64_t, int64_t);
#endif

// Memory of the calling thread, at least `bytes`, aligned to 64; what it held is lost. One buffer for each slot.
void* scratch(int slot, size_t bytes);
constexpr int kScratchSlots = 6;

}  // namespace duquant
