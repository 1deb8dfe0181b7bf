// 16-bit floats in plain C++, rounding to nearest even as torch does. Loops over these vectorize.
#pragma once

#include <cstdint>
#include <cstring>

namespace duquant {
namespace {

inline uint32_t float_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float from_bfloat16(uint16_t value) { return float_of(static_cast<uint32_t>(value) << 16); }

inline uint16_t to_bfloat16(float value) {
    const uint32_t bits = float_bits(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline float from_float16(uint16_t value) {
    const uint32_t sign = static_cast<uint32_t>(value & 0x8000u) << 16, rest = value & 0x7fffu;
    if (rest < 0x400u) {  // zero and subnormal: a whole number of 2^-24
        const float size = static_cast<float>(rest) * 5.9604644775390625e-8f;
        return sign ? -size : size;
    }
    return float_of(sign | (rest >= 0x7c00u ? 0x7f800000u | (rest << 13) : (rest << 13) + 0x38000000u));
}

// For sizes up to 65504, the largest float16.
inline uint16_t to_float16(float value) {
    const uint32_t bits = float_bits(value), sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (size < 0x38800000u) {  // below 2^-14: in units of 2^-24, rounded by an addition
        const float shifted = float_of(size) + 0.5f;
        return static_cast<uint16_t>(sign | (float_bits(shifted) - 0x3f000000u));
    }
    const uint32_t rounded = size + 0xfffu + ((size >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

}  // namespace
}  // namespace duquant
