// norm_backward on a GPU: the gradients of RMSNorm and LayerNorm.
#pragma once

#include <cstddef>
#include <cstdint>

#include "quantize/quantize.h"

namespace fp8kernels {

constexpr int64_t kLongestNormRow = 16384;  // numbers: more would not fit the registers that sum dweight

// Matrices [rows, cols]; strides are elements from row to row, dx is dense.
struct NormBackwardArgs {
    int64_t rows, cols;  // cols <= kLongestNormRow
    const void *dy, *x;
    InputType dy_type, x_type;
    int64_t dy_stride, x_stride;
    const float* rstd;   // [rows]
    const float* mean;   // [rows]; null for RMSNorm
    const void* weight;  // [cols], or null
    InputType weight_type;
    float offset;   // added to weight
    void* dx;       // of x_type
    void* dweight;  // [cols] of weight_type, or null
    void* dbias;    // [cols] of bias_type, or null
    InputType bias_type;
    int processors;
};

// Bytes of the partial sums of dweight and dbias.
size_t norm_backward_workspace(const NormBackwardArgs& args);

// Runs on a stream (a cudaStream_t) and returns a cudaError_t.
//   workspace  norm_backward_workspace(args) bytes at a multiple of 16; contents do not matter
int norm_backward_cuda(const NormBackwardArgs& args, void* workspace, void* stream);

}  // namespace fp8kernels
