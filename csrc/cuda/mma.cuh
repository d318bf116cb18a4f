// The instructions of sm_80 and sm_89 that stream kernels use and CUDA C++ has no words for.
//
// One function an instruction; semantics as in the PTX ISA, section in brackets. tests/emulate/mma.h has the same
// functions for the host.
#pragma once

#ifdef FP8K_EMULATE
#include "mma.h"
#else

#include <cuda_runtime.h>

#include <cstdint>

namespace fp8kernels::ptx {

// Sixteen bytes that are read once: they do not displace what L1 holds, and L2 fetches the 256 bytes around them
// [ld.global.nc].
__device__ __forceinline__ uint4 load_once(const void* from) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
}

// d[16, 8] += a[16, 16] @ b[8, 16].T, fp16 with fp32 sums, over a warp [mma.m16n8k16]. With g = lane / 4, t = lane % 4:
// a holds rows g, g + 8, g, g + 8 at k = 2t, 2t, 2t + 8, 2t + 8; b row g at k = 2t, 2t + 8 (each word that k and the
// next); d rows g, g, g + 8, g + 8 at columns 2t, 2t + 1, 2t, 2t + 1.
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two E4M3 codes to two fp16 numbers, exact; NaN stays NaN; sm_89 and newer [cvt].
__device__ __forceinline__ uint32_t halves_from_e4m3(uint32_t two) {
    uint32_t halves;
    asm("{\n.reg .b16 low;\ncvt.u16.u32 low, %1;\ncvt.rn.f16x2.e4m3x2 %0, low;\n}\n" : "=r"(halves) : "r"(two));
    return halves;
}

}  // namespace fp8kernels::ptx

#endif
