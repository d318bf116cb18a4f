// What csrc/cuda/ptx.cuh does, on the host. Copies and products happen as late as the hardware is allowed to do them.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <array>
#include <cstdint>

#include "formats/fp8.h"

namespace fp8kernels::ptx {

inline uint32_t shared_address(const void* at) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(static_cast<const uint8_t*>(at)));
}

// ---- barriers: the eight bytes of one hold these numbers ----

struct Barrier {
    uint16_t expected, pending;  // arrivals of a phase, and of this one still to come
    int32_t bytes_and_phase;     // 2 * bytes still to come + parity of the phase
};
static_assert(sizeof(Barrier) == 8, "a barrier has 64 bits");

inline Barrier* open(uint64_t* barrier) { return reinterpret_cast<Barrier*>(barrier); }

inline void turn(Barrier* b) {
    if (b->pending == 0 && b->bytes_and_phase >> 1 == 0) {
        b->bytes_and_phase ^= 1;
        b->pending = b->expected;
    }
}

inline void barrier_init(uint64_t* barrier, uint32_t arrivals) {
    *open(barrier) = {static_cast<uint16_t>(arrivals), static_cast<uint16_t>(arrivals), 0};
}

inline void fence_barrier_init() {}

inline void barrier_add_bytes(uint64_t* barrier, int bytes) {
    open(barrier)->bytes_and_phase += 2 * bytes;
    if (open(barrier)->bytes_and_phase < 0) emulate::fail("more bytes arrive at a barrier than it expects");
}

inline void barrier_arrive(uint64_t* barrier) {
    if (open(barrier)->pending == 0) emulate::fail("arrives at a barrier that expects nobody");
    --open(barrier)->pending;
    turn(open(barrier));
}

inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
    barrier_add_bytes(barrier, static_cast<int>(bytes));
    barrier_arrive(barrier);
}

inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
    emulate::wait([=] { return (static_cast<uint32_t>(open(barrier)->bytes_and_phase) & 1) != parity; });
}

inline void named_barrier(int id, int threads) { emulate::barrier(id, static_cast<unsigned>(threads)); }

// ---- the copy engine ----

inline void prefetch_map(const CUtensorMap*) {}

inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void load_box(const CUtensorMap* map, uint64_t* barrier, void* to, int column, int row) {
    const uint32_t start = shared_address(to);
    if (start % 1024) emulate::fail("a swizzled box starts at a multiple of 1024 bytes");
    emulate::start_copy([=] {
        const uint32_t width = map->box_columns * static_cast<uint32_t>(map->element);
        for (uint32_t r = 0; r < map->box_rows; ++r) {
            for (uint32_t b = 0; b < width; ++b) {
                const int64_t x = column + static_cast<int64_t>(b) / map->element, y = row + static_cast<int64_t>(r);
                const bool inside =
                    x >= 0 && y >= 0 && x < static_cast<int64_t>(map->columns) && y < static_cast<int64_t>(map->rows);
                const uint64_t offset =
                    static_cast<uint64_t>(y) * map->row_stride + static_cast<uint64_t>(column) * map->element + b;
                emulate::dynamic_shared()[swizzled(start + r * width + b)] = inside ? map->base[offset] : 0;
            }
        }
        barrier_add_bytes(barrier, -static_cast<int>(map->box_rows * width));
        turn(open(barrier));
    });
}

// ---- products of a warpgroup ----

inline void wgmma_fence() {}
inline void wgmma_commit() { emulate::commit_group(); }

template <int kPending>
void wgmma_wait() {
    emulate::wait_groups(kPending);
}

template <int kSums>
void hold(float (&)[kSums]) {}

inline uint64_t swizzled_matrix(uint32_t address) {
    constexpr uint64_t kEightRows = 1024 >> 4, kLayout = 1;
    return (address & 0x3FFFF) >> 4 | kEightRows << 32 | kLayout << 62;
}

// The byte of a matrix in shared memory, as the hardware finds it by its descriptor.
inline uint8_t matrix_byte(uint64_t matrix, uint32_t row, uint32_t byte) {
    if (matrix >> 62 != 1) emulate::fail("only the 128-byte swizzle is emulated");
    const uint32_t start = static_cast<uint32_t>(matrix & 0x3FFF) << 4;
    const uint32_t eight_rows = static_cast<uint32_t>(matrix >> 32 & 0x3FFF) << 4;
    return emulate::dynamic_shared()[swizzled(start + row / 8 * eight_rows + row % 8 * 128 + byte)];
}

template <class Format>
const float* values() {
    static const auto table = [] {
        std::array<float, 256> all{};
        for (int code = 0; code < 256; ++code)
            all[code] = float_from_bits(Format::decode_bits(static_cast<uint8_t>(code)));
        return all;
    }();
    return table.data();
}

template <class A, class B, int kN>
struct Wgmma {
    static void run(float (&d)[kN / 2], uint64_t a, uint64_t b, int add) {
        float* sums = d;
        emulate::start_later([=] {
            const uint32_t thread = emulate::self().thread % 128, lane = thread % 32;
            for (uint32_t half = 0; half < 2; ++half) {
                const uint32_t row = 16 * (thread / 32) + lane / 4 + 8 * half;
                float left[32];
                for (uint32_t k = 0; k < 32; ++k) left[k] = values<A>()[matrix_byte(a, row, k)];
                for (uint32_t i = 0; i < kN / 4; ++i) {
                    const uint32_t column = 8 * (i / 2) + 2 * (lane % 4) + i % 2;
                    float sum = 0.0f;
                    for (uint32_t k = 0; k < 32; ++k) sum += left[k] * values<B>()[matrix_byte(b, column, k)];
                    float& out = sums[4 * (i / 2) + 2 * half + i % 2];
                    out = add ? out + sum : sum;
                }
            }
        });
    }
};

template <int kRegisters>
void give_registers() {
    static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "24 to 256, in steps of 8");
}

template <int kRegisters>
void take_registers() {
    static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "24 to 256, in steps of 8");
}

}  // namespace fp8kernels::ptx
