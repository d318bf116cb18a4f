// How a product is cut: into one part a thread, and each part into blocks that fit the caches.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gemm/gemm.h"

namespace fp8kernels {
namespace {  // every instruction set compiles its own copy: nothing built for AVX-512 may be linked into the others

constexpr int64_t kMaxDepth = 2048;  // elements of K in a block: a panel of 48 bf16 columns takes 192 KiB of L2
constexpr int64_t kMaxCols = 1056;   // columns in a block: its panels of w take at most 4 MiB of L3 a thread
constexpr int64_t kMaxRows = 2048;   // rows in a block: those that share packed panels and have partial sums
constexpr int64_t kRowBytes =
    544 * 1024;  // bytes of unpacked rows of x (128 of 2048), which stay in L2 beside a panel of w
constexpr int64_t kAlign = 64;

// Relative costs, measured on Zen 4, in cycles for 64 codes or 64 products.
constexpr int64_t kPackRowCost = 10;
constexpr int64_t kPackColCost = 20;
constexpr int64_t kProductCost = 2;
// Products below which another thread is not worth waking; an estimate of 20 us of work, not a measured optimum.
constexpr int64_t kGrain = 1 << 17;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// The tile that a kernel computes in registers.
struct TileShape {
    int64_t rows;
    int64_t cols;
    int64_t col_step;  // a panel's width is a multiple of this
    int64_t bytes;     // of an unpacked element
};

struct Plan {
    int64_t row_parts, col_parts;  // parts of M and of N; a part is what one thread does
    int64_t part_rows, part_cols;
    int64_t segment;   // elements of K that share both scales
    int64_t depth;     // elements of K in a block
    int64_t rows;      // rows in a block
    int64_t cols;      // columns in a block
    int64_t unpacked;  // rows of x unpacked at once
    int64_t panel;     // elements from one packed panel of w to the next; 0 when one buffer serves them all
    int64_t x_stride;  // elements between two unpacked rows of x
    size_t x_at, w_at, x_scale_at, w_scale_at, bias_at, sum_at;  // where the buffers of a part begin, in bytes
    size_t part_bytes;

    int64_t segments() const { return divide_up(depth, segment); }
    int64_t parts() const { return row_parts * col_parts; }
};

// Chooses rows x cols of parts: the cheapest split, counting that every part unpacks its own operands.
inline void choose_parts(Plan& plan, const GemmArguments& a, const TileShape& tile) {
    const int64_t worth = a.rows * a.cols * a.depth / kGrain;
    const int64_t threads = worth < 1 ? 1 : (worth < a.threads ? worth : a.threads);
    int64_t best = -1;
    for (int64_t row_parts = 1; row_parts <= threads; ++row_parts) {
        const int64_t col_parts = threads / row_parts;
        const int64_t rows = round_up(divide_up(a.rows, row_parts), tile.rows);
        const int64_t cols = round_up(divide_up(a.cols, col_parts), tile.col_step);
        const int64_t cost = rows * cols * kProductCost + rows * kPackRowCost * divide_up(cols, kMaxCols) +
                             cols * kPackColCost * divide_up(rows, kMaxRows);
        if (best >= 0 && cost >= best) continue;
        best = cost;
        plan.part_rows = rows;
        plan.part_cols = cols;
        plan.row_parts = divide_up(a.rows, rows);
        plan.col_parts = divide_up(a.cols, cols);
    }
}

inline Plan make_plan(const GemmArguments& a, const TileShape& tile) {
    Plan plan{};
    choose_parts(plan, a, tile);
    plan.segment = gemm_segment(a);
    if (plan.segment < a.depth) {
        const int64_t in_block = kMaxDepth / plan.segment;
        plan.depth = plan.segment * (in_block < 1 ? 1 : in_block);
    } else {  // even blocks, cut where a vector of codes ends
        plan.depth = round_up(divide_up(a.depth, divide_up(a.depth, kMaxDepth)), kAlign);
    }
    if (plan.depth > a.depth) plan.depth = a.depth;
    if (plan.segment > plan.depth) plan.segment = plan.depth;
    plan.x_stride = round_up(plan.depth, 64) + 32;  // not a multiple of 4 KiB: the rows of a tile lie in different sets

    const int64_t fitting = kRowBytes / (plan.x_stride * tile.bytes) / tile.rows * tile.rows;
    plan.rows = plan.part_rows < kMaxRows ? plan.part_rows : kMaxRows;
    plan.unpacked = fitting < tile.rows ? tile.rows : (fitting < plan.rows ? fitting : plan.rows);
    plan.cols = round_up(divide_up(plan.part_cols, divide_up(plan.part_cols, kMaxCols)), tile.cols);
    plan.panel = plan.unpacked < plan.rows ? tile.cols * round_up(plan.depth, 2) : 0;
    const int64_t panels = plan.panel > 0 ? plan.cols / tile.cols : 1;

    size_t at = 0;
    const auto take = [&at](int64_t bytes) {
        const size_t begin = at;
        at += static_cast<size_t>(round_up(bytes, kAlign));
        return begin;
    };
    const int64_t floats = sizeof(float);
    plan.x_at = take(plan.unpacked * plan.x_stride * tile.bytes);
    plan.w_at = take(panels * tile.cols * round_up(plan.depth, 64) * tile.bytes);
    plan.x_scale_at = take(plan.segments() * plan.unpacked * floats);
    plan.w_scale_at = take(plan.segments() * plan.cols * floats);
    plan.bias_at = take(plan.cols * floats);
    plan.sum_at = take(plan.depth < a.depth ? plan.rows * plan.cols * floats : 0);
    plan.part_bytes = at;
    return plan;
}

}  // namespace
}  // namespace fp8kernels
