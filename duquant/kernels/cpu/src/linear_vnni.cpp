// Integer products with AVX512-VNNI: a few tokens at a time, weights streamed once from memory, nibbles split in registers.
#include <immintrin.h>

#include "epilogue.h"
#include "kernels.h"

namespace duquant {
namespace {

constexpr int64_t kRows = 64;  // rows finished together; a multiple of every R below

// Sums of R rows and M tokens into sums[token * kRows + row].
template <int R, int M>
void products(const LinearJob& job, const uint8_t* const* rows, int64_t token, int32_t* sums) {
    const __m512i mask = _mm512_set1_epi8(15);
    const int64_t full = job.args.row_bytes / kChunkBytes, rest = job.args.row_bytes % kChunkBytes;
    const __mmask64 tail = rest ? (~0ull >> (64 - rest)) : 0;
    const int64_t stride = job.chunks * kChunk;
    const int8_t* planes = job.planes + token * stride;
    __m512i total[R][M];
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) total[r][m] = _mm512_setzero_si512();
    const auto step = [&](int64_t c, auto load) {
        __m512i even[M], odd[M];
        for (int m = 0; m < M; ++m) {
            even[m] = _mm512_load_si512(planes + m * stride + c * kChunk);
            odd[m] = _mm512_load_si512(planes + m * stride + c * kChunk + kChunkBytes);
        }
        for (int r = 0; r < R; ++r) {
            const __m512i bytes = load(rows[r] + c * kChunkBytes);
            // The same place of the next rows: more streams than the hardware foresees.
            _mm_prefetch(reinterpret_cast<const char*>(rows[r] + R * job.args.row_bytes + c * kChunkBytes), _MM_HINT_T0);
            const __m512i low = _mm512_and_si512(bytes, mask);
            const __m512i high = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask);
            for (int m = 0; m < M; ++m) {
                total[r][m] = _mm512_dpbusd_epi32(total[r][m], low, even[m]);
                total[r][m] = _mm512_dpbusd_epi32(total[r][m], high, odd[m]);
            }
        }
    };
    for (int64_t c = 0; c < full; ++c) step(c, [](const uint8_t* at) { return _mm512_loadu_si512(at); });
    if (rest) step(full, [tail](const uint8_t* at) { return _mm512_maskz_loadu_epi8(tail, at); });
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) sums[m * kRows + r] = _mm512_reduce_add_epi32(total[r][m]);
}

template <int R, int M>
void block(const LinearJob& job, int64_t row, int64_t count, int64_t token, int32_t* sums) {
    const Linear& args = job.args;
    for (int64_t first = 0; first < count; first += R) {
        const uint8_t* rows[R];
        for (int r = 0; r < R; ++r) {
            // Past the end the last row is computed again, and not used.
            const int64_t index = first + r < count ? first + r : count - 1;
            rows[r] = args.weight + (row + index) * args.row_bytes;
        }
        products<R, M>(job, rows, token, sums + first);
    }
    for (int m = 0; m < M; ++m) finish(args, token + m, row, count, sums + m * kRows);
}

}  // namespace

void linear_rows_vnni(const LinearJob& job, int64_t begin, int64_t end) {
    alignas(64) int32_t sums[4 * kRows];
    for (int64_t row = begin; row < end; row += kRows) {
        const int64_t count = end - row < kRows ? end - row : kRows;
        int64_t token = 0;
        for (; token + 4 <= job.args.tokens; token += 4) block<4, 4>(job, row, count, token, sums);
        switch (job.args.tokens - token) {
            case 3: block<4, 3>(job, row, count, token, sums); break;
            case 2: block<8, 2>(job, row, count, token, sums); break;
            case 1: block<8, 1>(job, row, count, token, sums); break;
            default: break;
        }
    }
}

}  // namespace duquant
