#include <cuda_runtime.h>

#include "copy/copy.h"
#include "cuda/launch.cuh"

namespace fp8kernels {
namespace {

constexpr unsigned kThreads = 256;
constexpr size_t kMostBlocks = 1 << 20;  // a grid has fewer than 2^31

// One byte a thread and turn: plain, not fast.
__global__ void copy_kernel(const unsigned char* from, unsigned char* to, size_t bytes) {
    const size_t step = static_cast<size_t>(gridDim.x) * kThreads;
    for (size_t i = static_cast<size_t>(blockIdx.x) * kThreads + threadIdx.x; i < bytes; i += step) to[i] = from[i];
}

}  // namespace

int copy_cuda(const void* from, void* to, size_t bytes, void* stream) {
    const size_t blocks = (bytes + kThreads - 1) / kThreads;
    return launch(copy_kernel, Grid{static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks)}, kThreads, 0,
                  stream, static_cast<const unsigned char*>(from), static_cast<unsigned char*>(to), bytes);
}

}  // namespace fp8kernels
