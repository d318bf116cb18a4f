// quantize: numbers to 8-bit codes, with the scales, amax and counts seen on the way.
#pragma once

#include <cstdint>

#include "formats/format.h"
#include "quantize/carrier.h"
#include "scaling/rules.h"

namespace fp8kernels {

enum class InputType : int { fp32 = 0, bf16 = 1, fp16 = 2 };

// A matrix [rows, cols] whose rows are contiguous, cut into a grid of equal blocks.
struct QuantizeArgs {
    const void* x;
    InputType type;
    int64_t rows, cols;
    int64_t row_stride;            // of x, in elements; codes are dense
    int64_t grid_rows, grid_cols;  // they divide rows and cols
    const float* scale_in;         // [grid_rows, grid_cols], positive; 0: this block takes the scale of its own amax
    float* scale_out;              // [grid_rows, grid_cols]
    float* amax;                   // [grid_rows, grid_cols], the largest |x|; NaN over Inf over numbers
    uint8_t* codes;                // [rows, cols]
    int64_t* counts;               // [4] elements, saturated, flushed to zero, not finite
    FormatId fmt;
    float target;    // where the amax of a block without a scale is put
    ScaleRule rule;  // how its scale is made
    bool saturate;
    int threads;
    int carrier = kNoCarrier;  // or k (fmt is HiF8): codes are E4M3's of value * 2^k, scale_out is scale * 2^-k
};

// Writes scale_out, amax, codes and counts. rows and cols are at least 1.
void quantize(const QuantizeArgs& args);

// The same, one instruction set each; quantize() calls the one of current_isa().
void quantize_portable(const QuantizeArgs& args);
void quantize_avx2(const QuantizeArgs& args);
void quantize_avx512(const QuantizeArgs& args);

// Notes a result where the next commit finds it: pending = max(pending, amax) if the largest amax is a finite number,
// and counters[4] += counts.
void observe(const QuantizeArgs& args, float* pending, int64_t* counters);

// to[cols, rows] = from[rows, cols] transposed.
void transpose_bytes(const uint8_t* from, uint8_t* to, int64_t rows, int64_t cols, int threads);

}  // namespace fp8kernels
