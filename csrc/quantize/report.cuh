// The end of a kernel that makes codes: what its threads have seen becomes the amax, the counts and the observer's
// state.
//
// Every block adds to a workspace; the last one to arrive writes the results and leaves the workspace zeroed, as it was
// found. So kernels that follow each other on a stream share one, and nothing has to be cleared in between.
#pragma once

#include "quantize/encode.cuh"
#include "quantize/workspace.h"

namespace fp8kernels {

// Where the results of a call go.
struct Report {
    Workspace* workspace;
    int64_t elements;
    int64_t* counts;    // [4]
    float* amax;        // [1], or null if each block of scales has its own
    float* pending;     // [1], raised to the largest amax if that is finite; or null
    int64_t* counters;  // [4], which the counts are added to; null with pending
};

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// The largest |x| of the block of threads, in all of them, as bits of fp32.
__device__ inline uint32_t block_largest(float size) {
    __shared__ uint32_t warps[32];
    const uint32_t most = __reduce_max_sync(kAllLanes, bits_from_float(size));
    __syncthreads();  // the last call has been read
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = most;
    __syncthreads();
    const unsigned lane = threadIdx.x % 32;
    return __reduce_max_sync(kAllLanes, lane < blockDim.x / 32 ? warps[lane] : 0u);
}

// Whether this block is the last one to come here, told to all its threads; what the others wrote before is then there.
__device__ inline bool last_to_arrive(Workspace* workspace) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(&workspace->arrived, 1u) + 1 == gridDim.x * gridDim.y;
    __syncthreads();
    if (last) __threadfence();
    return last;
}

// All threads call it, once, when their work is done; a block has a multiple of 32 threads.
__device__ inline void finish(const Report& to, const Tally& tally) {
    __shared__ unsigned sums[4];
    const unsigned lane = threadIdx.x % 32;
    if (threadIdx.x < 4) sums[threadIdx.x] = 0;
    __syncthreads();
    const unsigned amax = __reduce_max_sync(kAllLanes, bits_from_float(tally.amax));
    const unsigned saturated = __reduce_add_sync(kAllLanes, tally.saturated);
    const unsigned flushed = __reduce_add_sync(kAllLanes, tally.flushed);
    const unsigned nonfinite = __reduce_add_sync(kAllLanes, tally.nonfinite);
    if (lane == 0) {
        atomicMax(&sums[0], amax);
        if (saturated) atomicAdd(&sums[1], saturated);
        if (flushed) atomicAdd(&sums[2], flushed);
        if (nonfinite) atomicAdd(&sums[3], nonfinite);
    }
    __syncthreads();
    Workspace* all = to.workspace;
    if (threadIdx.x == 0) atomicMax(&all->amax, sums[0]);
    if (threadIdx.x > 0 && threadIdx.x < 4 && sums[threadIdx.x]) {
        atomicAdd(&all->counts[threadIdx.x], static_cast<unsigned long long>(sums[threadIdx.x]));
    }
    if (!last_to_arrive(all)) return;
    if (threadIdx.x == 0) {
        const unsigned worst = __ldcg(&all->amax);
        if (to.amax) *to.amax = float_from_bits(worst);
        // numbers that are not negative are ordered as their bits are
        if (to.pending && worst < kInfBits) atomicMax(reinterpret_cast<unsigned*>(to.pending), worst);
        all->amax = 0;
        all->arrived = 0;
    }
    if (threadIdx.x < 4) {
        const unsigned long long count =
            threadIdx.x == 0 ? static_cast<unsigned long long>(to.elements) : __ldcg(&all->counts[threadIdx.x]);
        to.counts[threadIdx.x] = static_cast<int64_t>(count);
        if (to.counters) atomicAdd(reinterpret_cast<unsigned long long*>(to.counters + threadIdx.x), count);
        all->counts[threadIdx.x] = 0;
    }
}

}  // namespace fp8kernels
