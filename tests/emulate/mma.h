// What csrc/cuda/mma.cuh does, on the host.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "formats/fp8.h"
#include "formats/inputs.h"

namespace fp8kernels::ptx {

inline uint4 load_once(const void* from) {
    if (reinterpret_cast<uintptr_t>(from) % 16) emulate::fail("reads 16 bytes at an address that is no multiple of 16");
    uint4 v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Held {
        uint32_t a[4], b[2];
    } mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    const uint32_t lane = threadIdx.x % 32u;
    emulate::with_all_lanes(mine, [&](const Held* const* all) {
        const auto half = [](uint32_t word, uint32_t which) {
            return float_from_fp16(static_cast<uint16_t>(word >> 16 * which));
        };
        for (uint32_t i = 0; i < 4; ++i) {
            const uint32_t row = lane / 4, below = i / 2, column = 2 * (lane % 4) + i % 2;
            float sum = 0.0f;
            for (uint32_t k = 0; k < 16; ++k) {
                const uint32_t owner = k % 8 / 2, late = k / 8;  // which of the four lanes of a row holds k
                sum += half(all[4 * row + owner]->a[below + 2 * late], k % 2) *
                       half(all[4 * column + owner]->b[late], k % 2);
            }
            d[i] += sum;
        }
    });
}

inline uint32_t halves_from_e4m3(uint32_t two) {
    const auto half = [](uint32_t code) {
        return fp16_from_float(float_from_bits(E4M3::decode_bits(static_cast<uint8_t>(code))));
    };
    return half(two & 0xFF) | static_cast<uint32_t>(half(two >> 8 & 0xFF)) << 16;
}

inline void copy_async(void* to, const void* from) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16)
        emulate::fail("copies 16 bytes from or to an address that is no multiple of 16");
    emulate::start_later([=] { std::memcpy(to, from, 16); });
}

inline void copies_commit() { emulate::commit_group(); }

template <int kPending>
void copies_wait() {
    emulate::wait_groups(kPending);
}

}  // namespace fp8kernels::ptx
