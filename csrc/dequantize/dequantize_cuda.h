// dequantize on a GPU: dequantize.h with device pointers, on a stream.
#pragma once

#include "dequantize/dequantize.h"

namespace fp8kernels {

// The bits are those of dequantize(); args.threads is not read. `processors`: multiprocessors of the GPU; `stream`: a
// cudaStream_t. Returns a cudaError_t.
int dequantize_cuda(const DequantizeArgs& args, int processors, void* stream);

}  // namespace fp8kernels
