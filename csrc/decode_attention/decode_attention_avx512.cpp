// decode_attention with AVX-512: 64 codes are looked up at once (gemm/decode_avx512.h) and multiplied in fp32.
//
// Up to four rows (queries of heads that share keys) use what was decoded. Numbers stay in the order that unpacking
// gives, even and odd ones apart: the query is brought into that order once, the sums are brought back at the end.
#include "decode_attention/driver.h"
#include "gemm/decode_avx512.h"

namespace fp8kernels {
namespace {

constexpr int kVectors = kLane / 16;

struct Numbers {
    __m512 at[kVectors];
};

// Where the number of lane `lane` of vector `vector` stands among 64.
constexpr int place(int vector, int lane) { return lane / 4 * 16 + vector / 2 * 8 + lane % 4 * 2 + vector % 2; }

// 2^x for x <= 0, within 2 units in the last place; below 2^-150 it is 0, and NaN stays NaN.
__m512 power(__m512 x) {
    const __m512 bounded = _mm512_max_ps(_mm512_set1_ps(-160.0f), x);  // of two numbers one NaN: the second
    const __m512 whole = _mm512_roundscale_ps(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 part = _mm512_sub_ps(bounded, whole);  // -1/2 .. 1/2
    __m512 sum = _mm512_set1_ps(1.525273380406e-5f);    // Taylor: ln(2)^n / n!, n = 7 .. 0; the rest is below 2^-27
    const float terms[] = {1.540353039338e-4f,
                           1.333355814642e-3f,
                           9.618129107628e-3f,
                           5.550410866482e-2f,
                           2.402265069591e-1f,
                           6.931471805599e-1f,
                           1.0f};
    for (float term : terms) sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(term));
    return _mm512_scalef_ps(sum, whole);
}

struct Avx512 {
    static constexpr int kRows = 4;
    Bf16Decoder decoder;

    explicit Avx512(FormatId fmt) : decoder(fmt) {}

    void query(const float* q, float* to) const {
        for (int v = 0; v < kVectors; ++v) {
            for (int lane = 0; lane < 16; ++lane) to[16 * v + lane] = q[place(v, lane)];
        }
    }

    void finish(float* sum) const {
        float before[kLane];
        for (int i = 0; i < kLane; ++i) before[i] = sum[i];
        for (int v = 0; v < kVectors; ++v) {
            for (int lane = 0; lane < 16; ++lane) sum[place(v, lane)] = before[16 * v + lane];
        }
    }

    // Also asks for the codes of `ahead`, which the next tile reads; an address behind the end is no fault.
    Numbers decode(const uint8_t* codes, __mmask64 there, int64_t ahead) const {
        _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(codes) + ahead), _MM_HINT_T0);
        const Bytes bytes = decoder.bytes(_mm512_maskz_loadu_epi8(there, codes));
        const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
        const __m512i a = first_halves(bytes), b = second_halves(bytes);
        return {{_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), _mm512_castsi512_ps(_mm512_and_si512(a, upper)),
                 _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), _mm512_castsi512_ps(_mm512_and_si512(b, upper))}};
    }

    // The sums of the 16 lanes of four vectors, each lane of 128 bits holding a part of all four.
    static __m512 quarters(const __m512 (&x)[4]) {
        const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
        const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
        return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xEE));
    }

    template <int kCount>
    void scores_of(const uint8_t* codes, int64_t stride, int64_t tokens, int64_t head_dim, const float* query,
                   int64_t padded, float (*scores)[kTile]) const {
        const int64_t ahead = kTile * stride;
        for (int64_t t = 0; t < tokens; t += 4) {
            __m512 sums[4][4];
            for (auto& row : sums) {
                for (auto& each : row) each = _mm512_setzero_ps();
            }
            for (int64_t d = 0; d < head_dim; d += kLane) {
                const __mmask64 there = first_bytes(head_dim - d);
#pragma GCC unroll 4
                for (int k = 0; k < 4; ++k) {
                    const int64_t token = t + k < tokens ? t + k : tokens - 1;
                    const Numbers key = decode(codes + token * stride + d, there, ahead);
#pragma GCC unroll 4
                    for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 4
                        for (int v = 0; v < kVectors; ++v) {
                            const __m512 q = _mm512_load_ps(query + r * padded + d + 16 * v);
                            sums[r][k] = _mm512_fmadd_ps(key.at[v], q, sums[r][k]);
                        }
                    }
                }
            }
            const __m512 row0 = quarters(sums[0]), row1 = quarters(sums[1]);
            const __m512 row2 = quarters(sums[2]), row3 = quarters(sums[3]);
            const __m512 a =
                _mm512_add_ps(_mm512_shuffle_f32x4(row0, row1, 0x44), _mm512_shuffle_f32x4(row0, row1, 0xEE));
            const __m512 b =
                _mm512_add_ps(_mm512_shuffle_f32x4(row2, row3, 0x44), _mm512_shuffle_f32x4(row2, row3, 0xEE));
            const __m512 all = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
            alignas(64) float out[16];
            _mm512_store_ps(out, all);
            for (int r = 0; r < kCount; ++r) _mm_store_ps(scores[r] + t, _mm_load_ps(out + 4 * r));
        }
        for (int64_t t = (tokens + 3) / 4 * 4; t < kTile; ++t) {
            for (int r = 0; r < kCount; ++r) scores[r][t] = 0.0f;
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

    float weigh(float* scores, float largest) const {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t t = 0; t < kTile; t += 16) {
            const __m512 weight = power(_mm512_sub_ps(_mm512_load_ps(scores + t), _mm512_set1_ps(largest)));
            _mm512_store_ps(scores + t, weight);
            sum = _mm512_add_ps(sum, weight);
        }
        return _mm512_reduce_add_ps(sum);
    }

    template <int kCount>
    void accumulate_of(const uint8_t* codes, int64_t stride, int64_t tokens, int64_t head_dim,
                       const float (*weights)[kTile], const float* worth, float* sum, int64_t padded) const {
        const int64_t ahead = kTile * stride;
        for (int64_t d = 0; d < head_dim; d += kLane) {
            const __mmask64 there = first_bytes(head_dim - d);
            __m512 sums[kCount][kVectors];
            for (int r = 0; r < kCount; ++r) {
                for (int v = 0; v < kVectors; ++v) {
                    sums[r][v] = _mm512_mul_ps(_mm512_load_ps(sum + r * padded + d + 16 * v), _mm512_set1_ps(worth[r]));
                }
            }
            for (int64_t t = 0; t < tokens; ++t) {
                const Numbers value = decode(codes + t * stride + d, there, ahead);
#pragma GCC unroll 4
                for (int r = 0; r < kCount; ++r) {
                    const __m512 weight = _mm512_set1_ps(weights[r][t]);
#pragma GCC unroll 4
                    for (int v = 0; v < kVectors; ++v) {
                        sums[r][v] = _mm512_fmadd_ps(weight, value.at[v], sums[r][v]);
                    }
                }
            }
            for (int r = 0; r < kCount; ++r) {
                for (int v = 0; v < kVectors; ++v) _mm512_store_ps(sum + r * padded + d + 16 * v, sums[r][v]);
            }
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

void decode_attention_avx512(const DecodeAttentionArgs& args) { run<Avx512>(args); }

}  // namespace fp8kernels
