// copy: does nothing; the tutorial verb. One declaration a backend.
#pragma once

#include <cstddef>

namespace fp8kernels {

// to[0 .. bytes) = from[0 .. bytes); the ranges do not overlap.
void copy(const void* from, void* to, size_t bytes, int threads);

// The same on a GPU: device pointers, and the stream to run on (a cudaStream_t). Returns a cudaError_t.
int copy_cuda(const void* from, void* to, size_t bytes, void* stream);

}  // namespace fp8kernels
