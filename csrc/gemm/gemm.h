// gemm: out[M, N] = x[M, K] @ w[N, K].T (+ bias), both operands 8-bit codes with a grid of scales.
//
// Nothing here allocates: the caller asks for the size of the workspace and brings it. Each element of out is summed
// in the same order whatever the number of threads, so the bits of the result do not depend on it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats/format.h"

namespace fp8kernels {

// Codes [rows, K]. Element (r, k) is decoded by scale[r / (rows / scale_rows), k / (K / scale_cols)].
struct GemmOperand {
    const uint8_t* codes;
    int64_t row_stride;  // in elements; one of the two strides is 1
    int64_t col_stride;
    FormatId format;
    const float* scale;  // [scale_rows, scale_cols], contiguous
    int64_t scale_rows;  // divides the rows
    int64_t scale_cols;  // divides K; see gemm_segment
};

struct GemmArguments {
    GemmOperand x;     // [rows, depth]
    GemmOperand w;     // [cols, depth]
    int64_t rows;      // M
    int64_t cols;      // N
    int64_t depth;     // K
    const void* bias;  // [N], or null
    bool bias_bf16;    // else fp32
    void* out;         // [M, N], row-major
    bool out_bf16;     // else fp32
    int threads;
};

// Nearest even, as a bf16 number's bits.
static inline uint16_t rounded_to_bf16(float value) {
    const uint32_t bits = bits_from_float(value);
    if ((bits & kMagnitude) > kInfBits) return 0x7FC0;
    return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// How many neighbouring elements of K share both scales: the step at which the kernels apply them. It must be even,
// or all of K, because the dot-product instruction takes two elements at a time.
int64_t gemm_segment(const GemmArguments& arguments);

// Bytes of workspace that gemm() needs, for the instruction set in force.
size_t gemm_workspace(const GemmArguments& arguments);

// workspace  gemm_workspace() bytes, at any address
void gemm(const GemmArguments& arguments, void* workspace);

}  // namespace fp8kernels
