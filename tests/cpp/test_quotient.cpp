// Proof by trying all of them that the quotient of csrc/quantize/quantize_avx512.cpp for bf16 and fp16 x is the
// correctly rounded one: every mantissa of x (11 bits, which holds the 8 of bf16) by every mantissa of scale (24 bits).
#include <cstdint>

#include "check.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace {

// How many of 2^23 scales in [1, 2) give another quotient than the division, for x in [1, 2) with 10 mantissa bits.
__attribute__((target("avx2,fma"))) int64_t wrong_quotients(uint32_t mantissa) {
    const __m256 x = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(0x3F800000u | mantissa << 13)));
    const __m256 one = _mm256_set1_ps(1.0f);
    __m256i bits = _mm256_add_epi32(_mm256_set1_epi32(0x3F800000), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    __m256i wrong = _mm256_setzero_si256();
    for (uint32_t i = 0; i < 1u << 20; ++i, bits = _mm256_add_epi32(bits, _mm256_set1_epi32(8))) {
        const __m256 scale = _mm256_castsi256_ps(bits);
        const __m256 reciprocal = _mm256_div_ps(one, scale);
        const __m256 q = _mm256_mul_ps(x, reciprocal);
        const __m256 y = _mm256_fmadd_ps(_mm256_fnmadd_ps(q, scale, x), reciprocal, q);
        const __m256 differs = _mm256_cmp_ps(y, _mm256_div_ps(x, scale), _CMP_NEQ_UQ);
        wrong = _mm256_sub_epi32(wrong, _mm256_castps_si256(differs));
    }
    alignas(32) int32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), wrong);
    int64_t sum = 0;
    for (int32_t lane : lanes) sum += lane;
    return sum;
}

}  // namespace

int main() {
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
        std::printf("quotient: this CPU has no AVX2 and FMA, so the kernel does not run here either\n");
        return 0;
    }
    int64_t wrong = 0;
#pragma omp parallel for reduction(+ : wrong) schedule(dynamic, 16)
    for (uint32_t mantissa = 0; mantissa < 1024; ++mantissa) wrong += wrong_quotients(mantissa);
    CHECK(wrong == 0, "%lld of 2^33 quotients differ", static_cast<long long>(wrong));
    return report("quotient");
}
#else
int main() { return report("quotient: only on x86"); }
#endif
