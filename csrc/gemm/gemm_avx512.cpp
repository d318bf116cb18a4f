// gemm with AVX-512 BF16 and VBMI: blocked, or streaming the weights when x has few rows.
#include "gemm/levels.h"
#include "gemm/pack_avx512.h"
#include "gemm/stream_avx512.h"
#include "gemm/tile_avx512.h"

namespace fp8kernels {
namespace {

struct Avx512 {
    using Element = uint16_t;  // bf16
    using Decoder = Bf16Decoder;
    static constexpr TileShape kTile{8, 48, 16, sizeof(Element)};

    static void pack_rows(Element* to, int64_t stride, const uint8_t* codes, int64_t row_stride, int64_t col_stride,
                          int64_t rows, int64_t depth, const Decoder& decoder) {
        if (col_stride == 1) return unpack_rows(to, stride, codes, row_stride, rows, depth, decoder);
        unpack_rows_transposed(to, stride, codes, col_stride, rows, depth, decoder);
    }

    static void pack_cols(Element* to, const uint8_t* codes, int64_t row_stride, int64_t col_stride, int64_t cols,
                          int64_t depth, const Decoder& decoder) {
        const int64_t width = round_up(cols, 16);
        if (col_stride != 1) return pack_cols_transposed(to, width, codes, col_stride, cols, depth, decoder);
        for (int64_t j = 0; j < cols; j += 16) {
            pack_16_cols(to + 2 * j, 2 * width, codes + j * row_stride, row_stride, cols - j < 16 ? cols - j : 16,
                         depth, decoder, cols * row_stride);
        }
    }

    static void tile(const Tile<Element>& t) {
        switch ((t.cols + 15) / 16) {
            case 1: return tile_of_width<1>(t);
            case 2: return tile_of_width<2>(t);
            default: return tile_of_width<3>(t);
        }
    }
};

}  // namespace

size_t gemm_workspace_avx512(const GemmArguments& a) {
    return streams(a) ? stream_workspace(a) : blocked_workspace<Avx512>(a);
}

void gemm_avx512(const GemmArguments& a, void* workspace) {
    if (streams(a)) return stream_gemm(a, workspace);
    blocked_gemm<Avx512>(a, workspace);
}

}  // namespace fp8kernels
