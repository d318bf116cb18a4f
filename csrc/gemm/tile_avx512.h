// The register tile: up to 8 rows x 48 columns of fp32 sums in 24 registers, fed by vdpbf16ps.
//
// vdpbf16ps adds two products to each fp32 sum, each rounded to nearest even; it treats denormal sums as zero, which no
// sum of two codes' products can be (the smallest is 2^-44).
#pragma once

#include <immintrin.h>

#include <cstring>

#include "gemm/blocked.h"

namespace fp8kernels {
namespace {

// value * x_scale * w_scale. Wide: exponents are added apart, so that only the result can leave the range of fp32.
inline __m512 scaled(__m512 value, __m512 x_scale, __m512 w_scale, bool wide) {
    if (!wide) return _mm512_mul_ps(value, _mm512_mul_ps(x_scale, w_scale));
    const __m512 mantissas = _mm512_mul_ps(_mm512_getmant_ps(x_scale, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src),
                                           _mm512_getmant_ps(w_scale, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src));
    const __m512 exponents = _mm512_add_ps(_mm512_getexp_ps(x_scale), _mm512_getexp_ps(w_scale));
    return _mm512_scalef_ps(_mm512_mul_ps(value, mantissas), exponents);
}

// Rounded to nearest even; with integers where there may be denormals, because vcvtneps2bf16 turns them into zero.
inline __m256i vector_to_bf16(__m512 value, bool denormals) {
    if (!denormals) return (__m256i)_mm512_cvtneps_pbh(value);
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(
        _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7FC00000)), 16));
}

template <int kRows, int kVectors>
inline void dot(__m512 (&sum)[kRows][kVectors], const uint16_t* x, int64_t x_stride, const uint16_t* w, int64_t pairs) {
    for (int64_t p = 0; p < pairs; ++p) {
        __m512bh right[kVectors];
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) right[j] = (__m512bh)_mm512_load_si512(w + (p * kVectors + j) * 32);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
            int pair;
            std::memcpy(&pair, x + i * x_stride + 2 * p, sizeof pair);
            const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
            for (int j = 0; j < kVectors; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
        }
    }
}

// Writes the finished sums with their bias; columns past the edge are masked.
template <int kRows, int kVectors>
inline void finish(const Tile<uint16_t>& t, const __m512 (&sum)[kRows][kVectors]) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
        const int64_t left = t.cols - 16 * j;
        const __mmask16 mask = static_cast<__mmask16>(left >= 16 ? 0xFFFF : (1u << left) - 1);
        const __m512 bias = t.bias ? _mm512_maskz_loadu_ps(mask, t.bias + 16 * j) : _mm512_setzero_ps();
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
            const __m512 value = t.bias ? _mm512_add_ps(sum[i][j], bias) : sum[i][j];
            const int64_t at = i * t.out_stride + 16 * j;
            if (t.out_bf16) {
                _mm256_mask_storeu_epi16(static_cast<uint16_t*>(t.out) + at, mask,
                                         vector_to_bf16(value, t.wide || t.bias));
            } else {
                _mm512_mask_storeu_ps(static_cast<float*>(t.out) + at, mask, value);
            }
        }
    }
}

template <int kRows, int kVectors>
void tile_of(const Tile<uint16_t>& t) {
    alignas(64) float total[kRows][16 * kVectors];
    __m512 sum[kRows][kVectors];
    if (t.last) {
        const char* out = static_cast<const char*>(t.out);
        const int64_t bytes = t.out_bf16 ? 2 : 4;
        for (int i = 0; i < kRows; ++i) {
            for (int64_t b = 0; b < t.cols * bytes; b += 64) __builtin_prefetch(out + i * t.out_stride * bytes + b, 1);
        }
    }
    int64_t segment = 0;
    for (int64_t k = 0; k < t.depth; k += t.segment, ++segment) {
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
            for (int j = 0; j < kVectors; ++j) sum[i][j] = _mm512_setzero_ps();
        }
        const int64_t depth = t.depth - k < t.segment ? t.depth - k : t.segment;
        dot<kRows, kVectors>(sum, t.x + k, t.x_stride, t.w + k * 16 * kVectors, (depth + 1) / 2);
        const float* x_scale = t.x_scale + segment * t.x_scale_stride;
        const float* w_scale = t.w_scale + segment * t.w_scale_stride;
        const bool more = k + t.segment < t.depth;
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) {
            const __m512 right = _mm512_loadu_ps(w_scale + 16 * j);
#pragma GCC unroll 8
            for (int i = 0; i < kRows; ++i) {
                __m512 value = scaled(sum[i][j], _mm512_set1_ps(x_scale[i]), right, t.wide);
                if (k > 0) {
                    value = _mm512_add_ps(_mm512_load_ps(total[i] + 16 * j), value);
                } else if (!t.first) {
                    value = _mm512_add_ps(_mm512_load_ps(t.sum + i * t.sum_stride + 16 * j), value);
                }
                if (more) _mm512_store_ps(total[i] + 16 * j, value);
                sum[i][j] = value;
            }
        }
    }
    if (t.last) {
        finish<kRows, kVectors>(t, sum);
        return;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) _mm512_store_ps(t.sum + i * t.sum_stride + 16 * j, sum[i][j]);
    }
}

template <int kVectors>
void tile_of_width(const Tile<uint16_t>& t) {
    switch (t.rows) {
        case 1: return tile_of<1, kVectors>(t);
        case 2: return tile_of<2, kVectors>(t);
        case 3: return tile_of<3, kVectors>(t);
        case 4: return tile_of<4, kVectors>(t);
        case 5: return tile_of<5, kVectors>(t);
        case 6: return tile_of<6, kVectors>(t);
        case 7: return tile_of<7, kVectors>(t);
        default: return tile_of<8, kVectors>(t);
    }
}

}  // namespace
}  // namespace fp8kernels
