// x of few rows: w is read once, decoded in registers and multiplied there, so that the speed is that of memory.
//
// Each sum is a vector of 16 partial sums over K, added up at the end. The decoded bytes are used in the order in which
// they leave the unpack instructions, and x is put into the same order once.
#pragma once

#include "cpu/parallel.h"
#include "gemm/pack_avx512.h"
#include "gemm/tile_avx512.h"

namespace fp8kernels {
namespace {

constexpr int64_t kStreamRows = 8;    // rows of x up to which streaming is faster than packing
constexpr int64_t kStreamGrain = 16;  // columns; at least this many a thread
constexpr int64_t kPrefetch = 4096;   // bytes ahead in each row of w; the end of a row goes on in the next columns

struct Stream {
    const GemmArguments& a;
    const Bf16Decoder decoder;  // of w
    const uint16_t* x;          // [rows, x_stride], each 64 in the order of first_halves, second_halves
    int64_t x_stride;
    int64_t segment;
    bool wide;
};

inline int64_t stream_stride(const GemmArguments& a) { return round_up(a.depth, 64) + 32; }

inline bool streams(const GemmArguments& a) {
    const int64_t segment = gemm_segment(a);
    return a.rows <= kStreamRows && a.w.col_stride == 1 && (segment == a.depth || segment % 64 == 0);
}

// Puts each 64 numbers of a row into the order in which decoded bytes leave the unpack instructions.
inline void reorder(uint16_t* row, int64_t depth) {
    const __m512i first = _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13),
                  second = _mm512_setr_epi64(2, 3, 6, 7, 10, 11, 14, 15);
    for (int64_t k = 0; k < depth; k += 64) {
        const __m512i a = _mm512_load_si512(row + k), b = _mm512_load_si512(row + k + 32);
        _mm512_store_si512(row + k, _mm512_permutex2var_epi64(a, first, b));
        _mm512_store_si512(row + k + 32, _mm512_permutex2var_epi64(a, second, b));
    }
}

inline float scale_at(const GemmOperand& operand, int64_t row, int64_t rows, int64_t k, int64_t depth) {
    return operand.scale[row / (rows / operand.scale_rows) * operand.scale_cols + k / (depth / operand.scale_cols)];
}

inline void write(const GemmArguments& a, int64_t row, int64_t col, float value) {
    if (a.bias) {
        float bias;
        spread_bias(&bias, a, col, 1);
        value += bias;
    }
    const int64_t at = row * a.cols + col;
    if (a.out_bf16) {
        static_cast<uint16_t*>(a.out)[at] = rounded_to_bf16(value);
    } else {
        static_cast<float*>(a.out)[at] = value;
    }
}

// out[row .. row + kRows, col .. col + kCols].
template <int kRows, int kCols>
void stream_tile(const Stream& s, int64_t row, int64_t col) {
    const GemmArguments& a = s.a;
    const uint8_t* w = a.w.codes + col * a.w.row_stride;
    const uint16_t* x = s.x + row * s.x_stride;
    // The next columns begin where these end, as no prefetcher of the hardware can know: 4 rows of 4 KiB are too short
    // for it to find their pattern.
    const int64_t near = kPrefetch < a.depth ? kPrefetch : a.depth;
    const int64_t next = near - a.depth + kCols * a.w.row_stride;
    __m512 total[kCols][kRows];
    for (int64_t from = 0; from < a.depth; from += s.segment) {
        const int64_t end = from + s.segment;
        __m512 sum[kCols][kRows];
#pragma GCC unroll 4
        for (int j = 0; j < kCols; ++j) {
#pragma GCC unroll 8
            for (int i = 0; i < kRows; ++i) sum[j][i] = _mm512_setzero_ps();
        }
        for (int64_t k = from; k < end; k += 64) {
            const __mmask64 mask = first_bytes(end - k);
            const int64_t ahead = k + near < a.depth ? near : next;
#pragma GCC unroll 4
            for (int j = 0; j < kCols; ++j) {
                const uint8_t* codes = w + j * a.w.row_stride + k;
                _mm_prefetch(reinterpret_cast<const char*>(codes + ahead), _MM_HINT_T0);
                const Bytes bytes = s.decoder.bytes(_mm512_maskz_loadu_epi8(mask, codes));
                const __m512bh first = (__m512bh)first_halves(bytes), second = (__m512bh)second_halves(bytes);
#pragma GCC unroll 8
                for (int i = 0; i < kRows; ++i) {
                    const uint16_t* left = x + i * s.x_stride + k;
                    sum[j][i] = _mm512_dpbf16_ps(sum[j][i], first, (__m512bh)_mm512_load_si512(left));
                    sum[j][i] = _mm512_dpbf16_ps(sum[j][i], second, (__m512bh)_mm512_load_si512(left + 32));
                }
            }
        }
#pragma GCC unroll 4
        for (int j = 0; j < kCols; ++j) {
            const __m512 w_scale = _mm512_set1_ps(scale_at(a.w, col + j, a.cols, from, a.depth));
#pragma GCC unroll 8
            for (int i = 0; i < kRows; ++i) {
                const __m512 x_scale = _mm512_set1_ps(scale_at(a.x, row + i, a.rows, from, a.depth));
                const __m512 value = scaled(sum[j][i], x_scale, w_scale, s.wide);
                total[j][i] = from == 0 ? value : _mm512_add_ps(total[j][i], value);
            }
        }
    }
    for (int j = 0; j < kCols; ++j) {
        for (int i = 0; i < kRows; ++i) write(a, row + i, col + j, _mm512_reduce_add_ps(total[j][i]));
    }
}

// kCols columns of every row of x; w's codes stay in L1 between two groups of rows.
template <int kCols>
void stream_cols(const Stream& s, int64_t col) {
    int64_t row = 0;
    for (; row + 4 <= s.a.rows; row += 4) stream_tile<4, kCols>(s, row, col);
    switch (s.a.rows - row) {
        case 1: return stream_tile<1, kCols>(s, row, col);
        case 2: return stream_tile<2, kCols>(s, row, col);
        case 3: return stream_tile<3, kCols>(s, row, col);
        default: return;
    }
}

inline size_t stream_workspace(const GemmArguments& a) {
    return static_cast<size_t>(a.rows * stream_stride(a)) * sizeof(uint16_t) + kAlign;
}

inline void stream_gemm(const GemmArguments& a, void* workspace) {
    uint16_t* x = reinterpret_cast<uint16_t*>(round_up(reinterpret_cast<intptr_t>(workspace), kAlign));
    const int64_t stride = stream_stride(a);
    if (a.x.col_stride == 1) {
        unpack_rows(x, stride, a.x.codes, a.x.row_stride, a.rows, a.depth, Bf16Decoder(a.x.format));
    } else {
        unpack_rows_transposed(x, stride, a.x.codes, a.x.col_stride, a.rows, a.depth, Bf16Decoder(a.x.format));
    }
    for (int64_t i = 0; i < a.rows; ++i) reorder(x + i * stride, a.depth);
    const Stream stream{a, Bf16Decoder(a.w.format), x, stride, gemm_segment(a), !(is_tame(a.x) && is_tame(a.w))};
    const int64_t grain = kStreamGrain > kGrain / a.depth ? kStreamGrain : kGrain / a.depth;
    parallel_ranges(a.threads, a.cols, grain, [&stream](int64_t begin, int64_t end) {
        int64_t col = begin;
        for (; col + 4 <= end; col += 4) stream_cols<4>(stream, col);
        for (; col < end; ++col) stream_cols<1>(stream, col);
    });
}

}  // namespace
}  // namespace fp8kernels
