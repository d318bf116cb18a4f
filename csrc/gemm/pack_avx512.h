// Codes to bf16 in the order the register tile reads: rows of x side by side, panels of w in pairs of K.
//
// Either stride of an operand may be 1, so a transposed view needs no copy. Past the end of K the codes are taken as 0,
// which is the number zero in every format.
#pragma once

#include "gemm/decode_avx512.h"
#include "gemm/plan.h"

namespace fp8kernels {
namespace {

// x with K contiguous: to[i, k], rows `stride` apart, written up to the next multiple of 64.
inline void unpack_rows(uint16_t* to, int64_t stride, const uint8_t* codes, int64_t row_stride, int64_t rows,
                        int64_t depth, const Bf16Decoder& decoder) {
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);  // first halves of the lanes = codes 0-31
    for (int64_t i = 0; i < rows; ++i) {
        const uint8_t* from = codes + i * row_stride;
        uint16_t* row = to + i * stride;
        for (int64_t k = 0; k < depth; k += 64) {
            const __m512i loaded = _mm512_maskz_loadu_epi8(first_bytes(depth - k), from + k);
            const Bytes bytes = decoder.bytes(_mm512_permutexvar_epi64(order, loaded));
            _mm512_store_si512(row + k, first_halves(bytes));
            _mm512_store_si512(row + k + 32, second_halves(bytes));
        }
    }
}

// 16 vectors of 64 bytes to their transpose within each 128-bit lane: byte j of lane l of v[i] <-> byte i of lane l of
// v[j].
inline void transpose_bytes(__m512i v[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi8(v[i], v[i + 8]);
        t[2 * i + 1] = _mm512_unpackhi_epi8(v[i], v[i + 8]);
    }
    for (int i = 0; i < 8; ++i) {
        v[2 * i] = _mm512_unpacklo_epi8(t[i], t[i + 8]);
        v[2 * i + 1] = _mm512_unpackhi_epi8(t[i], t[i + 8]);
    }
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi8(v[i], v[i + 8]);
        t[2 * i + 1] = _mm512_unpackhi_epi8(v[i], v[i + 8]);
    }
    for (int i = 0; i < 8; ++i) {
        v[2 * i] = _mm512_unpacklo_epi8(t[i], t[i + 8]);
        v[2 * i + 1] = _mm512_unpackhi_epi8(t[i], t[i + 8]);
    }
}

// The same with the rows contiguous: 64 rows x 16 of K at a time.
inline void unpack_rows_transposed(uint16_t* to, int64_t stride, const uint8_t* codes, int64_t col_stride, int64_t rows,
                                   int64_t depth, const Bf16Decoder& decoder) {
    for (int64_t i = 0; i < rows; i += 64) {
        const __mmask64 mask = first_bytes(rows - i);
        for (int64_t k = 0; k < round_up(depth, 64); k += 16) {
            __m512i v[16];
            for (int64_t d = 0; d < 16; ++d) {
                v[d] = k + d < depth ? _mm512_maskz_loadu_epi8(mask, codes + (k + d) * col_stride + i)
                                     : _mm512_setzero_si512();
            }
            transpose_bytes(v);  // lane l of v[d] = row 16 l + d, codes k .. k + 15
            for (int64_t d = 0; d < 16; ++d) {
                const Bytes bytes = decoder.bytes(v[d]);
                alignas(64) uint16_t first[32], second[32];
                _mm512_store_si512(first, first_halves(bytes));
                _mm512_store_si512(second, second_halves(bytes));
                for (int64_t lane = 0; lane < 4 && i + 16 * lane + d < rows; ++lane) {
                    uint16_t* row = to + (i + 16 * lane + d) * stride + k;
                    _mm_store_si128(reinterpret_cast<__m128i*>(row),
                                    _mm_load_si128(reinterpret_cast<__m128i*>(first + 8 * lane)));
                    _mm_store_si128(reinterpret_cast<__m128i*>(row + 8),
                                    _mm_load_si128(reinterpret_cast<__m128i*>(second + 8 * lane)));
                }
            }
        }
    }
}

// 4 x 4 transpose of 128-bit lanes: lane l of v[c] <-> lane c of v[l].
inline void transpose_lanes(__m512i v[4]) {
    const __m512i a = _mm512_shuffle_i32x4(v[0], v[1], 0x44), b = _mm512_shuffle_i32x4(v[0], v[1], 0xEE);
    const __m512i c = _mm512_shuffle_i32x4(v[2], v[3], 0x44), d = _mm512_shuffle_i32x4(v[2], v[3], 0xEE);
    v[0] = _mm512_shuffle_i32x4(a, c, 0x88);
    v[1] = _mm512_shuffle_i32x4(a, c, 0xDD);
    v[2] = _mm512_shuffle_i32x4(b, d, 0x88);
    v[3] = _mm512_shuffle_i32x4(b, d, 0xDD);
}

// 16 columns of a panel, K contiguous: to[pair] is 16 columns x 2 of K, `stride` elements after to[pair - 1].
//
// ahead  bytes from these codes to those that are packed after the next product, which are asked for meanwhile: a
//        weight that comes from memory then costs no time where the product takes longer
inline void pack_16_cols(uint16_t* to, int64_t stride, const uint8_t* codes, int64_t row_stride, int64_t cols,
                         int64_t depth, const Bf16Decoder& decoder, int64_t ahead = 0) {
    for (int64_t k = 0; k < depth; k += 64) {
        const __mmask64 mask = first_bytes(depth - k);
        __m512i v[4][4];  // v[i][c]: lane l is column 4 l + i, codes k + 16 c .. k + 16 c + 15
        for (int64_t i = 0; i < 4; ++i) {
            for (int64_t l = 0; l < 4; ++l) {
                const int64_t col = 4 * l + i;
                const uint8_t* from = codes + col * row_stride + k;
                if (ahead) _mm_prefetch(reinterpret_cast<const char*>(from + ahead), _MM_HINT_T1);
                v[i][l] = col < cols ? _mm512_maskz_loadu_epi8(mask, from) : _mm512_setzero_si512();
            }
            transpose_lanes(v[i]);
        }
        const int64_t pairs = depth - k >= 64 ? 32 : (depth - k + 1) / 2;
        for (int64_t c = 0; c < 4; ++c) {
            const __m512i a = _mm512_unpacklo_epi16(v[0][c], v[1][c]), b = _mm512_unpacklo_epi16(v[2][c], v[3][c]);
            const __m512i e = _mm512_unpackhi_epi16(v[0][c], v[1][c]), f = _mm512_unpackhi_epi16(v[2][c], v[3][c]);
            const __m512i two[4] = {_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b),  // each two pairs of K
                                    _mm512_unpacklo_epi32(e, f), _mm512_unpackhi_epi32(e, f)};
            for (int64_t t = 0; t < 4; ++t) {
                const int64_t pair = 8 * c + 2 * t;
                const Bytes bytes = decoder.bytes(two[t]);
                if (pair < pairs) _mm512_store_si512(to + (k / 2 + pair) * stride, first_halves(bytes));
                if (pair + 1 < pairs) _mm512_store_si512(to + (k / 2 + pair + 1) * stride, second_halves(bytes));
            }
        }
    }
}

// A panel of up to 64 columns with the columns contiguous: two of K at a time.
inline void pack_cols_transposed(uint16_t* to, int64_t width, const uint8_t* codes, int64_t col_stride, int64_t cols,
                                 int64_t depth, const Bf16Decoder& decoder) {
    const __mmask64 mask = first_bytes(cols);
    alignas(64) uint8_t order[2][64];  // [h][l, half, i, which of K]: from the first or second 32 columns
    for (int h = 0; h < 2; ++h) {
        for (int at = 0; at < 64; ++at) {
            const int lane = at / 16, half = at / 8 % 2, i = at / 2 % 4, second = at % 2;
            order[h][at] = static_cast<uint8_t>(64 * second + 32 * h + 16 * half + 4 * lane + i);
        }
    }
    const __m512i order0 = _mm512_load_si512(order[0]), order1 = _mm512_load_si512(order[1]);
    for (int64_t k = 0; k < depth; k += 2) {
        const __m512i a = _mm512_maskz_loadu_epi8(mask, codes + k * col_stride);
        const __m512i b =
            k + 1 < depth ? _mm512_maskz_loadu_epi8(mask, codes + (k + 1) * col_stride) : _mm512_setzero_si512();
        uint16_t* row = to + k * width;
        const Bytes left = decoder.bytes(_mm512_permutex2var_epi8(a, order0, b));
        _mm512_store_si512(row, first_halves(left));
        if (width > 16) _mm512_store_si512(row + 32, second_halves(left));
        if (width > 32) {
            const Bytes right = decoder.bytes(_mm512_permutex2var_epi8(a, order1, b));
            _mm512_store_si512(row + 64, first_halves(right));
            if (width > 48) _mm512_store_si512(row + 96, second_halves(right));
        }
    }
}

}  // namespace
}  // namespace fp8kernels
