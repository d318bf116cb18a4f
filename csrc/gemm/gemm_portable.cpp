// gemm in plain C++, in a shape that compilers vectorise.
#include <cstring>

#include "gemm/levels.h"
#include "gemm/unpack_fp32.h"

namespace fp8kernels {
namespace {

struct Portable {
    using Element = float;
    using Decoder = Fp32Decoder;
    static constexpr int kRows = 4;
    static constexpr int kWidth = 8;
    static constexpr TileShape kTile{kRows, kWidth, kWidth, sizeof(Element)};

    static void pack_rows(Element* to, int64_t stride, const uint8_t* codes, int64_t row_stride, int64_t col_stride,
                          int64_t rows, int64_t depth, const Decoder& decoder) {
        unpack_rows_fp32(to, stride, codes, row_stride, col_stride, rows, depth, decoder);
    }

    static void pack_cols(Element* to, const uint8_t* codes, int64_t row_stride, int64_t col_stride, int64_t cols,
                          int64_t depth, const Decoder& decoder) {
        pack_cols_fp32<kWidth>(to, codes, row_stride, col_stride, cols, depth, decoder);
    }

    // All rows of a tile, also those past the edge, which repeat the last one: constant bounds are what vectorises.
    static void dot(float (&sum)[kRows][kWidth], const Tile<float>& t, int64_t from, int64_t depth) {
        const float* x[kRows];
        for (int i = 0; i < kRows; ++i) x[i] = t.x + (i < t.rows ? i : t.rows - 1) * t.x_stride + from;
        const float* w = t.w + from * kWidth;
        float row[kRows][kWidth] = {};
        for (int64_t k = 0; k < depth; ++k) {
            for (int i = 0; i < kRows; ++i) {
                for (int j = 0; j < kWidth; ++j) row[i][j] += x[i][k] * w[k * kWidth + j];
            }
        }
        std::memcpy(sum, row, sizeof row);
    }

    static void tile(const Tile<Element>& t) { tile_fp32<kRows, kWidth>(t, dot); }
};

}  // namespace

size_t gemm_workspace_portable(const GemmArguments& a) { return blocked_workspace<Portable>(a); }

void gemm_portable(const GemmArguments& a, void* workspace) { blocked_gemm<Portable>(a, workspace); }

}  // namespace fp8kernels
