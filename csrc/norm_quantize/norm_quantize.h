// norm_quantize on a GPU: RMSNorm or LayerNorm of every row, straight to codes.
#pragma once

#include "quantize/quantize_cuda.h"

namespace fp8kernels {

// y = (x - mean) * rstd * (weight + offset) + bias, in fp32.
struct NormArgs {
    const void* weight;  // [cols], or null
    InputType weight_type;
    const void* bias;  // [cols], or null
    InputType bias_type;
    float eps, offset;
    bool center;  // LayerNorm, else RMSNorm: no mean
    float* rstd;  // [rows]
    float* mean;  // [rows], or null without center
};

// Codes of y, and all that quantize_cuda() writes, where `args` describes x. The blocks of scales are the tensor, its
// rows, or 1x128. Returns a cudaError_t.
int norm_quantize_cuda(const QuantizeArgs& args, const QuantizeOnGpu& gpu, const NormArgs& norm);

}  // namespace fp8kernels
