// What the tests of the fused producers share: matrices of three types, and judging codes against intervals.
//
// A producer computes y in fp32 in an order of its own, so the test knows y within ±delta, derived from the errors of
// the fp32 operations. A code is right if its value lies between the codes of y - delta and y + delta.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"
#include "formats/fp8.h"
#include "formats/hif8.h"
#include "formats/inputs.h"
#include "quantize/quantize_cuda.h"

namespace fp8kernels {

constexpr double kUnit = 0x1p-24;  // half a last place of 1 in fp32

inline std::mt19937& rng() {
    static std::mt19937 generator(11);
    return generator;
}

// Numbers of one type in memory: rows `stride` elements apart, `offset` elements from a multiple of 16 bytes.
struct Numbers {
    InputType type;
    int64_t rows, cols, stride;
    std::vector<uint8_t> memory;
    uint8_t* first;

    Numbers(InputType t, int64_t r, int64_t c, int64_t more = 0, int offset = 0)
        : type(t), rows(r), cols(c), stride(c + more), memory(static_cast<size_t>((r * (c + more) + offset) * 4 + 32)) {
        first = memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16) % 16 + offset * size();
        std::normal_distribution<float> normal;
        for (int64_t i = 0; i < r * stride; ++i) set(i, normal(rng()));
    }

    int size() const { return type == InputType::fp32 ? 4 : 2; }

    void set(int64_t i, float value) {
        if (type == InputType::fp32) {
            reinterpret_cast<float*>(first)[i] = value;
        } else {
            const bool bf16 = type == InputType::bf16;
            reinterpret_cast<uint16_t*>(first)[i] = bf16 ? bf16_from_float(value) : fp16_from_float(value);
        }
    }

    double at(int64_t row, int64_t col) const {
        const int64_t i = row * stride + col;
        if (type == InputType::fp32) return reinterpret_cast<const float*>(first)[i];
        const uint16_t bits = reinterpret_cast<const uint16_t*>(first)[i];
        return type == InputType::bf16 ? float_from_bf16(bits) : float_from_fp16(bits);
    }

    // How far a number of this type may be from the fp32 number that it was rounded from.
    double rounding(double value) const {
        const double unit = type == InputType::fp32 ? kUnit : type == InputType::bf16 ? 0x1p-8 : 0x1p-11;
        const double smallest = type == InputType::fp32 ? 0x1p-149 : type == InputType::bf16 ? 0x1p-133 : 0x1p-24;
        return unit * std::fabs(value) + smallest;
    }
};

// y and how far the kernel's may be from it.
struct Result {
    double y, delta;
};

// Everything quantize_cuda() writes, and a guard behind the codes.
struct Outputs {
    int64_t rows, cols, grid_rows, grid_cols;
    std::vector<float> scale_in, scale_out, amax;
    std::vector<uint8_t> codes_memory, codes_t;
    uint8_t* codes;
    int64_t counts[4] = {-1, -1, -1, -1}, counters[4] = {10, 20, 30, 40};
    float pending = 0.25f;
    Workspace workspace{};

    Outputs(int64_t r, int64_t c, int64_t gr, int64_t gc, float scale)
        : rows(r),
          cols(c),
          grid_rows(gr),
          grid_cols(gc),
          scale_in(static_cast<size_t>(gr * gc), scale),
          scale_out(scale_in.size(), NAN),
          amax(scale_in.size(), NAN),
          codes_memory(static_cast<size_t>(r * c) + 32, 0xCB),
          codes_t(static_cast<size_t>(r * c), 0xCB) {
        codes = codes_memory.data() + (16 - reinterpret_cast<uintptr_t>(codes_memory.data()) % 16) % 16;
    }

    QuantizeArgs args(const Numbers& x, FormatId fmt, float target, int carrier = kNoCarrier) {
        QuantizeArgs a{};
        a.x = x.first, a.type = x.type;
        a.rows = rows, a.cols = cols, a.row_stride = x.stride;
        a.grid_rows = grid_rows, a.grid_cols = grid_cols;
        a.scale_in = scale_in.data(), a.scale_out = scale_out.data(), a.amax = amax.data();
        a.codes = codes;
        a.counts = counts;
        a.fmt = fmt, a.target = target;
        a.rule = {1.0f, false};
        a.saturate = true;
        a.carrier = carrier;
        return a;
    }

    QuantizeOnGpu gpu(bool transpose, int processors) {
        QuantizeOnGpu g{};
        g.codes_t = transpose ? codes_t.data() : nullptr;
        g.pending = &pending, g.counters = counters;
        g.workspace = &workspace;
        g.processors = processors;
        return g;
    }
};

inline uint8_t encode(FormatId fmt, float y) {
    const uint32_t bits = bits_from_float(y);
    return fmt == FormatId::hif8   ? HiF8::encode_bits(bits, true)
           : fmt == FormatId::e4m3 ? E4M3::encode_bits(bits, true)
                                   : E5M2::encode_bits(bits, true);
}

// The value of the code of y / scale, carried to E4M3 and back where there is a carrier.
inline double rounded(FormatId fmt, double y, int carrier) {
    const double value = decode_table(fmt)[encode(fmt, static_cast<float>(y))];
    if (carrier == kNoCarrier) return value;
    return decode_table(FormatId::e4m3)[encode(FormatId::e4m3, static_cast<float>(std::ldexp(value, carrier)))];
}

// Holds all that a producer has written against y[rows, cols].
inline void judge_producer(Outputs& out, const QuantizeArgs& args, const QuantizeOnGpu& gpu,
                           const std::vector<Result>& want, const char* what) {
    const FormatId written = args.carrier == kNoCarrier ? args.fmt : FormatId::e4m3;
    const float* values = decode_table(written);
    const int64_t rows = out.rows, cols = out.cols, block_rows = rows / out.grid_rows,
                  block_cols = cols / out.grid_cols;
    const double up = args.carrier == kNoCarrier ? 1.0 : std::ldexp(1.0, args.carrier);
    int64_t nonfinite = 0, flushed_least = 0, flushed_most = 0;
    double largest = 0.0, largest_delta = 0.0;
    for (int64_t b = 0; b < out.grid_rows * out.grid_cols; ++b) {
        const int64_t row0 = b / out.grid_cols * block_rows, col0 = b % out.grid_cols * block_cols;
        double most = 0.0, off = 0.0, finite = 0.0;
        for (int64_t i = 0; i < block_rows * block_cols; ++i) {
            const Result& r = want[(row0 + i / block_cols) * cols + col0 + i % block_cols];
            const double size = std::fabs(r.y);
            most = std::isnan(most) || std::isnan(size) ? NAN : std::max(most, size);
            if (std::isfinite(size)) {
                finite = std::max(finite, size);
                off = std::max(off, r.delta);
            } else {
                ++nonfinite;
            }
        }
        largest = std::isnan(largest) || std::isnan(most) ? NAN : std::max(largest, most);
        largest_delta = std::max(largest_delta, off);
        const double amax = out.amax[b], scale = out.scale_out[b] * up;
        CHECK(std::isnan(most)   ? std::isnan(amax)
              : std::isinf(most) ? amax == most
                                 : std::fabs(amax - most) <= off,
              "%s, block %lld: amax %g, not %g", what, (long long)b, amax, most);
        if (out.scale_in[b] != 0.0f) {
            CHECK(scale == out.scale_in[b], "%s, block %lld: scale %g, not %g", what, (long long)b, scale,
                  out.scale_in[b]);
        } else if (std::isfinite(most)) {
            CHECK(scale == scale_from_amax(out.amax[b], args.target, args.rule), "%s, block %lld: scale %g of amax %g",
                  what, (long long)b, scale, amax);
        } else {
            const double own = scale_from_amax(static_cast<float>(finite), args.target, args.rule);
            CHECK(std::fabs(scale - own) <= off / args.target + 4 * kUnit * own, "%s, block %lld: scale %g, not %g",
                  what, (long long)b, scale, own);
        }
        for (int64_t i = 0; i < block_rows * block_cols; ++i) {
            const int64_t row = row0 + i / block_cols, col = col0 + i % block_cols;
            const Result& r = want[row * cols + col];
            const double value = values[out.codes[row * cols + col]];
            if (std::isnan(r.y)) {
                CHECK(std::isnan(value), "%s at (%lld, %lld): %g, not NaN", what, (long long)row, (long long)col,
                      value);
                continue;
            }
            // one more unit for the quotient, and one for each number that is rounded to fp32 here
            const double delta = std::isinf(r.y) ? 0.0 : r.delta + 3 * kUnit * std::fabs(r.y);
            const double low = rounded(args.fmt, (r.y - delta) / scale, args.carrier);
            const double high = rounded(args.fmt, (r.y + delta) / scale, args.carrier);
            CHECK(low <= value && value <= high, "%s at (%lld, %lld): %g, not in %g .. %g, of %g +- %g", what,
                  (long long)row, (long long)col, value, low, high, r.y / scale, delta / scale);
            const bool is_exact = args.carrier == kNoCarrier;
            if (is_exact && std::isfinite(r.y)) {
                flushed_least += low == 0.0 && high == 0.0 && std::fabs(r.y) > delta;
                flushed_most += low <= 0.0 && high >= 0.0;
            }
            if (gpu.codes_t) {
                CHECK(out.codes_t[col * rows + row] == out.codes[row * cols + col], "%s at (%lld, %lld): transposed",
                      what, (long long)row, (long long)col);
            }
        }
    }
    CHECK(out.codes[rows * cols] == 0xCB, "%s: written behind the codes", what);
    CHECK(out.counts[0] == rows * cols, "%s: %lld elements", what, (long long)out.counts[0]);
    CHECK(out.counts[3] == nonfinite, "%s: %lld not finite, not %lld", what, (long long)out.counts[3],
          (long long)nonfinite);
    if (args.carrier == kNoCarrier) {
        CHECK(flushed_least <= out.counts[2] && out.counts[2] <= flushed_most, "%s: %lld flushed, not in %lld .. %lld",
              what, (long long)out.counts[2], (long long)flushed_least, (long long)flushed_most);
    }
    for (int i = 0; i < 4; ++i) {
        CHECK(out.counters[i] == 10 * (i + 1) + out.counts[i], "%s: counter %d", what, i);
    }
    if (std::isfinite(largest)) {
        CHECK(std::fabs(out.pending - std::max(largest, 0.25)) <= largest_delta, "%s: pending %g, not %g", what,
              out.pending, largest);
    } else {
        CHECK(out.pending == 0.25f, "%s: pending %g of a tensor that is not finite", what, out.pending);
    }
    const Workspace& w = out.workspace;
    CHECK(w.arrived == 0 && w.amax == 0 && w.finite == 0 && w.counts[1] == 0 && w.counts[2] == 0 && w.counts[3] == 0,
          "%s: the workspace is not left zeroed", what);
}

}  // namespace fp8kernels
