// The grid of a row, operation by operation as in duquant.quantizers.affine.
#pragma once

#include "kernels.h"

namespace duquant {
namespace {

struct Grid {
    float scale;
    float zero_point;
};

// To the nearest whole number, halves to even, for sizes below 2^22. Compilers vectorize this everywhere.
inline float round_even(float value) {
    constexpr float kShift = 12582912.0f;  // 1.5 * 2^23
    return (value + kShift) - kShift;
}

inline Grid make_grid(const Quantize& args, float low, float high) {
    constexpr float kMinRelativeScale = 1e-4f, kTiny = 1e-12f;
    low *= args.clip_low;
    high *= args.clip_high;
    const float low_size = low < 0 ? -low : low, high_size = high < 0 ? -high : high;
    const float magnitude = low_size > high_size ? low_size : high_size;
    const float half = static_cast<float>(1 << (args.bits - 1));
    if (args.is_symmetric) {
        const float scale = magnitude / (half - 0.5f);
        return {scale > kTiny ? scale : kTiny, 0.0f};
    }
    const float floor = magnitude * kMinRelativeScale;
    float scale = (high - low) / (2.0f * half - 1.0f);
    scale = scale > floor ? scale : floor;
    scale = scale > kTiny ? scale : kTiny;
    return {scale, -half - round_even(low / scale)};
}

}  // namespace
}  // namespace duquant
