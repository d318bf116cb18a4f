// Stands in for CUDA's header of this name where kernels are compiled for the host (FP8K_EMULATE): see simt.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __shared__ static
#define __constant__ static const
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __restrict__ __restrict

using std::max;
using std::min;

// ---- host side ----

using cudaStream_t = void*;
using cudaError_t = int;
constexpr int cudaSuccess = 0, cudaErrorInvalidValue = 1;
inline int cudaGetLastError() { return cudaSuccess; }
inline int cudaGetDeviceCount(int* count) {
    *count = 0;
    return cudaSuccess;
}
inline const char* cudaGetErrorString(int) { return "no error"; }
inline int cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
    std::memset(to, value, bytes);
    return cudaSuccess;
}

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

// ---- where a thread is ----

struct EmulatedThread {
    struct {
        operator unsigned() const { return emulate::self().thread; }
    } x;
    unsigned y = 0, z = 0;
};
inline EmulatedThread emulated_thread;
#define threadIdx emulated_thread
#define blockIdx (emulate::block().index)
#define gridDim (emulate::block().grid)
#define blockDim (emulate::Index3{emulate::block().threads, 1, 1})
constexpr int warpSize = 32;

// ---- vectors ----

#define FP8K_VECTOR(name, type)                                                                 \
    struct name##2 { type x, y; };                                                              \
    struct alignas(sizeof(type) * 4 > 16 ? 16 : sizeof(type) * 4) name##4 { type x, y, z, w; }; \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                            \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
FP8K_VECTOR(float, float)
FP8K_VECTOR(int, int)
FP8K_VECTOR(uint, uint32_t)
FP8K_VECTOR(ushort, uint16_t)
FP8K_VECTOR(uchar, uint8_t)
#undef FP8K_VECTOR

// ---- threads together ----

inline void __syncthreads() { emulate::barrier(0, 0); }
inline void __syncwarp(uint32_t mask = 0xFFFFFFFFu) { emulate::show(mask, 0); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) {}
inline uint32_t __activemask() { return 0xFFFFFFFFu; }

namespace emulate {

template <class T>
uint64_t word_of(T value) {
    uint64_t word = 0;
    std::memcpy(&word, &value, sizeof value);
    return word;
}

template <class T>
T value_of(uint64_t word) {
    T value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

template <class T>
T shuffle(uint32_t mask, T value, int from, int width) {
    const int lane = static_cast<int>(self().thread % kWarp), base = lane / width * width;
    const bool inside = from >= base && from < base + width;
    return value_of<T>(show(mask, word_of(value))[inside ? from : lane]);
}

}  // namespace emulate

template <class T>
T __shfl_sync(uint32_t mask, T value, int from, int width = 32) {
    const int lane = static_cast<int>(threadIdx.x % 32u), base = lane / width * width;
    return emulate::shuffle(mask, value, base + (from & (width - 1)), width);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int other, int width = 32) {
    return emulate::shuffle(mask, value, static_cast<int>(threadIdx.x % 32u) ^ other, width);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned by, int width = 32) {
    return emulate::shuffle(mask, value, static_cast<int>(threadIdx.x % 32u + by), width);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned by, int width = 32) {
    return emulate::shuffle(mask, value, static_cast<int>(threadIdx.x % 32u) - static_cast<int>(by), width);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
    const uint64_t* words = emulate::show(mask, predicate != 0);
    uint32_t votes = 0;
    for (int i = 0; i < 32; ++i) votes |= static_cast<uint32_t>((mask >> i & 1) && words[i]) << i;
    return votes;
}
inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

namespace emulate {
template <class T, class Combine>
T reduce(uint32_t mask, T value, Combine combine) {
    const uint64_t* words = show(mask, word_of(value));
    bool first = true;
    T out{};
    for (int i = 0; i < kWarp; ++i) {
        if (!(mask >> i & 1) || self().thread / kWarp * kWarp + i >= block().threads) continue;
        out = first ? value_of<T>(words[i]) : combine(out, value_of<T>(words[i]));
        first = false;
    }
    return out;
}
}  // namespace emulate

template <class T>
T __reduce_add_sync(uint32_t mask, T value) {
    return emulate::reduce(mask, value, [](T a, T b) { return static_cast<T>(a + b); });
}
template <class T>
T __reduce_max_sync(uint32_t mask, T value) {
    return emulate::reduce(mask, value, [](T a, T b) { return a > b ? a : b; });
}
template <class T>
T __reduce_min_sync(uint32_t mask, T value) {
    return emulate::reduce(mask, value, [](T a, T b) { return a < b ? a : b; });
}
template <class T>
T __reduce_or_sync(uint32_t mask, T value) {
    return emulate::reduce(mask, value, [](T a, T b) { return static_cast<T>(a | b); });
}

// ---- atomics: there is one thread at a time ----

#define FP8K_ATOMIC(name, expression)                     \
    template <class T, class V>                           \
    T name(T* at, V given) {                              \
        const T old = *at, value = static_cast<T>(given); \
        *at = expression;                                 \
        return old;                                       \
    }
FP8K_ATOMIC(atomicAdd, old + value)
FP8K_ATOMIC(atomicMax, old > value ? old : value)
FP8K_ATOMIC(atomicMin, old < value ? old : value)
FP8K_ATOMIC(atomicOr, old | value)
FP8K_ATOMIC(atomicExch, value)
#undef FP8K_ATOMIC
inline unsigned atomicInc(unsigned* at, unsigned last) {
    const unsigned old = *at;
    *at = old >= last ? 0 : old + 1;
    return old;
}
template <class T>
T atomicCAS(T* at, T expected, T value) {
    const T old = *at;
    if (old == expected) *at = value;
    return old;
}

// ---- memory and arithmetic ----

template <class T>
T __ldg(const T* at) {
    return *at;
}
template <class T>
T __ldcs(const T* at) {
    return *at;
}
template <class T>
T __ldcg(const T* at) {
    return *at;
}
template <class T, class V>
void __stcs(T* at, V value) {
    *at = value;
}
template <class T, class V>
void __stcg(T* at, V value) {
    *at = value;
}

inline uint32_t __float_as_uint(float x) { return emulate::value_of<uint32_t>(emulate::word_of(x)); }
inline int __float_as_int(float x) { return emulate::value_of<int>(emulate::word_of(x)); }
inline float __uint_as_float(uint32_t x) { return emulate::value_of<float>(emulate::word_of(x)); }
inline float __int_as_float(int x) { return emulate::value_of<float>(emulate::word_of(x)); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float a) { return std::exp(a); }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
inline int __float2int_rn(float a) { return static_cast<int>(std::nearbyint(a)); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __popcll(uint64_t x) { return __builtin_popcountll(x); }
inline int __clz(uint32_t x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(uint32_t x) { return __builtin_ffs(static_cast<int>(x)); }
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
    const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t pick = selector >> 4 * i & 0xF;
        uint32_t byte = static_cast<uint32_t>(both >> 8 * (pick & 7)) & 0xFF;
        if (pick & 8) byte = byte & 0x80 ? 0xFF : 0;
        out |= byte << 8 * i;
    }
    return out;
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t by) {
    return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (by & 31));
}
template <class T>
uint64_t __cvta_generic_to_shared(const T* at) {
    return static_cast<uint64_t>(reinterpret_cast<const uint8_t*>(at) - emulate::dynamic_shared());
}
