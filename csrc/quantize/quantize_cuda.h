// quantize on a GPU: quantize.h with device pointers, on a stream.
#pragma once

#include "quantize/quantize.h"
#include "quantize/workspace.h"

namespace fp8kernels {

// What a GPU needs beside QuantizeArgs, whose `threads` it does not read.
struct QuantizeOnGpu {
    uint8_t* codes_t;  // [cols, rows], the codes transposed; or null
    float* pending;    // [1] and int64 [4], as in observe(); or null
    int64_t* counters;
    Workspace* workspace;  // zeroed; is left zeroed
    int processors;        // multiprocessors of the GPU
    void* stream;          // a cudaStream_t
};

// Writes all that quantize(), transpose_bytes() and observe() do; the bits are theirs. Returns a cudaError_t.
int quantize_cuda(const QuantizeArgs& args, const QuantizeOnGpu& gpu);

}  // namespace fp8kernels
