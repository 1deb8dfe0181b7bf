// The packed KV cache: rounding and restoring. Plain C++ whose loops the compiler vectorizes: compiled once for each
// instruction set.
#include "kernels.h"
#include "kv.h"
#include "rounding.h"

namespace duquant {
namespace {

constexpr float kLargestFloat16 = 65504.0f, kSmallestScale = 6.103515625e-5f;  // 2^-14

inline float clamp(float value, float low, float high) {
    value = value > low ? value : low;
    return value < high ? value : high;
}

// The smallest and the largest of some values, sixteen at a time.
inline void range_of(const float* values, int64_t count, float& low, float& high) {
    low = high = values[0];
    int64_t i = 0;
    if (count >= kLanes) {
        Floats lows = load<Floats>(values), highs = lows;
        for (i = kLanes; i + kLanes <= count; i += kLanes) {
            const Floats each = load<Floats>(values + i);
            lows = each < lows ? each : lows;
            highs = each > highs ? each : highs;
        }
        for (int64_t lane = 0; lane < kLanes; ++lane) {
            low = lows[lane] < low ? lows[lane] : low;
            high = highs[lane] > high ? highs[lane] : high;
        }
    }
    for (; i < count; ++i) {
        low = values[i] < low ? values[i] : low;
        high = values[i] > high ? values[i] : high;
    }
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
        float low, high;
        range_of(rotated, dim, low, high);
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

}  // namespace duquant
