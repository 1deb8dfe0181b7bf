// The packed KV cache: rounding, restoring, and attention straight from the codes. Plain C++ whose loops the compiler
// vectorizes: compiled once for each instruction set.
#include <cmath>

#include "floats.h"
#include "kernels.h"
#include "rounding.h"

namespace duquant {
namespace {

constexpr int64_t kLanes = 16;
constexpr float kLargestFloat16 = 65504.0f, kSmallestScale = 6.103515625e-5f;  // 2^-14

inline int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

inline float clamp(float value, float low, float high) {
    value = value > low ? value : low;
    return value < high ? value : high;
}

// Both arrays are filled up with zeros to `count` rounded up to lanes.
inline float dot(const float* a, const float* b, int64_t count) {
    float sums[kLanes] = {};
    for (int64_t i = 0; i < padded(count); i += kLanes) {
        for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += a[i + lane] * b[i + lane];
    }
    for (int64_t width = kLanes / 2; width > 0; width /= 2) {
        for (int64_t lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
    }
    return sums[0];
}

inline void read(const void* from, int64_t at, int64_t count, bool is_bfloat16, float* to) {
    if (is_bfloat16) {
        const uint16_t* x = static_cast<const uint16_t*>(from) + at;
        for (int64_t i = 0; i < count; ++i) to[i] = from_bfloat16(x[i]);
    } else {
        std::memcpy(to, static_cast<const float*>(from) + at, count * sizeof(float));
    }
}

inline void write(void* to, int64_t at, int64_t count, bool is_bfloat16, const float* from) {
    if (is_bfloat16) {
        uint16_t* x = static_cast<uint16_t*>(to) + at;
        for (int64_t i = 0; i < count; ++i) x[i] = to_bfloat16(from[i]);
    } else {
        std::memcpy(static_cast<float*>(to) + at, from, count * sizeof(float));
    }
}

// x R, or x as it is; `to` may not be `x`.
inline void rotate(const float* x, const float* rotation, int64_t dim, float* to) {
    if (rotation == nullptr) {
        std::memcpy(to, x, dim * sizeof(float));
        return;
    }
    for (int64_t d = 0; d < dim; ++d) to[d] = 0.0f;
    for (int64_t k = 0; k < dim; ++k) {
        for (int64_t d = 0; d < dim; ++d) to[d] += x[k] * rotation[k * dim + d];
    }
}

// x R^T, or x as it is.
inline void rotate_back(const float* x, const float* rotation, int64_t dim, float* to) {
    if (rotation == nullptr) {
        std::memcpy(to, x, dim * sizeof(float));
        return;
    }
    const int64_t whole = dim / kLanes * kLanes;
    for (int64_t d = 0; d < dim; ++d) {
        const float* row = rotation + d * dim;
        to[d] = dot(x, row, whole);
        for (int64_t k = whole; k < dim; ++k) to[d] += x[k] * row[k];
    }
}

// Where a row of (batch, heads, tokens) lies.
struct Place {
    int64_t batch, head, token;
    Place(int64_t row, int64_t heads, int64_t tokens)
        : batch(row / (heads * tokens)), head(row / tokens % heads), token(row % tokens) {}
};

inline uint8_t* codes_at(const Cache& cache, const Place& place, int64_t bytes) {
    return cache.codes + place.batch * cache.code_strides[0] + place.head * cache.code_strides[1] + place.token * bytes;
}

inline int64_t grid_at(const Cache& cache, const Place& place) {
    return place.batch * cache.grid_strides[0] + place.head * cache.grid_strides[1] + place.token;
}

// Codes as floats: those of even channels, then those of odd ones; both filled up with zeros.
inline void split(const uint8_t* bytes, int64_t count, float* even, float* odd) {
    for (int64_t i = 0; i < count; ++i) {
        even[i] = static_cast<float>(bytes[i] & 15);
        odd[i] = static_cast<float>(bytes[i] >> 4);
    }
    for (int64_t i = count; i < padded(count); ++i) even[i] = odd[i] = 0.0f;
}

// What one query needs: even channels, then odd ones, each filled up to `half`; and their sum.
float split_query(const Attention& args, int64_t at, int64_t half, float* halves) {
    float query[kMostHeadDim], rotated[kMostHeadDim];
    read(args.q, at, args.head_dim, args.is_bfloat16, query);
    rotate(query, args.rotation, args.head_dim, rotated);
    for (int64_t i = 0; i < 2 * half; ++i) halves[i] = 0.0f;
    float sum = 0.0f;
    for (int64_t d = 0; d < args.head_dim; ++d) {
        const float value = rotated[d] * args.scaling;
        halves[d % 2 * half + d / 2] = value;
        sum += value;
    }
    return sum;
}

void softmax(float* scores, int64_t tokens) {
    float peak = scores[0];
    for (int64_t t = 1; t < tokens; ++t) peak = scores[t] > peak ? scores[t] : peak;
    float total = 0.0f;
    for (int64_t t = 0; t < tokens; ++t) {
        scores[t] = std::exp(scores[t] - peak);
        total += scores[t];
    }
    for (int64_t t = 0; t < tokens; ++t) scores[t] /= total;
}

}  // namespace

void DUQUANT_NAMED(quantize_kv)(const KvRows& args, int64_t begin, int64_t end) {
    const int64_t dim = args.head_dim, bytes = (dim + 1) / 2;
    float values[kMostHeadDim], rotated[kMostHeadDim];
    uint8_t codes[kMostHeadDim + 1] = {};
    for (int64_t row = begin; row < end; ++row) {
        const Place place(row, args.heads, args.tokens);
        const int64_t at = place.batch * args.x_strides[0] + place.head * args.x_strides[1] + place.token * args.x_strides[2];
        read(args.x, at, dim, args.x_is_bfloat16, values);
        rotate(values, args.rotation, dim, rotated);
        float low = rotated[0], high = rotated[0];
        for (int64_t d = 1; d < dim; ++d) {
            low = rotated[d] < low ? rotated[d] : low;
            high = rotated[d] > high ? rotated[d] : high;
        }
        low *= args.clip_ratio;
        high *= args.clip_ratio;
        const uint16_t low16 = to_float16(clamp(low, -kLargestFloat16, kLargestFloat16));
        const uint16_t scale16 = to_float16(clamp((high - low) / 15.0f, kSmallestScale, kLargestFloat16));
        const float base = from_float16(low16), step = from_float16(scale16);
        for (int64_t d = 0; d < dim; ++d) {
            codes[d] = static_cast<uint8_t>(static_cast<int32_t>(clamp(round_even((rotated[d] - base) / step), 0.0f, 15.0f)));
        }
        uint8_t* out = codes_at(args.cache, place, bytes);
        for (int64_t i = 0; i < bytes; ++i) out[i] = static_cast<uint8_t>(codes[2 * i] | (codes[2 * i + 1] << 4));
        args.cache.scale[grid_at(args.cache, place)] = scale16;
        args.cache.low[grid_at(args.cache, place)] = low16;
    }
}

void DUQUANT_NAMED(dequantize_kv)(const KvRows& args, int64_t begin, int64_t end) {
    const int64_t dim = args.head_dim, bytes = (dim + 1) / 2;
    float values[kMostHeadDim + 1], restored[kMostHeadDim];
    for (int64_t row = begin; row < end; ++row) {
        const Place place(row, args.heads, args.tokens);
        const uint8_t* codes = codes_at(args.cache, place, bytes);
        const float base = from_float16(args.cache.low[grid_at(args.cache, place)]);
        const float step = from_float16(args.cache.scale[grid_at(args.cache, place)]);
        for (int64_t i = 0; i < bytes; ++i) {
            values[2 * i] = static_cast<float>(codes[i] & 15) * step + base;
            values[2 * i + 1] = static_cast<float>(codes[i] >> 4) * step + base;
        }
        rotate(values, args.rotation, dim, restored);
        const int64_t at = place.batch * args.x_strides[0] + place.head * args.x_strides[1] + place.token * args.x_strides[2];
        write(args.x, at, dim, args.x_is_bfloat16, restored);
    }
}

void DUQUANT_NAMED(attend)(const Attention& args, int64_t begin, int64_t end) {
    const int64_t bytes = (args.head_dim + 1) / 2, half = padded(bytes);
    const int64_t group = args.group, tokens = args.tokens;
    float* scores = static_cast<float*>(scratch(3, group * tokens * sizeof(float)));
    float* queries = static_cast<float*>(scratch(4, group * (4 * half + 2) * sizeof(float)));
    float* outputs = queries + group * 2 * half;
    float* sums = outputs + group * 2 * half;
    float* offsets = sums + group;
    float even[kMostHeadDim], odd[kMostHeadDim], joined[kMostHeadDim], restored[kMostHeadDim];
    for (int64_t item = begin; item < end; ++item) {
        const Place first(item * tokens, args.kv_heads, tokens);
        for (int64_t g = 0; g < group; ++g) {
            sums[g] = split_query(args, (item * group + g) * args.head_dim, half, queries + g * 2 * half);
        }
        const uint8_t* keys = codes_at(args.keys, first, bytes);
        const int64_t key_grid = grid_at(args.keys, first);
        for (int64_t t = 0; t < tokens; ++t) {
            split(keys + t * bytes, bytes, even, odd);
            const float step = from_float16(args.keys.scale[key_grid + t]);
            const float base = from_float16(args.keys.low[key_grid + t]);
            const float added = args.mask == nullptr ? 0.0f : args.mask[first.batch * args.mask_stride + t];
            for (int64_t g = 0; g < group; ++g) {
                const float* q = queries + g * 2 * half;
                const float product = dot(even, q, bytes) + dot(odd, q + half, bytes);
                scores[g * tokens + t] = step * product + base * sums[g] + added;
            }
        }
        for (int64_t g = 0; g < group; ++g) softmax(scores + g * tokens, tokens);
        for (int64_t i = 0; i < group * 2 * half; ++i) outputs[i] = 0.0f;
        for (int64_t g = 0; g < group; ++g) offsets[g] = 0.0f;
        const uint8_t* values = codes_at(args.values, first, bytes);
        const int64_t value_grid = grid_at(args.values, first);
        for (int64_t t = 0; t < tokens; ++t) {
            split(values + t * bytes, bytes, even, odd);
            const float step = from_float16(args.values.scale[value_grid + t]);
            const float base = from_float16(args.values.low[value_grid + t]);
            for (int64_t g = 0; g < group; ++g) {
                const float weight = scores[g * tokens + t] * step;
                float* out = outputs + g * 2 * half;
                offsets[g] += scores[g * tokens + t] * base;
                for (int64_t i = 0; i < half; ++i) out[i] += weight * even[i];
                for (int64_t i = 0; i < half; ++i) out[half + i] += weight * odd[i];
            }
        }
        for (int64_t g = 0; g < group; ++g) {
            const float* halves = outputs + g * 2 * half;
            for (int64_t d = 0; d < args.head_dim; ++d) joined[d] = halves[d % 2 * half + d / 2] + offsets[g];
            rotate_back(joined, args.rotation, args.head_dim, restored);
            write(args.out, (item * group + g) * args.head_dim, args.head_dim, args.is_bfloat16, restored);
        }
    }
}

}  // namespace duquant
