// Rounding of rows, in plain C++ whose loops the compiler vectorizes: compiled once for each instruction set.

#include <cstring>

#include "floats.h"
#include "kernels.h"
#include "rounding.h"

namespace duquant {
namespace {

constexpr int64_t kLanes = 16;

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

}  // namespace duquant
