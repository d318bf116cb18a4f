// The instructions of sm_80 and sm_89 for small matrix products and for memory that CUDA C++ has no words for.
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

// Copies sixteen bytes to shared memory, in its own time; both addresses are multiples of 16 [cp.async].
__device__ __forceinline__ void copy_async(void* to, const void* from) {
    asm volatile(
        "cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
        "l"(from)
        : "memory");
}

// Closes a group of this thread's copies.
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kPending` of this thread's groups are under way.
template <int kPending>
__device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace fp8kernels::ptx

#endif
