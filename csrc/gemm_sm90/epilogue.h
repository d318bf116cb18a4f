// What a gemm on a GPU does with a sum before it is written, in the words of host and device.
#pragma once

#include <cstdint>

#include "activation/activation.h"
#include "formats/format.h"

namespace fp8kernels {

// The numbers that kernels/gemm/cuda.py knows them by.
enum class NumberType : int { fp32 = 0, bf16 = 1, fp16 = 2 };

struct GemmEpilogue {
    const float* x_scale;  // of row m: x_scale[m * x_scale_step]; null: 1
    int64_t x_scale_step;
    const float* w_scale;  // of column n, likewise
    int64_t w_scale_step;
    const void* bias;  // [N], or null
    NumberType bias_type;
    const void* residual;  // [M, N] with rows residual_stride elements apart, or null
    NumberType residual_type;
    int64_t residual_stride;
    Activation activation;
    void* out;  // [M, N], dense: numbers of out_type, or codes
    NumberType out_type;
    bool writes_codes;
    // of the codes:
    FormatId format;
    bool saturate;
    int carrier;  // k, and has_carrier: codes are E4M3 codes of HiF8 values * 2^k
    bool has_carrier;
    const float* out_scale;      // [1], positive
    unsigned* amax;              // [1], bits of fp32, raised; NaN over Inf over numbers
    unsigned long long* counts;  // [4]: elements, saturated, flushed, not finite; the last three are added to
    int64_t m, n;                // of out
};

}  // namespace fp8kernels
