// Launching a kernel, and its dynamic shared memory: the two places where CUDA's syntax is not C++.
//
// With FP8K_EMULATE the same kernels run on the host: tests/emulate stands in for the CUDA runtime there.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace fp8kernels {

struct Grid {
    unsigned x = 1, y = 1, z = 1;
};

constexpr size_t kSharedByDefault = 48 << 10;  // bytes of dynamic shared memory that need no asking

// Starts a kernel on a stream (a cudaStream_t) and returns a cudaError_t; a grid without blocks starts nothing.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), Grid grid, unsigned threads, size_t shared, void* stream,
           Arguments&&... arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
#ifdef FP8K_EMULATE
    (void)stream;
    emulate::run({grid.x, grid.y, grid.z}, threads, shared, [&] { kernel(static_cast<Parameters>(arguments)...); });
    return cudaSuccess;
#else
    if (shared > kSharedByDefault) {
        const auto error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
        if (error != cudaSuccess) return error;
    }
    kernel<<<dim3(grid.x, grid.y, grid.z), threads, shared, static_cast<cudaStream_t>(stream)>>>(
        static_cast<Parameters>(arguments)...);
    return cudaGetLastError();
#endif
}

// The dynamic shared memory of this block, at a multiple of 1024 bytes.
__device__ inline uint8_t* dynamic_shared() {
#ifdef FP8K_EMULATE
    return emulate::dynamic_shared();
#else
    extern __shared__ __align__(1024) uint8_t fp8k_dynamic_shared[];
    return fp8k_dynamic_shared;
#endif
}

}  // namespace fp8kernels
