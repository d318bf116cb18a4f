// dequantize: 8-bit codes and their scales back to numbers.
#pragma once

#include <cstdint>

#include "formats/format.h"

namespace fp8kernels {

enum class OutputType : int { fp32 = 0, bf16 = 1, fp16 = 2 };

// A matrix of codes [rows, cols] whose rows are contiguous, cut into a grid of equal blocks.
struct DequantizeArgs {
    const uint8_t* codes;
    int64_t rows, cols;
    int64_t row_stride;            // of codes, in elements; out is dense
    int64_t grid_rows, grid_cols;  // they divide rows and cols
    const float* scale;            // [grid_rows, grid_cols]
    void* out;                     // [rows, cols]
    OutputType type;
    FormatId fmt;
    int threads;
};

// out = code * scale: one fp32 product, rounded once more to the type of out. rows and cols are at least 1.
void dequantize(const DequantizeArgs& args);

// The same, one instruction set each; dequantize() calls the one for current_isa().
void dequantize_portable(const DequantizeArgs& args);
void dequantize_avx512(const DequantizeArgs& args);

}  // namespace fp8kernels
