// gemm with AVX2 and FMA: 6 rows x 16 columns of fp32 sums in 12 registers.
#include <immintrin.h>

#include "gemm/levels.h"
#include "gemm/unpack_fp32.h"

namespace fp8kernels {
namespace {

constexpr int kTileRows = 6;
constexpr int kTileWidth = 16;

template <int kRows>
void dot_rows(float (&sum)[kTileRows][kTileWidth], const Tile<float>& t, int64_t from, int64_t depth) {
    const float* x = t.x + from;
    const float* w = t.w + from * kTileWidth;
    __m256 left[kRows], right[kRows];  // columns 0-7 and 8-15
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) left[i] = right[i] = _mm256_setzero_ps();
    for (int64_t k = 0; k < depth; ++k) {
        const __m256 a = _mm256_load_ps(w + k * kTileWidth);
        const __m256 b = _mm256_load_ps(w + k * kTileWidth + 8);
#pragma GCC unroll 6
        for (int i = 0; i < kRows; ++i) {
            const __m256 value = _mm256_broadcast_ss(x + i * t.x_stride + k);
            left[i] = _mm256_fmadd_ps(value, a, left[i]);
            right[i] = _mm256_fmadd_ps(value, b, right[i]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
        _mm256_store_ps(sum[i], left[i]);
        _mm256_store_ps(sum[i] + 8, right[i]);
    }
}

struct Avx2 {
    using Element = float;
    using Decoder = Fp32Decoder;
    static constexpr TileShape kTile{kTileRows, kTileWidth, kTileWidth, sizeof(Element)};

    static void pack_rows(Element* to, int64_t stride, const uint8_t* codes, int64_t row_stride, int64_t col_stride,
                          int64_t rows, int64_t depth, const Decoder& decoder) {
        unpack_rows_fp32(to, stride, codes, row_stride, col_stride, rows, depth, decoder);
    }

    static void pack_cols(Element* to, const uint8_t* codes, int64_t row_stride, int64_t col_stride, int64_t cols,
                          int64_t depth, const Decoder& decoder) {
        pack_cols_fp32<kTileWidth>(to, codes, row_stride, col_stride, cols, depth, decoder);
    }

    static void dot(float (&sum)[kTileRows][kTileWidth], const Tile<float>& t, int64_t from, int64_t depth) {
        switch (t.rows) {
            case 1: return dot_rows<1>(sum, t, from, depth);
            case 2: return dot_rows<2>(sum, t, from, depth);
            case 3: return dot_rows<3>(sum, t, from, depth);
            case 4: return dot_rows<4>(sum, t, from, depth);
            case 5: return dot_rows<5>(sum, t, from, depth);
            default: return dot_rows<6>(sum, t, from, depth);
        }
    }

    static void tile(const Tile<Element>& t) { tile_fp32<kTileRows, kTileWidth>(t, dot); }
};

}  // namespace

size_t gemm_workspace_avx2(const GemmArguments& a) { return blocked_workspace<Avx2>(a); }

void gemm_avx2(const GemmArguments& a, void* workspace) { blocked_gemm<Avx2>(a, workspace); }

}  // namespace fp8kernels
