// 64 codes to 64 bf16 numbers by byte look-ups: any format, all 256 codes, no arithmetic.
//
// A bf16 number is two bytes, so a format is two tables of 256 bytes, four registers each. vpermi2b looks up 128
// entries with 7 bits of the code; the eighth bit chooses between two look-ups.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 warns of its own intrinsics (bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include "formats/format.h"

namespace fp8kernels {
namespace {

struct Bytes {
    __m512i low, high;  // of each of 64 bf16 numbers, in the order of the codes
};

struct Bf16Decoder {
    __m512i low[4], high[4];

    explicit Bf16Decoder(FormatId format) {
        const uint16_t* table = decode_table_bf16(format);
        for (int i = 0; i < 4; ++i) {
            const __m512i a = _mm512_loadu_si512(table + 64 * i);
            const __m512i b = _mm512_loadu_si512(table + 64 * i + 32);
            low[i] = joined(_mm512_cvtepi16_epi8(a), _mm512_cvtepi16_epi8(b));
            high[i] =
                joined(_mm512_cvtepi16_epi8(_mm512_srli_epi16(a, 8)), _mm512_cvtepi16_epi8(_mm512_srli_epi16(b, 8)));
        }
    }

    Bytes bytes(__m512i codes) const {
        const __mmask64 upper = _mm512_movepi8_mask(codes);
        const __m512i a = _mm512_permutex2var_epi8(low[0], codes, low[1]);
        const __m512i b = _mm512_permutex2var_epi8(low[2], codes, low[3]);
        const __m512i c = _mm512_permutex2var_epi8(high[0], codes, high[1]);
        const __m512i d = _mm512_permutex2var_epi8(high[2], codes, high[3]);
        return {_mm512_mask_blend_epi8(upper, a, b), _mm512_mask_blend_epi8(upper, c, d)};
    }

   private:
    static __m512i joined(__m256i a, __m256i b) { return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1); }
};

// The numbers of bytes 0-7 of each 128-bit lane, and of bytes 8-15.
inline __m512i first_halves(Bytes b) { return _mm512_unpacklo_epi8(b.low, b.high); }
inline __m512i second_halves(Bytes b) { return _mm512_unpackhi_epi8(b.low, b.high); }

inline __mmask64 first_bytes(int64_t count) { return count >= 64 ? ~0ULL : (1ULL << count) - 1; }

}  // namespace
}  // namespace fp8kernels
