#include "quantize/quantize.h"

#include <cstring>
#include <initializer_list>

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace fp8kernels {

void quantize(const QuantizeArgs& args) {
#if FP8KERNELS_X86
    if (current_isa() == Isa::avx512) return quantize_avx512(args);
    if (current_isa() == Isa::avx2) return quantize_avx2(args);
#endif
    quantize_portable(args);
}

void observe(const QuantizeArgs& args, float* pending, int64_t* counters) {
    uint32_t worst = 0;
    for (int64_t b = 0; b < args.grid_rows * args.grid_cols; ++b) {
        const uint32_t bits = bits_from_float(args.amax[b]);
        worst = bits > worst ? bits : worst;
    }
    if (worst < kInfBits && float_from_bits(worst) > *pending) *pending = float_from_bits(worst);
    for (int i = 0; i < 4; ++i) counters[i] += args.counts[i];
}

namespace {

// Eight rows of eight bytes: swap bytes, then pairs, then quadruples across the diagonal.
void transpose_8x8(const uint8_t* from, int64_t from_stride, uint8_t* to, int64_t to_stride) {
    uint64_t row[8];
    for (int i = 0; i < 8; ++i) std::memcpy(&row[i], from + i * from_stride, 8);
    const auto swap = [&](int a, int b, int shift, uint64_t low) {
        const uint64_t change = ((row[a] >> shift) ^ row[b]) & low;
        row[b] ^= change;
        row[a] ^= change << shift;
    };
    for (int i = 0; i < 8; i += 2) swap(i, i + 1, 8, 0x00FF00FF00FF00FFull);
    for (int i : {0, 1, 4, 5}) swap(i, i + 2, 16, 0x0000FFFF0000FFFFull);
    for (int i = 0; i < 4; ++i) swap(i, i + 4, 32, 0x00000000FFFFFFFFull);
    for (int i = 0; i < 8; ++i) std::memcpy(to + i * to_stride, &row[i], 8);
}

}  // namespace

void transpose_bytes(const uint8_t* from, uint8_t* to, int64_t rows, int64_t cols, int threads) {
    constexpr int64_t kTile = 64;  // both sides of a tile are whole cache lines
    const int64_t down = (rows + kTile - 1) / kTile, across = (cols + kTile - 1) / kTile;
    parallel_ranges(threads, down * across, 16, [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile) {
            // tiles that follow each other fill the same rows of `to`
            const int64_t r0 = tile % down * kTile, c0 = tile / down * kTile;
            const int64_t r1 = r0 + kTile < rows ? r0 + kTile : rows, c1 = c0 + kTile < cols ? c0 + kTile : cols;
            const int64_t whole_rows = r0 + (r1 - r0) / 8 * 8, whole_cols = c0 + (c1 - c0) / 8 * 8;
            for (int64_t c = c0; c < whole_cols; c += 8) {
                for (int64_t r = r0; r < whole_rows; r += 8)
                    transpose_8x8(from + r * cols + c, cols, to + c * rows + r, rows);
            }
            for (int64_t r = r0; r < r1; ++r) {
                for (int64_t c = r < whole_rows ? whole_cols : c0; c < c1; ++c) to[c * rows + r] = from[r * cols + c];
            }
        }
    });
}

}  // namespace fp8kernels
