// The loops around a register tile, the same for every instruction set (the scheme of BLIS, ACM TOMS 41 (3), 2015).
//
//   for each few rows of x: decode them                                     -> L2
//     for each panel of columns of w: decode and pack it, the first time    -> L3, or L2 if no more rows follow
//       for each tile of rows: Kernel::tile                                 -> registers
//
// K longer than a block is walked in blocks, with partial sums in fp32.
// A Kernel has: Element (what codes are unpacked to), kTile (its TileShape), Decoder(FormatId), pack_rows, pack_cols,
// tile.
#pragma once

#include "cpu/parallel.h"
#include "gemm/plan.h"

namespace fp8kernels {
namespace {

// One register tile: rows x cols of out, over one block of K.
template <class Element>
struct Tile {
    const Element* x;  // [rows, stride]
    int64_t x_stride;
    const Element* w;  // a panel, in the kernel's own order
    int64_t rows, cols;
    int64_t depth, segment;
    const float* x_scale;  // [segments, x_scale_stride]
    int64_t x_scale_stride;
    const float* w_scale;  // [segments, w_scale_stride]
    int64_t w_scale_stride;
    bool wide;          // the scales are so large or small that their product may leave the range of fp32
    const float* bias;  // of these columns, or null
    float* sum;         // partial sums of earlier blocks of K; a row has room for a whole panel
    int64_t sum_stride;
    bool first, last;  // block of K
    void* out;         // of this tile
    int64_t out_stride;
    bool out_bf16;
};

// Scales in this range, multiplied with each other and with any sum of products, neither overflow nor make denormals:
// sums of products of codes are multiples of 2^-44.
inline bool is_tame(const GemmOperand& operand) {
    const int64_t count = operand.scale_rows * operand.scale_cols;
    bool tame = true;
    for (int64_t i = 0; i < count; ++i) tame &= operand.scale[i] >= 0x1p-29f && operand.scale[i] <= 0x1p29f;
    return tame;
}

// to[segment, i] = the scale of row first + i in the segment, for `segments` segments from element `from` of K.
inline void spread_scales(float* to, int64_t stride, const GemmOperand& operand, int64_t all_rows, int64_t all_depth,
                          int64_t first, int64_t count, int64_t from, int64_t segment, int64_t segments) {
    const int64_t patch_rows = all_rows / operand.scale_rows;
    const int64_t patch_depth = all_depth / operand.scale_cols;
    for (int64_t s = 0; s < segments; ++s) {
        const float* column = operand.scale + (from + s * segment) / patch_depth;
        for (int64_t i = 0; i < count; ++i) to[s * stride + i] = column[(first + i) / patch_rows * operand.scale_cols];
    }
}

inline void spread_bias(float* to, const GemmArguments& a, int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        if (a.bias_bf16) {
            to[i] = float_from_bits(static_cast<uint32_t>(static_cast<const uint16_t*>(a.bias)[first + i]) << 16);
        } else {
            to[i] = static_cast<const float*>(a.bias)[first + i];
        }
    }
}

// The part of out that one thread makes: rows [row, row_end) x columns [col, col_end).
template <class Kernel>
class Part {
   public:
    using Element = typename Kernel::Element;

    Part(const GemmArguments& arguments, const Plan& plan, char* workspace, bool wide)
        : a(arguments), plan(plan), wide(wide), x_decoder(a.x.format), w_decoder(a.w.format) {
        x = reinterpret_cast<Element*>(workspace + plan.x_at);
        w = reinterpret_cast<Element*>(workspace + plan.w_at);
        x_scale = reinterpret_cast<float*>(workspace + plan.x_scale_at);
        w_scale = reinterpret_cast<float*>(workspace + plan.w_scale_at);
        bias = reinterpret_cast<float*>(workspace + plan.bias_at);
        sum = reinterpret_cast<float*>(workspace + plan.sum_at);
    }

    void run(int64_t row, int64_t row_end, int64_t col, int64_t col_end) {
        for (int64_t i = row; i < row_end; i += plan.rows) {
            for (int64_t j = col; j < col_end; j += plan.cols) {
                for (int64_t k = 0; k < a.depth; k += plan.depth) {
                    block(i, least(plan.rows, row_end - i), j, least(plan.cols, col_end - j), k,
                          least(plan.depth, a.depth - k));
                }
            }
        }
    }

   private:
    static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

    void block(int64_t row, int64_t rows, int64_t col, int64_t cols, int64_t from, int64_t depth) {
        const int64_t segments = divide_up(depth, plan.segment);
        spread_scales(w_scale, plan.cols, a.w, a.cols, a.depth, col, cols, from, plan.segment, segments);
        if (a.bias) spread_bias(bias, a, col, cols);

        Tile<Element> tile{};
        tile.x_stride = plan.x_stride;
        tile.depth = depth;
        tile.segment = least(plan.segment, depth);
        tile.x_scale_stride = plan.unpacked;
        tile.w_scale_stride = plan.cols;
        tile.wide = wide;
        tile.sum_stride = plan.cols;
        tile.first = from == 0;
        tile.last = from + depth == a.depth;
        tile.out_stride = a.cols;
        tile.out_bf16 = a.out_bf16;
        for (int64_t i = 0; i < rows; i += plan.unpacked) {
            const int64_t count = least(plan.unpacked, rows - i);
            Kernel::pack_rows(x, plan.x_stride, a.x.codes + (row + i) * a.x.row_stride + from * a.x.col_stride,
                              a.x.row_stride, a.x.col_stride, count, depth, x_decoder);
            spread_scales(x_scale, plan.unpacked, a.x, a.rows, a.depth, row + i, count, from, plan.segment, segments);
            for (int64_t j = 0; j < cols; j += Kernel::kTile.cols) {
                const uint8_t* codes = a.w.codes + (col + j) * a.w.row_stride + from * a.w.col_stride;
                Element* panel = w + j / Kernel::kTile.cols * plan.panel;
                tile.w = panel;
                tile.cols = least(Kernel::kTile.cols, cols - j);
                tile.w_scale = w_scale + j;
                tile.bias = a.bias ? bias + j : nullptr;
                const bool packs = i == 0;  // later rows find the panel packed
                if (packs) Kernel::pack_cols(panel, codes, a.w.row_stride, a.w.col_stride, tile.cols, depth, w_decoder);
                const bool fetches = packs && j + 2 * Kernel::kTile.cols <= cols;  // another whole panel follows
                for (int64_t r = 0; r < count; r += Kernel::kTile.rows) {
                    const int64_t end = least(r + Kernel::kTile.rows, count);
                    if (fetches) fetch_codes(codes + Kernel::kTile.cols * a.w.row_stride, depth, r, end, count);
                    tile.x = x + r * plan.x_stride;
                    tile.rows = end - r;
                    tile.x_scale = x_scale + r;
                    tile.sum = sum + (i + r) * plan.cols + j;
                    tile.out = static_cast<char*>(a.out) + ((row + i + r) * a.cols + col + j) * (a.out_bf16 ? 2 : 4);
                    Kernel::tile(tile);
                }
            }
        }
    }

    // Fetches a share of a panel's codes, [begin, end) of `all`, into L2, while other work hides the wait for memory.
    void fetch_codes(const uint8_t* codes, int64_t depth, int64_t begin, int64_t end, int64_t all) const {
        constexpr int64_t kLine = 64;
        if (a.w.col_stride == 1) {
            for (int64_t j = Kernel::kTile.cols * begin / all; j < Kernel::kTile.cols * end / all; ++j) {
                for (int64_t k = 0; k < depth; k += kLine) __builtin_prefetch(codes + j * a.w.row_stride + k, 0, 2);
            }
        } else {
            for (int64_t k = depth * begin / all; k < depth * end / all; ++k) {
                __builtin_prefetch(codes + k * a.w.col_stride, 0, 2);
            }
        }
    }

    const GemmArguments& a;
    const Plan& plan;
    const bool wide;
    const typename Kernel::Decoder x_decoder, w_decoder;
    Element* x;
    Element* w;
    float *x_scale, *w_scale, *bias, *sum;
};

template <class Kernel>
size_t blocked_workspace(const GemmArguments& a) {
    const Plan plan = make_plan(a, Kernel::kTile);
    return static_cast<size_t>(plan.parts()) * plan.part_bytes + kAlign;
}

template <class Kernel>
void blocked_gemm(const GemmArguments& a, void* workspace) {
    const Plan plan = make_plan(a, Kernel::kTile);
    const bool wide = !(is_tame(a.x) && is_tame(a.w));
    char* aligned = reinterpret_cast<char*>(round_up(reinterpret_cast<intptr_t>(workspace), kAlign));
    parallel_ranges(a.threads, plan.parts(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
            Part<Kernel> part(a, plan, aligned + static_cast<size_t>(p) * plan.part_bytes, wide);
            const int64_t row = p / plan.col_parts * plan.part_rows;
            const int64_t col = p % plan.col_parts * plan.part_cols;
            const int64_t row_end = row + plan.part_rows < a.rows ? row + plan.part_rows : a.rows;
            const int64_t col_end = col + plan.part_cols < a.cols ? col + plan.part_cols : a.cols;
            part.run(row, row_end, col, col_end);
        }
    });
}

}  // namespace
}  // namespace fp8kernels
