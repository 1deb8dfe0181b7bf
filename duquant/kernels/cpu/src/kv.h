// What the kernels of the packed KV cache share: where rows lie, 16-bit floats in and out, rotations.
#pragma once

#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "floats.h"
#include "kernels.h"

namespace duquant {
namespace {

constexpr int64_t kMostHeadDim = 512;
constexpr int64_t kLanes = 16;

// Sixteen numbers side by side. The compiler cuts them into the registers that there are.
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

template <typename Vector, typename Number>
inline Vector load(const Number* from) {
    Vector values;
    std::memcpy(&values, from, sizeof values);
    return values;
}

template <typename Vector, typename Number>
inline void store(Number* to, const Vector& values) {
    std::memcpy(to, &values, sizeof values);
}

inline int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

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

// sum + a * b, in one rounding where the machine can.
inline Floats fused(float a, const Floats& b, const Floats& sum) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps(_mm512_set1_ps(a), (__m512)b, (__m512)sum);
#else
    return sum + a * b;
#endif
}

// Columns [first, first + kVectors * kLanes) of x R.
template <int kVectors>
inline void rotate_columns(const float* x, const float* rotation, int64_t dim, int64_t first, float* to) {
    Floats sums[kVectors] = {};
    for (int64_t k = 0; k < dim; ++k) {
        const float* row = rotation + k * dim + first;
        for (int v = 0; v < kVectors; ++v) sums[v] = fused(x[k], load<Floats>(row + v * kLanes), sums[v]);
    }
    for (int v = 0; v < kVectors; ++v) store(to + first + v * kLanes, sums[v]);
}

// x R, or x as it is; `to` may not be `x`.
inline void rotate(const float* x, const float* rotation, int64_t dim, float* to) {
    if (rotation == nullptr) {
        std::memcpy(to, x, dim * sizeof(float));
        return;
    }
    int64_t d = 0;
    for (; d + 4 * kLanes <= dim; d += 4 * kLanes) rotate_columns<4>(x, rotation, dim, d, to);
    for (; d + kLanes <= dim; d += kLanes) rotate_columns<1>(x, rotation, dim, d, to);
    for (; d < dim; ++d) {
        to[d] = 0.0f;
        for (int64_t k = 0; k < dim; ++k) to[d] += x[k] * rotation[k * dim + d];
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

}  // namespace
}  // namespace duquant
