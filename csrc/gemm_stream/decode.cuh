// Four 8-bit codes of a word to four fp16 numbers, which hold every value of the three formats exactly.
//
// HiF8 has no cheap arithmetic, so its codes are looked up in shared memory, without bank conflicts: every lane has a
// copy of the table in its own bank. A row of the table is 256 bytes, one a code: bytes 4 * lane of it for w, 128 + 4 *
// lane for x. So an address is one byte permutation: the code above the lane's place in the row.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/mma.cuh"
#include "formats/fp8.h"
#include "formats/hif8.h"
#include "formats/inputs.h"

namespace fp8kernels {

constexpr int kTableRow = 256;                // bytes: 32 banks for w, 32 for x
constexpr int kTableBytes = 256 * kTableRow;  // 64 KiB of shared memory
constexpr uint32_t kTableOfX = 128;           // where the half for x starts in a row

#if defined(FP8K_EMULATE) || __CUDA_ARCH__ >= 890
constexpr bool kConvertsE4M3 = true;
#else
constexpr bool kConvertsE4M3 = false;  // sm_80 has no instruction for it
#endif

__device__ __forceinline__ uint32_t half_bits(FormatId format, uint32_t code) {
    const auto byte = static_cast<uint8_t>(code);
    const uint32_t bits = format == FormatId::hif8   ? HiF8::decode_bits(byte)
                          : format == FormatId::e4m3 ? E4M3::decode_bits(byte)
                                                     : E5M2::decode_bits(byte);
    return fp16_from_float(float_from_bits(bits));
}

// Writes one half of the table; all threads of 8 warps take part.
__device__ __forceinline__ void fill_table(uint8_t* table, uint32_t half, FormatId format) {
    const uint32_t lane = threadIdx.x % 32u, first = threadIdx.x / 32u * 32u;
    const uint32_t mine = half_bits(format, first + lane);
#pragma unroll 4
    for (uint32_t i = 0; i < 32; ++i) {
        const uint32_t value = __shfl_sync(0xFFFFFFFFu, mine, static_cast<int>(i));
        *reinterpret_cast<uint32_t*>(table + (first + i) * kTableRow + half + 4 * lane) = value;
    }
}

// place: 4 * lane, and kTableOfX for x.
__device__ __forceinline__ void look_up(const uint8_t* table, uint32_t place, uint32_t codes, uint32_t& low,
                                        uint32_t& high) {
    const auto at = [&](uint32_t selector) {
        return *reinterpret_cast<const uint32_t*>(table + __byte_perm(codes, place, selector));
    };
    low = __byte_perm(at(0x5504), at(0x5514), 0x5410);
    high = __byte_perm(at(0x5524), at(0x5534), 0x5410);
}

// How the codes of w are decoded.
template <class F>
struct Decoder {  // HiF8, and E4M3 before sm_89
    static constexpr bool kLooksUp = true;
    static __device__ __forceinline__ void run(const uint8_t* table, uint32_t place, uint32_t codes, uint32_t& low,
                                               uint32_t& high) {
        look_up(table, place, codes, low, high);
    }
};

template <>
struct Decoder<E4M3> {
    static constexpr bool kLooksUp = !kConvertsE4M3;
    static __device__ __forceinline__ void run(const uint8_t* table, uint32_t place, uint32_t codes, uint32_t& low,
                                               uint32_t& high) {
        if constexpr (kConvertsE4M3) {
            low = ptx::halves_from_e4m3(codes & 0xFFFF);
            high = ptx::halves_from_e4m3(codes >> 16);
        } else {
            look_up(table, place, codes, low, high);
        }
    }
};

template <>
struct Decoder<E5M2> {  // an E5M2 code is the upper byte of an fp16 number
    static constexpr bool kLooksUp = false;
    static __device__ __forceinline__ void run(const uint8_t*, uint32_t, uint32_t codes, uint32_t& low,
                                               uint32_t& high) {
        low = __byte_perm(codes, 0, 0x1404);
        high = __byte_perm(codes, 0, 0x3424);
    }
};

}  // namespace fp8kernels
