// From integer sums to outputs. Included by each instruction set's file, so that the compiler vectorizes it for that.
#pragma once

#include <cstdint>
#include <cstring>

#include "floats.h"
#include "kernels.h"

namespace duquant {
namespace {

// Outputs [row, row + count) of one token from sums of (q_w + 8) q_x. Whole numbers are exact in double; one rounding
// to float, then the products and the sum of the definition, one after the other.
inline void finish(const Linear& args, int64_t token, int64_t row, int64_t count, const int32_t* sums) {
    const double row_sum = args.x_row_sum[token], zero_point = args.x_zero_point[token];
    const float scale = args.x_scale[token];
    const float* z_w = args.zero_point + row;
    const float* s_w = args.scale + row;
    const float* weight_sum = args.weight_sum + row;
    float values[64];
    for (int64_t done = 0; done < count; done += 64) {
        const int64_t width = count - done < 64 ? count - done : 64;
        for (int64_t i = 0; i < width; ++i) {
            const double z = static_cast<double>(z_w[done + i]) + 8.0;
            const double whole = sums[done + i] - z * row_sum - static_cast<double>(weight_sum[done + i]) * zero_point;
            values[i] = static_cast<float>(whole) * s_w[done + i] * scale;
        }
        if (args.bias != nullptr) {
            for (int64_t i = 0; i < width; ++i) values[i] += args.bias[row + done + i];
        }
        const int64_t at = token * args.rows + row + done;
        if (args.out_is_bfloat16) {
            uint16_t* out = static_cast<uint16_t*>(args.out) + at;
            for (int64_t i = 0; i < width; ++i) out[i] = to_bfloat16(values[i]);
        } else {
            std::memcpy(static_cast<float*>(args.out) + at, values, width * sizeof(float));
        }
    }
}

}  // namespace
}  // namespace duquant
