// The order of work of dequantize, the same for every instruction set; included by one file for each of them.
//
// A run is what lies in one row of memory under one scale. For a long run, all 256 products are made once and the codes
// look them up; for a short one, the codes' values are looked up and multiplied.
//
// `Kernel` gives, for one output type:
//   T                                                                  the element of out
//   Values(FormatId)                                                   what the codes of a format stand for
//   static void multiply(const uint8_t* codes, T* out, int64_t n, float scale, const Values& values, bool stream)
//   static constexpr bool kLooksUp                                     whether there is
//   static void look_up(const uint8_t* codes, T* out, int64_t n, const T* products, bool stream)
//   static T narrow(float)
//   static void finish(bool stream)                                    after the last call of a thread
#pragma once

#include "cpu/pages.h"
#include "cpu/parallel.h"
#include "dequantize/dequantize.h"

namespace fp8kernels {
namespace {

constexpr int64_t kPiece = 1 << 15;    // elements a thread takes at a time
constexpr int64_t kLongRun = 1 << 11;  // elements from which a table of 256 products pays
constexpr int64_t kStream = 32 << 20;  // bytes; a larger result would not stay in the cache anyway

template <class Kernel>
void run(const DequantizeArgs& args) {
    using T = typename Kernel::T;
    int64_t rows = args.rows, cols = args.cols, stride = args.row_stride;
    if (args.grid_cols == 1 && stride == cols) {  // a block is one run of memory
        rows = args.grid_rows;
        stride = cols = args.rows / args.grid_rows * cols;
    }
    const int64_t block_rows = rows / args.grid_rows, block_cols = cols / args.grid_cols;
    // A unit is a piece of a long run, or several short runs of one row.
    const bool is_long = block_cols >= kLongRun;
    const int64_t wide = is_long ? kPiece : kPiece / block_cols * block_cols;
    const int64_t cells = is_long ? args.grid_cols : 1;               // of a row: what units do not cross
    const int64_t cell = cols / cells;                                // elements
    const int64_t units = (cell + wide - 1) / wide;                   // in a cell
    const int64_t grain = wide < cell ? 1 : (kPiece - 1) / cell + 1;  // short rows go together
    T* const out = static_cast<T*>(args.out);
    const bool stream = args.rows * args.cols * static_cast<int64_t>(sizeof(T)) >= kStream;
    if (stream) advise_huge_pages(out, static_cast<size_t>(args.rows * args.cols) * sizeof(T));
    const float* values = decode_table(args.fmt);

    parallel_ranges(args.threads, rows * cells * units, grain, [&](int64_t begin, int64_t end) {
        const typename Kernel::Values decoder(args.fmt);
        alignas(64) T products[256];
        const float* made_for = nullptr;
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t row = unit / (cells * units), first = unit / units % cells * cell;
            const int64_t from = first + unit % units * wide;
            const int64_t to = first + cell < from + wide ? first + cell : from + wide;
            const uint8_t* codes = args.codes + row * stride;
            const float* scale = args.scale + row / block_rows * args.grid_cols + from / block_cols;
            if (is_long && Kernel::kLooksUp) {
                if (scale != made_for) {
                    for (int code = 0; code < 256; ++code) products[code] = Kernel::narrow(values[code] * *scale);
                    made_for = scale;
                }
                Kernel::look_up(codes + from, out + row * cols + from, to - from, products, stream);
            } else {
                const int64_t run = is_long ? to - from : block_cols;
                for (int64_t c = from; c < to; c += run) {
                    Kernel::multiply(codes + c, out + row * cols + c, run, *scale++, decoder, stream);
                }
            }
        }
        Kernel::finish(stream);
    });
}

}  // namespace
}  // namespace fp8kernels
