// act_backward on a GPU: the gradients of activation(x) * other.
#pragma once

#include <cstdint>

#include "activation/activation.h"
#include "quantize/quantize.h"

namespace fp8kernels {

// Matrices [rows, cols]; strides are elements from row to row, dx and dother are dense.
struct ActBackwardArgs {
    int64_t rows, cols;
    Activation activation;
    const void *dy, *x, *other;  // other may be null
    InputType dy_type, x_type, other_type;
    int64_t dy_stride, x_stride, other_stride;
    void* dx;      // of x_type
    void* dother;  // of other_type; null with other
    int processors;
};

// Runs on a stream (a cudaStream_t) and returns a cudaError_t.
int act_backward_cuda(const ActBackwardArgs& args, void* stream);

}  // namespace fp8kernels
