// act_quantize on a GPU: activation(x), or activation(x) * other, straight to codes.
#pragma once

#include "activation/activation.h"
#include "quantize/quantize_cuda.h"

namespace fp8kernels {

struct ActArgs {
    Activation activation;
    const void* other;  // [rows, cols], or null
    InputType other_type;
    int64_t other_stride;  // elements from row to row
};

// Codes of activation(x) * other, and all that quantize_cuda() writes, where `args` describes x. The blocks of scales
// are the tensor, its rows, or 1x128. Returns a cudaError_t.
int act_quantize_cuda(const QuantizeArgs& args, const QuantizeOnGpu& gpu, const ActArgs& act);

}  // namespace fp8kernels
