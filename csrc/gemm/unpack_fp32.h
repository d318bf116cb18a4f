// Codes to fp32 by a table of 256 floats, and the end of a tile, for the instruction sets without byte look-ups.
#pragma once

#include "gemm/blocked.h"

namespace fp8kernels {
namespace {

struct Fp32Decoder {
    const float* table;

    explicit Fp32Decoder(FormatId format) : table(decode_table(format)) {}
};

// to[i, k], rows `stride` apart.
inline void unpack_rows_fp32(float* to, int64_t stride, const uint8_t* codes, int64_t row_stride, int64_t col_stride,
                             int64_t rows, int64_t depth, const Fp32Decoder& decoder) {
    if (col_stride == 1) {
        for (int64_t i = 0; i < rows; ++i) {
            for (int64_t k = 0; k < depth; ++k) to[i * stride + k] = decoder.table[codes[i * row_stride + k]];
        }
        return;
    }
    constexpr int64_t kLine = 64;  // codes of a cache line, read whole before the next
    for (int64_t first = 0; first < rows; first += kLine) {
        const int64_t end = first + kLine < rows ? first + kLine : rows;
        for (int64_t k = 0; k < depth; ++k) {
            for (int64_t i = first; i < end; ++i) to[i * stride + k] = decoder.table[codes[k * col_stride + i]];
        }
    }
}

// A panel to[k, kWidth]: every panel is whole, columns past the edge are zero.
template <int kWidth>
inline void pack_cols_fp32(float* to, const uint8_t* codes, int64_t row_stride, int64_t col_stride, int64_t cols,
                           int64_t depth, const Fp32Decoder& decoder) {
    constexpr int64_t kLine = 64;  // codes of a cache line: used up before other columns may push it out
    const int64_t step = col_stride == 1 ? kLine : 1;
    for (int64_t first = 0; first < depth; first += step) {
        const int64_t end = first + step < depth ? first + step : depth;
        for (int64_t j = 0; j < kWidth; ++j) {
            for (int64_t k = first; k < end; ++k) {
                to[k * kWidth + j] = j < cols ? decoder.table[codes[j * row_stride + k * col_stride]] : 0.0f;
            }
        }
    }
}

// value * x_scale * w_scale; in double, where no product of the three leaves the range, if they may in fp32.
inline float scaled(float value, float x_scale, float w_scale, bool wide) {
    if (!wide) return value * (x_scale * w_scale);
    return static_cast<float>(static_cast<double>(value) * x_scale * w_scale);
}

// A tile from a kernel's dot(sum[kRows][kWidth], tile, k, depth), which overwrites sum.
template <int kRows, int kWidth, class Dot>
inline void tile_fp32(const Tile<float>& t, const Dot& dot) {
    alignas(64) float sum[kRows][kWidth];
    alignas(64) float total[kRows][kWidth];
    for (int64_t i = 0; i < t.rows; ++i) {
        for (int64_t j = 0; j < kWidth; ++j) total[i][j] = t.first ? 0.0f : t.sum[i * t.sum_stride + j];
    }
    int64_t segment = 0;
    for (int64_t k = 0; k < t.depth; k += t.segment, ++segment) {
        dot(sum, t, k, t.depth - k < t.segment ? t.depth - k : t.segment);
        const float* w_scale = t.w_scale + segment * t.w_scale_stride;
        for (int64_t i = 0; i < t.rows; ++i) {
            const float x_scale = t.x_scale[segment * t.x_scale_stride + i];
            for (int64_t j = 0; j < t.cols; ++j) total[i][j] += scaled(sum[i][j], x_scale, w_scale[j], t.wide);
        }
    }
    for (int64_t i = 0; i < t.rows; ++i) {
        if (!t.last) {
            for (int64_t j = 0; j < kWidth; ++j) t.sum[i * t.sum_stride + j] = total[i][j];
        } else if (t.out_bf16) {
            uint16_t* out = static_cast<uint16_t*>(t.out) + i * t.out_stride;
            for (int64_t j = 0; j < t.cols; ++j) out[j] = rounded_to_bf16(total[i][j] + (t.bias ? t.bias[j] : 0.0f));
        } else {
            float* out = static_cast<float*>(t.out) + i * t.out_stride;
            for (int64_t j = 0; j < t.cols; ++j) out[j] = total[i][j] + (t.bias ? t.bias[j] : 0.0f);
        }
    }
}

}  // namespace
}  // namespace fp8kernels
