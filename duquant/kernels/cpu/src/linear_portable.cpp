// Integer products in plain C++: for any machine. Compiled once without and once with AVX2, which the compiler uses.
#include "epilogue.h"
#include "kernels.h"

#ifdef DUQUANT_COMPILE_AVX2
#include <immintrin.h>
#endif

namespace duquant {
namespace {

constexpr int64_t kRows = 32;

#ifdef DUQUANT_COMPILE_AVX2
// Products of a nibble (at most 15) and a code (at most 128 in size) summed in pairs stay below 2^15: nothing saturates.
inline __m256i multiply_add(__m256i sum, __m256i nibbles, const int8_t* codes) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    const __m256i pairs = _mm256_maddubs_epi16(nibbles, x);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

inline __m256i half_chunk(__m256i sum, const uint8_t* weight, const int8_t* planes) {
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight));
    sum = multiply_add(sum, _mm256_and_si256(bytes, mask), planes);
    return multiply_add(sum, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask), planes + kChunkBytes);
}

inline int32_t add_up(__m256i sum) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

int32_t dot(const uint8_t* weight, int64_t row_bytes, const int8_t* planes) {
    __m256i low = _mm256_setzero_si256(), high = _mm256_setzero_si256();
    const int64_t chunks = row_bytes / kChunkBytes;
    for (int64_t c = 0; c < chunks; ++c) {
        low = half_chunk(low, weight + c * kChunkBytes, planes + c * kChunk);
        high = half_chunk(high, weight + c * kChunkBytes + 32, planes + c * kChunk + 32);
    }
    if (row_bytes % kChunkBytes) {
        uint8_t last[kChunkBytes] = {};
        std::memcpy(last, weight + chunks * kChunkBytes, row_bytes % kChunkBytes);
        low = half_chunk(low, last, planes + chunks * kChunk);
        high = half_chunk(high, last + 32, planes + chunks * kChunk + 32);
    }
    return add_up(_mm256_add_epi32(low, high));
}
#else
int32_t dot(const uint8_t* weight, int64_t row_bytes, const int8_t* planes) {
    int32_t sum = 0;
    for (int64_t first = 0; first < row_bytes; first += kChunkBytes) {
        const int64_t width = row_bytes - first < kChunkBytes ? row_bytes - first : kChunkBytes;
        const int8_t* even = planes + 2 * first;
        const int8_t* odd = even + kChunkBytes;
        for (int64_t i = 0; i < width; ++i) {
            const uint8_t byte = weight[first + i];
            sum += (byte & 15) * even[i] + (byte >> 4) * odd[i];
        }
    }
    return sum;
}
#endif

}  // namespace

void DUQUANT_NAMED(linear_rows)(const LinearJob& job, int64_t begin, int64_t end) {
    const Linear& args = job.args;
    int32_t sums[kRows];
    for (int64_t row = begin; row < end; row += kRows) {
        const int64_t count = end - row < kRows ? end - row : kRows;
        for (int64_t token = 0; token < args.tokens; ++token) {
            const int8_t* planes = job.planes + token * job.chunks * kChunk;
            for (int64_t i = 0; i < count; ++i) {
                sums[i] = dot(args.weight + (row + i) * args.row_bytes, args.row_bytes, planes);
            }
            finish(args, token, row, count, sums);
        }
    }
}

}  // namespace duquant
