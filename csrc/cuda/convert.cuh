// Conversions, and the maximum that keeps NaN: instructions of sm_80 and newer that CUDA C++ has no words for.
//
// One function an instruction; semantics as in the PTX ISA, section in brackets. tests/emulate/convert.h has the same
// functions for the host.
#pragma once

#ifdef FP8K_EMULATE
#include "convert.h"
#else

#include <cuda_runtime.h>

#include <cstdint>

namespace fp8kernels::ptx {

// The larger of two numbers, NaN if either is [max.NaN].
__device__ __forceinline__ float max_nan(float a, float b) {
    float out;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
    return out;
}

// Two fp16 numbers, the first in the low half; exact [cvt].
__device__ __forceinline__ void floats_from_fp16(uint32_t two, float& first, float& second) {
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}\n"
        : "=f"(first), "=f"(second)
        : "r"(two));
}

// Two numbers rounded to nearest, ties to even; the first in the low half [cvt.rn].
__device__ __forceinline__ uint32_t bf16_from_floats(float first, float second) {
    uint32_t two;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(second), "f"(first));
    return two;
}

__device__ __forceinline__ uint32_t fp16_from_floats(float first, float second) {
    uint32_t two;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(second), "f"(first));
    return two;
}

// The compiler forgets what it has computed from these words, and computes it again instead of keeping it in registers.
__device__ __forceinline__ void forget(unsigned& v) { asm volatile("" : "+r"(v)); }
__device__ __forceinline__ void forget(uint4& v) { asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)); }

}  // namespace fp8kernels::ptx

#endif
