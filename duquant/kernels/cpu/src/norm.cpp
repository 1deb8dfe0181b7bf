// RMSNorm in one go: plain C++ whose loops the compiler vectorizes, compiled once for each instruction set.
#include <cmath>

#include "floats.h"
#include "kernels.h"

namespace duquant {
namespace {

// In double: the sum does not depend on its order, but for what float32 cannot show.
template <typename Read>
inline double sum_of_squares(int64_t channels, Read read) {
    constexpr int64_t kLanes = 16;
    double lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= channels; i += kLanes) {
        for (int64_t lane = 0; lane < kLanes; ++lane) {
            const double value = read(i + lane);
            lanes[lane] += value * value;
        }
    }
    double sum = 0.0;
    for (int64_t lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
    for (; i < channels; ++i) sum += static_cast<double>(read(i)) * read(i);
    return sum;
}

inline float factor(double sum, int64_t channels, float epsilon) {
    return 1.0f / std::sqrt(static_cast<float>(sum / static_cast<double>(channels)) + epsilon);
}

}  // namespace

void DUQUANT_NAMED(norm_rows)(const Norm& args, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const int64_t first = row * args.channels;
        if (args.is_bfloat16) {
            const uint16_t* x = static_cast<const uint16_t*>(args.x) + first;
            const uint16_t* weight = static_cast<const uint16_t*>(args.weight);
            uint16_t* out = static_cast<uint16_t*>(args.out) + first;
            const double sum = sum_of_squares(args.channels, [x](int64_t i) { return from_bfloat16(x[i]); });
            const float by = factor(sum, args.channels, args.epsilon);
            for (int64_t i = 0; i < args.channels; ++i) {
                const float rounded = from_bfloat16(to_bfloat16(from_bfloat16(x[i]) * by));
                out[i] = to_bfloat16(from_bfloat16(weight[i]) * rounded);
            }
        } else {
            const float* x = static_cast<const float*>(args.x) + first;
            const float* weight = static_cast<const float*>(args.weight);
            float* out = static_cast<float*>(args.out) + first;
            const double sum = sum_of_squares(args.channels, [x](int64_t i) { return x[i]; });
            const float by = factor(sum, args.channels, args.epsilon);
            for (int64_t i = 0; i < args.channels; ++i) out[i] = weight[i] * (x[i] * by);
        }
    }
}

}  // namespace duquant
