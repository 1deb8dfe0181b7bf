// The C ABI: what this machine can do, and the kernels, shared out over threads.
#include <cstring>

#include "kernels.h"
#include "threads.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace duquant {
namespace {

enum Isa { kPortable = 0, kAvx2 = 1, kVnni = 2, kAmx = 3 };

int isa = kPortable;

// Fewest tokens that are worth a tile: up to there the vector unit is as fast.
constexpr int64_t kAmxTokens = 5;
// Codes of tokens that are multiplied together: half of a second-level cache.
constexpr int64_t kTokenBytes = 1 << 20;
// Least products a thread must get for waking it to pay.
constexpr int64_t kProductsPerThread = 1 << 20;

#if defined(__x86_64__)
uint64_t enabled_state() {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<uint64_t>(high) << 32) | low;
}

bool may_use_tiles() {
#if defined(__linux__)
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}
#endif

int detect() {
    int found = kPortable;
#if defined(__x86_64__)
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27))) return found;  // OSXSAVE
    const bool has_f16c = c & (1u << 29);
    const uint64_t state = enabled_state();
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
    const bool has_avx2 = (b & (1u << 5)) && has_f16c && (state & 0x6) == 0x6;
    const bool has_avx512 = (b & (1u << 16)) && (b & (1u << 17)) && (b & (1u << 30)) && (b & (1u << 31)) &&
                            (c & (1u << 11)) && (c & (1u << 1)) && (state & 0xe6) == 0xe6;  // F DQ BW VL VNNI VBMI
    const bool has_amx = (d & (1u << 24)) && (d & (1u << 25)) && (d & (1u << 22)) && (state & 0x60000) == 0x60000;
    uint32_t a1, b1, c1, d1;
    const bool has_bf16 = __get_cpuid_count(7, 1, &a1, &b1, &c1, &d1) && (a1 & (1u << 5));
#ifdef DUQUANT_AVX2
    if (has_avx2) found = kAvx2;
#endif
#ifdef DUQUANT_AVX512
    if (has_avx2 && has_avx512) found = kVnni;
#endif
#ifdef DUQUANT_AMX
    if (has_avx2 && has_avx512 && has_bf16 && has_amx && may_use_tiles()) found = kAmx;
#endif
    (void)has_avx2, (void)has_avx512, (void)has_amx, (void)has_bf16;
#endif
    return found;
}

int threads_for(int64_t products, int threads) {
    const int64_t most = products / kProductsPerThread;
    return static_cast<int>(most < threads ? (most < 1 ? 1 : most) : threads);
}

// Codes of one token, in pairs or one a byte, to planes: 64 even channels, then 64 odd ones, chunk after chunk.
void fill_planes(const Linear& args, int64_t chunks, int8_t* planes, int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
        int8_t* out = planes + token * chunks * kChunk;
        std::memset(out, 0, chunks * kChunk);
        if (args.x_is_pairs) {
            const uint8_t* x = args.x + token * ((args.channels + 1) / 2);
            for (int64_t first = 0; first < args.channels / 2; first += kChunkBytes, out += kChunk) {
                const int64_t width = args.channels / 2 - first < kChunkBytes ? args.channels / 2 - first : kChunkBytes;
                for (int64_t i = 0; i < width; ++i) {
                    out[i] = static_cast<int8_t>((x[first + i] & 15) - 8);
                    out[i + kChunkBytes] = static_cast<int8_t>((x[first + i] >> 4) - 8);
                }
            }
            if (args.channels & 1) {
                const int64_t last = args.channels / 2;
                planes[token * chunks * kChunk + last / kChunkBytes * kChunk + last % kChunkBytes] =
                    static_cast<int8_t>((x[last] & 15) - 8);
            }
        } else {
            const int8_t* x = reinterpret_cast<const int8_t*>(args.x) + token * args.channels;
            for (int64_t i = 0; i < args.channels; ++i) {
                out[i / kChunk * kChunk + (i & 1) * kChunkBytes + (i % kChunk) / 2] = x[i];
            }
        }
    }
}

}  // namespace
}  // namespace duquant

using namespace duquant;

// The function of the best instruction set in use.
#if defined(DUQUANT_AVX512)
#define DUQUANT_BEST(name, avx512_name) \
    (isa >= kVnni ? avx512_name : isa >= kAvx2 ? DUQUANT_JOIN(name, avx2) : DUQUANT_JOIN(name, portable))
#elif defined(DUQUANT_AVX2)
#define DUQUANT_BEST(name, avx512_name) (isa >= kAvx2 ? DUQUANT_JOIN(name, avx2) : DUQUANT_JOIN(name, portable))
#else
#define DUQUANT_BEST(name, avx512_name) DUQUANT_JOIN(name, portable)
#endif

namespace duquant {
namespace {

void multiply(const Linear& args, int64_t chunks, int threads) {
    LinearJob job{args, chunks, nullptr, nullptr};
    int8_t* planes = static_cast<int8_t*>(scratch(0, args.tokens * chunks * kChunk));
    job.planes = planes;
    threads = threads_for(args.tokens * args.rows * args.channels, threads);
    parallel_for(args.tokens, 16, threads,
                 [&](int64_t begin, int64_t end) { fill_planes(args, chunks, planes, begin, end); });
    auto* rows = DUQUANT_BEST(linear_rows, linear_rows_vnni);
#ifdef DUQUANT_AMX
    if (isa >= kAmx && args.tokens >= kAmxTokens) {
        const int64_t token_tiles = (args.tokens + 15) / 16;
        int8_t* tiles = static_cast<int8_t*>(scratch(1, token_tiles * chunks * 2 * 1024));
        job.tiles = tiles;
        parallel_for(token_tiles, 1, threads,
                     [&](int64_t begin, int64_t end) { fill_token_tiles(job, tiles, begin, end); });
        rows = linear_rows_amx;
    }
#endif
    // Large pieces, so that each thread walks far through memory, but a few for each, so that none waits long.
    constexpr int64_t kRows = 64;
    const int64_t share = (args.rows + threads * 4 - 1) / (threads * 4);
    const int64_t grain = (share + kRows - 1) / kRows * kRows;
    parallel_for(args.rows, grain, threads, [&](int64_t begin, int64_t end) { rows(job, begin, end); });
}

}  // namespace
}  // namespace duquant

#define DUQUANT_EXPORT __attribute__((visibility("default")))

extern "C" {

// Find out what the machine has, use at most `highest`, and return what is used. Call before anything else.
DUQUANT_EXPORT int duquant_start(int highest) {
    const int found = detect();
    isa = found < highest ? found : highest;
    return isa;
}

DUQUANT_EXPORT void duquant_linear(const Linear* args, int threads) {
    // So many tokens at a time that their codes stay in the second-level cache while all weights pass by.
    const int64_t chunks = (args->row_bytes + kChunkBytes - 1) / kChunkBytes;
    const int64_t most = kTokenBytes / (chunks * kChunk) / 32 * 32 < 32 ? 32 : kTokenBytes / (chunks * kChunk) / 32 * 32;
    for (int64_t first = 0; first < args->tokens; first += most) {
        Linear part = *args;
        part.tokens = args->tokens - first < most ? args->tokens - first : most;
        part.x += first * (args->x_is_pairs ? (args->channels + 1) / 2 : args->channels);
        part.x_scale += first;
        part.x_zero_point += first;
        part.x_row_sum += first;
        part.out = static_cast<char*>(args->out) + first * args->rows * (args->out_is_bfloat16 ? 2 : 4);
        multiply(part, chunks, threads);
    }
}

// Round rows; with rotations (r1 not null, AMX in use) transform them before.
DUQUANT_EXPORT void duquant_quantize(const Quantize* args, int threads) {
    threads = threads_for(args->tokens * args->channels * (args->r1 != nullptr ? 2 * args->block : 16), threads);
    auto* rows = DUQUANT_BEST(quantize_rows, quantize_rows_avx512);
#ifdef DUQUANT_AMX
    if (args->r1 != nullptr) rows = transform_rows_amx;
#endif
    parallel_for(args->tokens, 32, threads, [&](int64_t begin, int64_t end) { rows(*args, begin, end); });
}

// New tokens into a cache, and tokens of a cache out of it.
DUQUANT_EXPORT void duquant_quantize_kv(const KvRows* args, int threads) {
    const int64_t rows = args->batch * args->heads * args->tokens;
    auto* run = DUQUANT_BEST(quantize_kv, quantize_kv_avx512);
    parallel_for(rows, 16, threads_for(rows * args->head_dim * args->head_dim, threads),
                 [&](int64_t begin, int64_t end) { run(*args, begin, end); });
}

DUQUANT_EXPORT void duquant_dequantize_kv(const KvRows* args, int threads) {
    const int64_t rows = args->batch * args->heads * args->tokens;
    auto* run = DUQUANT_BEST(dequantize_kv, dequantize_kv_avx512);
    parallel_for(rows, 16, threads_for(rows * args->head_dim * args->head_dim, threads),
                 [&](int64_t begin, int64_t end) { run(*args, begin, end); });
}

// One query for each row of the batch, from the codes.
DUQUANT_EXPORT void duquant_attend(const Attention* args, int threads) {
    const int64_t items = args->batch * args->kv_heads;
    threads = threads_for(items * args->group * (args->tokens + args->sinks) * args->head_dim * 4, threads);
    auto* attend = DUQUANT_BEST(attend, attend_avx512);
    parallel_for(items, 1, threads, [&](int64_t begin, int64_t end) { attend(*args, begin, end); });
}

// RMSNorm of rows.
DUQUANT_EXPORT void duquant_rms_norm(const Norm* args, int threads) {
    auto* rows = DUQUANT_BEST(norm_rows, norm_rows_avx512);
    parallel_for(args->tokens, 16, threads_for(args->tokens * args->channels * 16, threads),
                 [&](int64_t begin, int64_t end) { rows(*args, begin, end); });
}

}  // extern "C"
