// The instructions of sm_90 that CUDA C++ has no words for: barriers in shared memory, the copy engine, wgmma.
//
// One function an instruction; names and semantics as in the PTX ISA, section in brackets. tests/emulate/ptx.h has the
// same functions for the host.
#pragma once

#ifdef FP8K_EMULATE
#include "ptx.h"
#else

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "formats/fp8.h"

namespace fp8kernels::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* at) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// ---- barriers in shared memory [mbarrier] ----

__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes the initialised barriers visible to the copy engine.
__device__ __forceinline__ void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and tells the barrier how many bytes the copy engine will bring in this phase.
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// Waits until the phase of this parity is over.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra ready;\n"
        "bra again;\n"
        "ready:\n"
        "}\n" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// bar.sync among `threads` threads of the block; id 0 is __syncthreads.
__device__ __forceinline__ void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- the copy engine [cp.async.bulk.tensor] ----

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copies the box of the map at (column, row) to shared memory; what lies outside the matrix arrives as zeros, and
// counts.
__device__ __forceinline__ void load_box(const CUtensorMap* map, uint64_t* barrier, void* to, int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
        : "memory");
}

// ---- matrix products of a warpgroup [wgmma] ----

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `kPending` of the committed groups are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving reads or writes of the sums across this place.
template <int kSums>
__device__ __forceinline__ void hold(float (&sums)[kSums]) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// A matrix in shared memory, K-major, rows of 128 bytes in the 128-byte swizzle (8 rows = 1024 bytes).
__device__ __forceinline__ uint64_t swizzled_matrix(uint32_t address) {
    constexpr uint64_t kEightRows = 1024 >> 4, kLayout = 1;  // stride between groups of 8 rows; 128-byte swizzle
    return (address & 0x3FFFF) >> 4 | kEightRows << 32 | kLayout << 62;
}

// sums[64, kN] (+)= a[64, 32] @ b[kN, 32].T, codes of formats A and B, in the layout of [wgmma, D fragment]: thread t
// holds rows 16 * (t / 32 % 4) + t % 32 / 4 and 8 below, columns 8 * j + 2 * (t % 4) and the next, as sums[4 * j ...].
template <class A, class B, int kN>
struct Wgmma;

#define FP8K_R8(i)                                                                                              \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define FP8K_R16(i) FP8K_R8(i), FP8K_R8(i + 8)
#define FP8K_R32(i) FP8K_R16(i), FP8K_R16(i + 16)
#define FP8K_R64(i) FP8K_R32(i), FP8K_R32(i + 32)
#define FP8K_R128(i) FP8K_R64(i), FP8K_R64(i + 64)

#define FP8K_N8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define FP8K_N16 FP8K_N8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define FP8K_N32 FP8K_N16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define FP8K_N64                                                                                                 \
    FP8K_N32                                                                                                     \
    ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%" \
    "58,"                                                                                                        \
    "%59,%60,%61,%62,%63"
#define FP8K_N128                                                                                                \
    FP8K_N64                                                                                                     \
    ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%" \
    "90,"                                                                                                        \
    "%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113," \
    "%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

#define FP8K_WGMMA(A, B, types, n, sums, a, b, accumulate)                                                             \
    template <>                                                                                                        \
    struct Wgmma<A, B, n> {                                                                                            \
        static __device__ __forceinline__ void run(float (&d)[sums], uint64_t a_matrix, uint64_t b_matrix, int add) {  \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #accumulate ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n \
                         "k32.f32." types " {" FP8K_N##sums "}, %" #a ", %" #b ", p, 1, 1;\n}\n"                       \
                         : FP8K_R##sums(0)                                                                             \
                         : "l"(a_matrix), "l"(b_matrix), "r"(add));                                                    \
        }                                                                                                              \
    };
#define FP8K_WGMMA_ALL(A, B, types)              \
    FP8K_WGMMA(A, B, types, 16, 8, 8, 9, 10)     \
    FP8K_WGMMA(A, B, types, 32, 16, 16, 17, 18)  \
    FP8K_WGMMA(A, B, types, 64, 32, 32, 33, 34)  \
    FP8K_WGMMA(A, B, types, 128, 64, 64, 65, 66) \
    FP8K_WGMMA(A, B, types, 256, 128, 128, 129, 130)
FP8K_WGMMA_ALL(E4M3, E4M3, "e4m3.e4m3")
FP8K_WGMMA_ALL(E4M3, E5M2, "e4m3.e5m2")
FP8K_WGMMA_ALL(E5M2, E4M3, "e5m2.e4m3")
#undef FP8K_WGMMA_ALL
#undef FP8K_WGMMA

// ---- registers [setmaxnreg]: a warpgroup gives some up, others take them ----

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace fp8kernels::ptx

#endif
