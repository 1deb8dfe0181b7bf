// Rounding of rows and attention to a packed cache, in plain C++ whose loops the compiler vectorizes: compiled once for
// each instruction set.
#include <cmath>

#include "epilogue.h"
#include "kernels.h"
#include "rounding.h"

namespace duquant {
namespace {

constexpr int64_t kLanes = 16;

inline float from_bfloat16(uint16_t value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline float from_float16(uint16_t value) {
    const uint32_t sign = static_cast<uint32_t>(value & 0x8000u) << 16, rest = value & 0x7fffu;
    if (rest < 0x400u) {  // zero and subnormal: a whole number of 2^-24
        const float size = static_cast<float>(rest) * 5.9604644775390625e-8f;
        return sign ? -size : size;
    }
    const uint32_t bits = sign | (rest >= 0x7c00u ? 0x7f800000u | (rest << 13) : (rest << 13) + 0x38000000u);
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

// The values of a row as float, and its range.
void read_row(const Quantize& args, int64_t row, float* values, float& low, float& high) {
    const int64_t channels = args.channels;
    if (args.x_is_bfloat16) {
        const uint16_t* x = static_cast<const uint16_t*>(args.x) + row * channels;
        for (int64_t i = 0; i < channels; ++i) values[i] = from_bfloat16(x[i]);
    } else {
        std::memcpy(values, static_cast<const float*>(args.x) + row * channels, channels * sizeof(float));
    }
    float lows[2 * kLanes], highs[2 * kLanes];
    for (int64_t lane = 0; lane < 2 * kLanes; ++lane) lows[lane] = highs[lane] = values[0];
    int64_t i = 0;
    for (; i + 2 * kLanes <= channels; i += 2 * kLanes) {
        for (int64_t lane = 0; lane < 2 * kLanes; ++lane) {
            const float value = values[i + lane];
            lows[lane] = value < lows[lane] ? value : lows[lane];
            highs[lane] = value > highs[lane] ? value : highs[lane];
        }
    }
    low = lows[0], high = highs[0];
    for (int64_t lane = 1; lane < 2 * kLanes; ++lane) {
        low = lows[lane] < low ? lows[lane] : low;
        high = highs[lane] > high ? highs[lane] : high;
    }
    for (; i < channels; ++i) {
        low = values[i] < low ? values[i] : low;
        high = values[i] > high ? values[i] : high;
    }
}

// Bytes to halves of codes: `low` takes the low nibbles, `high` the high ones; both are filled up with zeros.
inline void split(const uint8_t* bytes, int64_t count, int64_t padded, float* low, float* high) {
    for (int64_t i = 0; i < count; ++i) {
        low[i] = static_cast<float>(bytes[i] & 15);
        high[i] = static_cast<float>(bytes[i] >> 4);
    }
    for (int64_t i = count; i < padded; ++i) low[i] = high[i] = 0.0f;
}

inline float dot(const float* a, const float* b, int64_t padded) {
    float sums[kLanes] = {};
    for (int64_t i = 0; i < padded; i += kLanes) {
        for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += a[i + lane] * b[i + lane];
    }
    for (int64_t width = kLanes / 2; width > 0; width /= 2) {
        for (int64_t lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
    }
    return sums[0];
}

// One head's queries, even channels in the first half and odd ones in the second, and their sum.
float split_query(const Attention& args, const float* q, int64_t padded, float* halves) {
    const int64_t dim = args.head_dim;
    float rotated[kMostHeadDim];
    if (args.rotation != nullptr) {
        for (int64_t d = 0; d < dim; ++d) rotated[d] = 0.0f;
        for (int64_t k = 0; k < dim; ++k) {
            for (int64_t d = 0; d < dim; ++d) rotated[d] += q[k] * args.rotation[k * dim + d];
        }
        q = rotated;
    }
    for (int64_t i = 0; i < 2 * padded; ++i) halves[i] = 0.0f;
    float sum = 0.0f;
    for (int64_t d = 0; d < dim; ++d) {
        halves[d % 2 * padded + d / 2] = q[d];
        sum += q[d];
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

void DUQUANT_NAMED(quantize_rows)(const Quantize& args, int64_t begin, int64_t end) {
    const int64_t channels = args.channels;
    float* values = static_cast<float*>(scratch(3, channels * sizeof(float)));
    uint8_t* codes = static_cast<uint8_t*>(scratch(4, channels + 1));
    const float qmin = -static_cast<float>(1 << (args.bits - 1)), qmax = -qmin - 1.0f;
    for (int64_t row = begin; row < end; ++row) {
        float low, high;
        read_row(args, row, values, low, high);
        const Grid grid = make_grid(args, low, high);
        const float inverse = 1.0f / grid.scale;
        const float offset = args.out_is_pairs ? 8.0f : 0.0f;
        int32_t sum = 0;
        for (int64_t i = 0; i < channels; ++i) {
            float code = round_even(values[i] * inverse) + grid.zero_point;
            code = code > qmin ? code : qmin;
            code = code < qmax ? code : qmax;
            const int32_t whole = static_cast<int32_t>(code);
            sum += whole;
            codes[i] = static_cast<uint8_t>(static_cast<int32_t>(code + offset));
        }
        args.scale[row] = grid.scale * args.gain;
        args.zero_point[row] = grid.zero_point;
        args.row_sum[row] = static_cast<float>(sum);
        if (args.out_is_pairs) {
            codes[channels] = 0;  // what an odd width's last byte has in its high nibble
            const int64_t bytes = (channels + 1) / 2;
            uint8_t* out = args.out + row * bytes;
            for (int64_t i = 0; i < bytes; ++i) {
                uint16_t pair;
                std::memcpy(&pair, codes + 2 * i, sizeof pair);
                out[i] = static_cast<uint8_t>(pair | (pair >> 4));
            }
        } else {
            std::memcpy(args.out + row * channels, codes, channels);
        }
    }
}

void DUQUANT_NAMED(attend)(const Attention& args, int64_t begin, int64_t end) {
    const int64_t bytes = (args.head_dim + 1) / 2, padded = (bytes + kLanes - 1) / kLanes * kLanes;
    const int64_t group = args.group, tokens = args.tokens;
    float* scores = static_cast<float*>(scratch(3, group * tokens * sizeof(float)));
    float* queries = static_cast<float*>(scratch(4, group * (4 * padded + 2) * sizeof(float)));
    float* outputs = queries + group * 2 * padded;
    float* sums = outputs + group * 2 * padded;
    float* offsets = sums + group;
    alignas(64) float low[kMostHeadDim], high[kMostHeadDim];
    for (int64_t item = begin; item < end; ++item) {
        const int64_t batch = item / args.kv_heads, head = item % args.kv_heads;
        for (int64_t g = 0; g < group; ++g) {
            const float* q = args.q + (item * group + g) * args.head_dim;
            sums[g] = split_query(args, q, padded, queries + g * 2 * padded);
        }
        const uint8_t* keys = args.keys + batch * args.key_strides[0] + head * args.key_strides[1];
        const int64_t key_grid = batch * args.key_grid_strides[0] + head * args.key_grid_strides[1];
        for (int64_t t = 0; t < tokens; ++t) {
            split(keys + t * bytes, bytes, padded, low, high);
            const float scale = from_float16(args.key_scale[key_grid + t]), base = from_float16(args.key_low[key_grid + t]);
            const float added = args.mask == nullptr ? 0.0f : args.mask[batch * args.mask_stride + t];
            for (int64_t g = 0; g < group; ++g) {
                const float* q = queries + g * 2 * padded;
                const float product = dot(low, q, padded) + dot(high, q + padded, padded);
                scores[g * tokens + t] = scale * product + base * sums[g] + added;
            }
        }
        for (int64_t g = 0; g < group; ++g) {
            softmax(scores + g * tokens, tokens);
            offsets[g] = 0.0f;
            for (int64_t i = 0; i < 2 * padded; ++i) outputs[g * 2 * padded + i] = 0.0f;
        }
        const uint8_t* values = args.values + batch * args.value_strides[0] + head * args.value_strides[1];
        const int64_t value_grid = batch * args.value_grid_strides[0] + head * args.value_grid_strides[1];
        for (int64_t t = 0; t < tokens; ++t) {
            split(values + t * bytes, bytes, padded, low, high);
            const float scale = from_float16(args.value_scale[value_grid + t]);
            const float base = from_float16(args.value_low[value_grid + t]);
            for (int64_t g = 0; g < group; ++g) {
                const float weight = scores[g * tokens + t];
                float* out = outputs + g * 2 * padded;
                offsets[g] += weight * base;
                for (int64_t i = 0; i < padded; ++i) out[i] += weight * scale * low[i];
                for (int64_t i = 0; i < padded; ++i) out[padded + i] += weight * scale * high[i];
            }
        }
        for (int64_t g = 0; g < group; ++g) {
            float* out = args.out + (item * group + g) * args.head_dim;
            const float* halves = outputs + g * 2 * padded;
            float joined[kMostHeadDim];
            for (int64_t d = 0; d < args.head_dim; ++d) joined[d] = halves[d % 2 * padded + d / 2] + offsets[g];
            for (int64_t d = 0; d < args.head_dim; ++d) {
                // Back by the transpose: a dot with the rotation's row.
                if (args.rotation == nullptr) {
                    out[d] = joined[d];
                } else {
                    const float* r = args.rotation + d * args.head_dim;
                    float lanes[kLanes] = {};
                    for (int64_t k = 0; k < args.head_dim; ++k) lanes[k % kLanes] += joined[k] * r[k];
                    float sum = 0.0f;
                    for (int64_t lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
                    out[d] = sum;
                }
            }
        }
    }
}

}  // namespace duquant
