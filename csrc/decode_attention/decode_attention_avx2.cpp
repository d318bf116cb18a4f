// decode_attention with AVX2 and FMA: eight codes are gathered from the table of 256 numbers at once.
#include <immintrin.h>

#include <cstring>

#include "decode_attention/driver.h"

namespace fp8kernels {
namespace {

// 2^x for x <= 0, within 2 units in the last place; below 2^-126 it is 0, and NaN stays NaN.
__m256 power(__m256 x) {
    const __m256 least = _mm256_set1_ps(-126.0f);
    const __m256 bounded = _mm256_max_ps(least, x);  // of two numbers one NaN: the second
    const __m256 whole = _mm256_round_ps(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 part = _mm256_sub_ps(bounded, whole);  // -1/2 .. 1/2
    __m256 sum = _mm256_set1_ps(1.525273380406e-5f);    // Taylor: ln(2)^n / n!, n = 7 .. 0; the rest is below 2^-27
    const float terms[] = {1.540353039338e-4f,
                           1.333355814642e-3f,
                           9.618129107628e-3f,
                           5.550410866482e-2f,
                           2.402265069591e-1f,
                           6.931471805599e-1f,
                           1.0f};
    for (float term : terms) sum = _mm256_fmadd_ps(sum, part, _mm256_set1_ps(term));
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), kMantissaBits);
    const __m256 out = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(sum), exponent));
    return _mm256_andnot_ps(_mm256_cmp_ps(x, least, _CMP_LT_OQ), out);
}

struct Avx2 {
    static constexpr int kRows = 4;
    const float* values;

    explicit Avx2(FormatId fmt) : values(decode_table(fmt)) {}

    void query(const float* q, float* to) const { std::memcpy(to, q, kLane * sizeof(float)); }
    void finish(float*) const {}

    __m256 gathered(__m128i codes) const { return _mm256_i32gather_ps(values, _mm256_cvtepu8_epi32(codes), 4); }

    // The numbers of up to eight codes; behind them come those of code 0, which is 0 in every format.
    __m256 decode(const uint8_t* codes, int64_t count) const {
        if (count >= 8) return gathered(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
        uint64_t some = 0;
        std::memcpy(&some, codes, static_cast<size_t>(count));
        return gathered(_mm_cvtsi64_si128(static_cast<long long>(some)));
    }

    template <int kCount>
    void scores_of(const uint8_t* codes, int64_t stride, int64_t tokens, int64_t head_dim, const float* query,
                   int64_t padded, float (*scores)[kTile]) const {
        for (int64_t t = 0; t < tokens; ++t) {
            __m256 sums[kRows];
            for (auto& each : sums) each = _mm256_setzero_ps();
            for (int64_t d = 0; d < head_dim; d += 8) {
                const __m256 key = decode(codes + t * stride + d, head_dim - d);
#pragma GCC unroll 4
                for (int r = 0; r < kCount; ++r) {
                    sums[r] = _mm256_fmadd_ps(key, _mm256_loadu_ps(query + r * padded + d), sums[r]);
                }
            }
            const __m256 all =
                _mm256_hadd_ps(_mm256_hadd_ps(sums[0], sums[1]), _mm256_hadd_ps(sums[2], sums[3]));  // halves of each
            alignas(16) float out[kRows];
            _mm_store_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
            for (int r = 0; r < kCount; ++r) scores[r][t] = out[r];
        }
        for (int64_t t = tokens; t < kTile; ++t) {
            for (int r = 0; r < kCount; ++r) scores[r][t] = 0.0f;
        }
    }

    float weigh(float* scores, float largest) const {
        __m256 sum = _mm256_setzero_ps();
        for (int64_t t = 0; t < kTile; t += 8) {
            const __m256 weight = power(_mm256_sub_ps(_mm256_loadu_ps(scores + t), _mm256_set1_ps(largest)));
            _mm256_storeu_ps(scores + t, weight);
            sum = _mm256_add_ps(sum, weight);
        }
        alignas(32) float out[8];
        _mm256_store_ps(out, sum);
        return ((out[0] + out[1]) + (out[2] + out[3])) + ((out[4] + out[5]) + (out[6] + out[7]));
    }

    template <int kCount>
    void accumulate_of(const uint8_t* codes, int64_t stride, int64_t tokens, int64_t head_dim,
                       const float (*weights)[kTile], const float* worth, float* sum, int64_t padded) const {
        for (int64_t d = 0; d < head_dim; d += 8) {
            __m256 sums[kCount];
            for (int r = 0; r < kCount; ++r) {
                sums[r] = _mm256_mul_ps(_mm256_loadu_ps(sum + r * padded + d), _mm256_set1_ps(worth[r]));
            }
            for (int64_t t = 0; t < tokens; ++t) {
                const __m256 value = decode(codes + t * stride + d, head_dim - d);
#pragma GCC unroll 4
                for (int r = 0; r < kCount; ++r) {
                    sums[r] = _mm256_fmadd_ps(_mm256_set1_ps(weights[r][t]), value, sums[r]);
                }
            }
            for (int r = 0; r < kCount; ++r) _mm256_storeu_ps(sum + r * padded + d, sums[r]);
        }
    }

    void scores(const uint8_t* codes, int64_t stride, int64_t tokens, int64_t head_dim, const float* query,
                int64_t padded, int64_t rows, float (*scores)[kTile]) const {
        switch (rows) {
            case 1: return scores_of<1>(codes, stride, tokens, head_dim, query, padded, scores);
            case 2: return scores_of<2>(codes, stride, tokens, head_dim, query, padded, scores);
            case 3: return scores_of<3>(codes, stride, tokens, head_dim, query, padded, scores);
            default: return scores_of<4>(codes, stride, tokens, head_dim, query, padded, scores);
        }
    }

    void accumulate(const uint8_t* codes, int64_t stride, int64_t tokens, int64_t head_dim,
                    const float (*weights)[kTile], const float* worth, float* sum, int64_t padded, int64_t rows) const {
        switch (rows) {
            case 1: return accumulate_of<1>(codes, stride, tokens, head_dim, weights, worth, sum, padded);
            case 2: return accumulate_of<2>(codes, stride, tokens, head_dim, weights, worth, sum, padded);
            case 3: return accumulate_of<3>(codes, stride, tokens, head_dim, weights, worth, sum, padded);
            default: return accumulate_of<4>(codes, stride, tokens, head_dim, weights, worth, sum, padded);
        }
    }
};

}  // namespace

void decode_attention_avx2(const DecodeAttentionArgs& args) { run<Avx2>(args); }

}  // namespace fp8kernels
