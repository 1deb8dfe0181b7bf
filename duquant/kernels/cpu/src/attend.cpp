// Attention with one query for each row of the batch, straight from the codes of the packed KV cache: scores, softmax,
// weighted sum. Compiled once for each instruction set.
//
// Sixteen tokens are taken at a time. For scores they lie side by side, so that nothing is summed across lanes; for the
// weighted sum channels do. Scale and low end of a token's grid are applied to its score and to its weight. The first
// tokens may lie apart and not be packed at all ("sinks").
#include "kv.h"

#include <type_traits>

namespace duquant {
namespace {

constexpr int kMostHeads = 4;  // queries whose sums stay in registers together
constexpr int64_t kBlockBytes = kLanes * kMostHeadDim / 2;
constexpr float kNothing = -__builtin_inff();

// Memory of one head of keys and the queries that share it. Rows of queries, scores and sums are one after the other.
struct Work {
    int64_t channels;  // of a row of codes, filled up to whole vectors of bytes
    int64_t packed, sinks;  // tokens, filled up to whole vectors
    float* scores;  // (group, sinks + packed), later their exponentials
    float* rotated;  // (group, channels): queries as the keys are rotated, scaled, then zeros
    float* plain;  // (group, head_dim): queries as they came, scaled
    float* query_sum;  // (group): of a row of `rotated`
    float* total;  // (group): of the exponentials
    float* offset;  // (group, 16): sums of exponentials times low ends, one for each lane
    float* weights;  // (group, 16): of one block
    float* sums;  // (group, channels): weighted codes of the even channels, then of the odd ones
};

// Sixteen tokens: their codes, `stride` bytes apart, and their grids.
struct Block {
    const uint8_t* codes;
    int64_t stride;
    Floats step, base;
};

inline Floats from_float16s(const uint16_t* from) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
    float values[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) values[i] = from_float16(from[i]);
    return load<Floats>(values);
#endif
}

// The block of tokens from `token` on. Rows that are no whole vectors, and those beyond the last token, are zeros in `spare`.
inline Block block_at(const Cache& cache, const Place& first, int64_t bytes, int64_t token, int64_t count, uint8_t* spare) {
    const uint8_t* codes = codes_at(cache, first, bytes) + token * bytes;
    const int64_t grid = grid_at(cache, first) + token;
    if (count >= kLanes && bytes % kLanes == 0) {
        return {codes, bytes, from_float16s(cache.scale + grid), from_float16s(cache.low + grid)};
    }
    const int64_t present = count < kLanes ? count : kLanes, stride = padded(bytes);
    uint16_t scale[kLanes] = {}, low[kLanes] = {};
    std::memset(spare, 0, kLanes * stride);
    std::memcpy(scale, cache.scale + grid, present * sizeof(uint16_t));
    std::memcpy(low, cache.low + grid, present * sizeof(uint16_t));
    for (int64_t t = 0; t < present; ++t) std::memcpy(spare + t * stride, codes + t * bytes, bytes);
    return {spare, stride, from_float16s(scale), from_float16s(low)};
}

// Four words, sixteen bytes, of each of sixteen tokens: the tokens side by side.
inline void load_words(const uint8_t* codes, int64_t stride, Words (&words)[4]) {
#if defined(__AVX512F__)
    __m512i rows[4];
    for (int r = 0; r < 4; ++r) {
        const auto at = [&](int lane) {
            return _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + (4 * lane + r) * stride));
        };
        rows[r] = _mm512_inserti32x4(_mm512_castsi128_si512(at(0)), at(1), 1);
        rows[r] = _mm512_inserti32x4(_mm512_inserti32x4(rows[r], at(2), 2), at(3), 3);
    }
    const __m512i a = _mm512_unpacklo_epi32(rows[0], rows[1]), b = _mm512_unpackhi_epi32(rows[0], rows[1]);
    const __m512i c = _mm512_unpacklo_epi32(rows[2], rows[3]), d = _mm512_unpackhi_epi32(rows[2], rows[3]);
    words[0] = (Words)_mm512_unpacklo_epi64(a, c);
    words[1] = (Words)_mm512_unpackhi_epi64(a, c);
    words[2] = (Words)_mm512_unpacklo_epi64(b, d);
    words[3] = (Words)_mm512_unpackhi_epi64(b, d);
#else
    uint32_t turned[4][kLanes];
    for (int64_t t = 0; t < kLanes; ++t) {
        uint32_t row[4];
        std::memcpy(row, codes + t * stride, sizeof row);
        for (int w = 0; w < 4; ++w) turned[w][t] = row[w];
    }
    for (int w = 0; w < 4; ++w) words[w] = load<Words>(turned[w]);
#endif
}

// The n-th codes of sixteen words, as floats.
inline Floats codes_of(Words words, int n) {
#if defined(__AVX512F__)
    const __m512 numbers = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return (Floats)_mm512_permutexvar_ps((__m512i)(words >> (4 * n)), numbers);  // by the lowest four bits
#else
    return __builtin_convertvector((Ints)((words >> (4 * n)) & 15), Floats);
#endif
}

// Codes of a block times kHeads queries from the g-th on: scores before the mask, rows `apart`.
template <int kHeads>
void score(const Work& work, const Block& block, int64_t g, float* to, int64_t apart) {
    const int64_t channels = work.channels;
    const float* queries = work.rotated + g * channels;
    Floats even[kHeads] = {}, odd[kHeads] = {};  // two sums each: one would wait for itself
    for (int64_t first = 0; first < channels; first += 2 * kLanes) {
        Words words[4];
        load_words(block.codes + first / 2, block.stride, words);
#pragma GCC unroll 4
        for (int w = 0; w < 4; ++w) {
#pragma GCC unroll 4
            for (int n = 0; n < 8; n += 2) {
                const Floats left = codes_of(words[w], n), right = codes_of(words[w], n + 1);
                const float* query = queries + first + 8 * w + n;
                for (int h = 0; h < kHeads; ++h) {
                    even[h] += query[h * channels] * left;
                    odd[h] += query[h * channels + 1] * right;
                }
            }
        }
    }
    for (int h = 0; h < kHeads; ++h) {
        store(to + h * apart, block.step * (even[h] + odd[h]) + block.base * work.query_sum[g + h]);
    }
}

// Sixteen bytes, each as a word.
inline Words words_of(const uint8_t* bytes) {
#if defined(__AVX512F__)
    return (Words)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
#else
    uint32_t words[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) words[i] = bytes[i];
    return load<Words>(words);
#endif
}

// Add a block's codes, times kHeads rows of sixteen weights, to the sums from the g-th on.
template <int kHeads>
void add_up(const Work& work, const Block& block, int64_t g, const float* weights) {
    const int64_t channels = work.channels, half = channels / 2;
    for (int64_t first = 0; first < half; first += kLanes) {
        float* sums = work.sums + g * channels + first;
        Floats even[kHeads], odd[kHeads];
        for (int h = 0; h < kHeads; ++h) {
            even[h] = load<Floats>(sums + h * channels);
            odd[h] = load<Floats>(sums + h * channels + half);
        }
#pragma GCC unroll 4
        for (int t = 0; t < kLanes; ++t) {
            const Words words = words_of(block.codes + t * block.stride + first);
            const Floats left = codes_of(words, 0), right = codes_of(words, 1);
            for (int h = 0; h < kHeads; ++h) {
                even[h] += weights[h * kLanes + t] * left;
                odd[h] += weights[h * kLanes + t] * right;
            }
        }
        for (int h = 0; h < kHeads; ++h) {
            store(sums + h * channels, even[h]);
            store(sums + h * channels + half, odd[h]);
        }
    }
}

// Call `use` with the first query and the number of queries, as a constant, of each part of a group.
template <typename Use>
inline void in_parts(int64_t group, Use use) {
    for (int64_t g = 0; g < group; g += kMostHeads) {
        switch (group - g) {
            case 1: use(g, std::integral_constant<int, 1>{}); break;
            case 2: use(g, std::integral_constant<int, 2>{}); break;
            case 3: use(g, std::integral_constant<int, 3>{}); break;
            default: use(g, std::integral_constant<int, kMostHeads>{});
        }
    }
}

// e^x for x <= 0, to some units in the last place; 0 below -87, where float32 ends.
inline Floats exponential(Floats x) {
    const Floats shift = Floats{} + 12582912.0f;  // 1.5 * 2^23: whole numbers end up in the low bits
    const Floats shifted = x * 1.44269504f + shift;
    const Floats whole = shifted - shift;
    const Floats rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts
    Floats series = Floats{} + 1.9875691500e-4f;
    series = series * rest + 1.3981999507e-3f;
    series = series * rest + 8.3334519073e-3f;
    series = series * rest + 4.1665795894e-2f;
    series = series * rest + 1.6666665459e-1f;
    series = series * rest + 5.0000001201e-1f;
    series = series * rest * rest + rest + 1.0f;
    const Floats power = (Floats)(((Words)shifted + 127) << 23);
    const Ints is_far = x < Floats{} - 87.0f;
    return (Floats)((Ints)(series * power) & ~is_far);
}

inline float total_of(const Floats& values) {
    float parts[kLanes];
    store(parts, values);
    for (int64_t width = kLanes / 2; width > 0; width /= 2) {
        for (int64_t i = 0; i < width; ++i) parts[i] += parts[i + width];
    }
    return parts[0];
}

// Scores to their exponentials, over the largest; return their sum. Nothing to see gives NaN, as a softmax over nothing.
inline float exponentials(float* scores, int64_t count) {
    Floats peaks = Floats{} + kNothing;
    for (int64_t i = 0; i < count; i += kLanes) {
        const Floats each = load<Floats>(scores + i);
        peaks = each > peaks ? each : peaks;
    }
    float peak = peaks[0];
    for (int64_t i = 1; i < kLanes; ++i) peak = peaks[i] > peak ? peaks[i] : peak;
    Floats sums = {};
    for (int64_t i = 0; i < count; i += kLanes) {
        const Floats each = exponential(load<Floats>(scores + i) - peak);
        store(scores + i, each);
        sums += each;
    }
    return total_of(sums);
}

inline float dot(const float* a, const float* b, int64_t count) {
    Floats sums = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) sums += load<Floats>(a + i) * load<Floats>(b + i);
    float sum = total_of(sums);
    for (; i < count; ++i) sum += a[i] * b[i];
    return sum;
}

void read_queries(const Attention& args, int64_t item, const Work& work) {
    const int64_t dim = args.head_dim;
    for (int64_t g = 0; g < args.group; ++g) {
        float* plain = work.plain + g * dim;
        float* rotated = work.rotated + g * work.channels;
        read(args.q, (item * args.group + g) * dim, dim, args.is_bfloat16, plain);
        for (int64_t d = 0; d < dim; ++d) plain[d] *= args.scaling;
        rotate(plain, args.rotation, dim, rotated);
        for (int64_t d = dim; d < work.channels; ++d) rotated[d] = 0.0f;
        work.query_sum[g] = 0.0f;
        for (int64_t d = 0; d < dim; ++d) work.query_sum[g] += rotated[d];
    }
}

// Scores of all tokens, masked; -inf where a vector is filled up.
void score_all(const Attention& args, const Place& first, const Work& work) {
    const int64_t bytes = (args.head_dim + 1) / 2, row = work.sinks + work.packed;
    const float* mask = args.mask == nullptr ? nullptr : args.mask + first.batch * args.mask_stride;
    uint8_t spare[kBlockBytes];
    for (int64_t t = 0; t < args.tokens; t += kLanes) {
        const Block block = block_at(args.keys, first, bytes, t, args.tokens - t, spare);
        in_parts(args.group, [&](int64_t g, auto heads) {
            score<heads>(work, block, g, work.scores + g * row + work.sinks + t, row);
        });
    }
    float key[kMostHeadDim];
    for (int64_t s = 0; s < args.sinks; ++s) {
        const int64_t at = ((first.batch * args.kv_heads + first.head) * args.sinks + s) * args.head_dim;
        read(args.sink_keys, at, args.head_dim, args.is_bfloat16, key);
        for (int64_t g = 0; g < args.group; ++g) {
            work.scores[g * row + s] = dot(work.plain + g * args.head_dim, key, args.head_dim);
        }
    }
    for (int64_t g = 0; g < args.group; ++g) {
        float* sinks = work.scores + g * row;
        float* packed = sinks + work.sinks;
        for (int64_t s = 0; mask != nullptr && s < args.sinks; ++s) sinks[s] += mask[s];
        for (int64_t t = 0; mask != nullptr && t < args.tokens; ++t) packed[t] += mask[args.sinks + t];
        for (int64_t s = args.sinks; s < work.sinks; ++s) sinks[s] = kNothing;
        for (int64_t t = args.tokens; t < work.packed; ++t) packed[t] = kNothing;
    }
}

// Sums of weighted codes, and of weighted low ends.
void add_up_all(const Attention& args, const Place& first, const Work& work) {
    const int64_t bytes = (args.head_dim + 1) / 2, row = work.sinks + work.packed;
    uint8_t spare[kBlockBytes];
    std::memset(work.sums, 0, args.group * work.channels * sizeof(float));
    std::memset(work.offset, 0, args.group * kLanes * sizeof(float));
    for (int64_t t = 0; t < args.tokens; t += kLanes) {
        const Block block = block_at(args.values, first, bytes, t, args.tokens - t, spare);
        for (int64_t g = 0; g < args.group; ++g) {
            const Floats shares = load<Floats>(work.scores + g * row + work.sinks + t);
            store(work.offset + g * kLanes, load<Floats>(work.offset + g * kLanes) + shares * block.base);
            store(work.weights + g * kLanes, shares * block.step);
        }
        in_parts(args.group, [&](int64_t g, auto heads) {
            add_up<heads>(work, block, g, work.weights + g * kLanes);
        });
    }
}

// One head's sums, rotated back, with the sinks' values, over the sum of all exponentials.
void write_output(const Attention& args, const Place& first, int64_t out_row, int64_t g, const Work& work) {
    const int64_t dim = args.head_dim, half = work.channels / 2;
    const float* sums = work.sums + g * work.channels;
    float joined[kMostHeadDim], value[kMostHeadDim], result[kMostHeadDim];
    const float offset = total_of(load<Floats>(work.offset + g * kLanes));
    for (int64_t d = 0; d < dim; ++d) joined[d] = sums[d % 2 * half + d / 2] + offset;
    rotate(joined, args.inverse, dim, result);
    for (int64_t s = 0; s < args.sinks; ++s) {
        const int64_t at = ((first.batch * args.kv_heads + first.head) * args.sinks + s) * dim;
        const float share = work.scores[g * (work.sinks + work.packed) + s];
        read(args.sink_values, at, dim, args.is_bfloat16, value);
        for (int64_t d = 0; d < dim; ++d) result[d] += share * value[d];
    }
    for (int64_t d = 0; d < dim; ++d) result[d] /= work.total[g];
    write(args.out, out_row * dim, dim, args.is_bfloat16, result);
}

}  // namespace

void DUQUANT_NAMED(attend)(const Attention& args, int64_t begin, int64_t end) {
    const int64_t group = args.group;
    Work work;
    work.channels = 2 * padded((args.head_dim + 1) / 2);
    work.packed = padded(args.tokens);
    work.sinks = padded(args.sinks);
    work.scores = static_cast<float*>(scratch(3, group * (work.sinks + work.packed) * sizeof(float)));
    const int64_t each = 2 * work.channels + args.head_dim + 2 * kLanes + 2;
    work.sums = static_cast<float*>(scratch(4, group * each * sizeof(float)));
    work.offset = work.sums + group * work.channels;
    work.weights = work.offset + group * kLanes;
    work.rotated = work.weights + group * kLanes;
    work.plain = work.rotated + group * work.channels;
    work.query_sum = work.plain + group * args.head_dim;
    work.total = work.query_sum + group;
    for (int64_t item = begin; item < end; ++item) {
        const Place first(item, args.kv_heads, 1);
        read_queries(args, item, work);
        score_all(args, first, work);
        for (int64_t g = 0; g < group; ++g) {
            work.total[g] = exponentials(work.scores + g * (work.sinks + work.packed), work.sinks + work.packed);
        }
        add_up_all(args, first, work);
        for (int64_t g = 0; g < group; ++g) write_output(args, first, item * group + g, g, work);
    }
}

}  // namespace duquant
