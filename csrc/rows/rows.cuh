// Rows of matrices on their way through a block: read ahead into shared memory, eight numbers a thread at a time.
//
// A team of threads has one row, or one piece of a row, at hand and the next one in flight: 32 threads for short ones,
// all 256 of a block for long ones. Each thread reads only the bytes that it copied itself, so the copies need no
// barrier. A matrix whose rows do not start at multiples of 16 bytes is read where it lies, number by number.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/convert.cuh"
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"
#include "formats/inputs.h"
#include "quantize/quantize.h"

namespace fp8kernels {

constexpr int kEight = 8;                // numbers that a thread takes together
constexpr int kRowThreads = 256;         // of a block
constexpr int kShortRow = 1024;          // numbers: up to here a warp takes a row
constexpr size_t kRowMemory = 96 << 10;  // bytes of shared memory that every GPU from sm_80 on gives one block

// A matrix whose neighbours along a row are neighbours in memory.
struct Matrix {
    const void* data;
    InputType type;
    int64_t row_stride;  // elements
};

// The same along one row: a weight or a bias. null: there is none.
struct Vector {
    const void* data;
    InputType type;
};

inline int size_of(InputType type) { return type == InputType::fp32 ? 4 : 2; }

inline bool starts_wide(const Matrix& m) {
    return reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.row_stride * size_of(m.type) % 16 == 0;
}

// ---- eight numbers --------------------------------------------------------------------------------------------------

__device__ __forceinline__ float number_at(const void* from, InputType type, int64_t i) {
    if (type == InputType::fp32) return static_cast<const float*>(from)[i];
    const uint16_t bits = static_cast<const uint16_t*>(from)[i];
    return type == InputType::bf16 ? float_from_bf16(bits) : float_from_fp16(bits);
}

// From a multiple of 16 bytes.
__device__ __forceinline__ void load_wide(const uint8_t* from, InputType type, float (&x)[kEight]) {
    const uint4 a = *reinterpret_cast<const uint4*>(from);
    const uint32_t words[4] = {a.x, a.y, a.z, a.w};
    if (type == InputType::fp32) {
        const uint4 b = *reinterpret_cast<const uint4*>(from + 16);
        const uint32_t more[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            x[i] = float_from_bits(words[i]);
            x[4 + i] = float_from_bits(more[i]);
        }
    } else if (type == InputType::bf16) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            x[2 * i] = float_from_bits(words[i] << 16);
            x[2 * i + 1] = float_from_bits(words[i] & 0xFFFF0000u);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) ptx::floats_from_fp16(words[i], x[2 * i], x[2 * i + 1]);
    }
}

// The `count` numbers from `at` on, and zeros; wide: they are eight, and start at a multiple of 16 bytes.
__device__ __forceinline__ void load_eight(const void* from, InputType type, int64_t at, int count, bool wide,
                                           float (&x)[kEight]) {
    if (wide) {
        load_wide(static_cast<const uint8_t*>(from) + at * (type == InputType::fp32 ? 4 : 2), type, x);
        return;
    }
#pragma unroll
    for (int i = 0; i < kEight; ++i) x[i] = i < count ? number_at(from, type, at + i) : 0.0f;
}

// The eight numbers of a vector from `at` on; one that is absent is `absent` everywhere.
__device__ __forceinline__ void load_vector(const Vector& v, float absent, int64_t at, int count, float (&x)[kEight]) {
    if (v.data == nullptr) {
#pragma unroll
        for (int i = 0; i < kEight; ++i) x[i] = absent;
        return;
    }
    load_eight(v.data, v.type, at, count, count >= kEight && reinterpret_cast<uintptr_t>(v.data) % 16 == 0, x);
}

// Rounded once, to nearest even. wide: as above.
__device__ __forceinline__ void store_eight(void* to, InputType type, int64_t at, int count, bool wide,
                                            const float (&x)[kEight]) {
    if (type == InputType::fp32) {
        auto* there = static_cast<float*>(to) + at;
        if (wide) {
            reinterpret_cast<float4*>(there)[0] = make_float4(x[0], x[1], x[2], x[3]);
            reinterpret_cast<float4*>(there)[1] = make_float4(x[4], x[5], x[6], x[7]);
            return;
        }
#pragma unroll
        for (int i = 0; i < kEight; ++i) {
            if (i < count) there[i] = x[i];
        }
        return;
    }
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        words[i] = type == InputType::bf16 ? ptx::bf16_from_floats(x[2 * i], x[2 * i + 1])
                                           : ptx::fp16_from_floats(x[2 * i], x[2 * i + 1]);
    }
    auto* there = static_cast<uint16_t*>(to) + at;
    if (wide) {
        *reinterpret_cast<uint4*>(there) = make_uint4(words[0], words[1], words[2], words[3]);
        return;
    }
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
        if (i < count) there[i] = static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2));
    }
}

// ---- a team of threads ----------------------------------------------------------------------------------------------

// 32 threads, a warp of its own, or all of a block. What it returns is the same in every thread, and from call to call.
template <int kSize>
struct Team {
    static_assert(kSize == 32 || kSize % 32 == 0, "whole warps");
    unsigned turn = 0;

    __device__ static int lane() { return static_cast<int>(threadIdx.x % kSize); }

    __device__ float sum(float x) {
#pragma unroll
        for (int by = 16; by > 0; by /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, by);
        if constexpr (kSize > 32) {
            const float* warps = exchange(bits_from_float(x));
            x = 0.0f;
#pragma unroll
            for (int i = 0; i < kSize / 32; ++i) x += warps[i];
        }
        return x;
    }

    __device__ uint32_t max(uint32_t x) {
        x = __reduce_max_sync(0xFFFFFFFFu, x);
        if constexpr (kSize > 32) {
            const float* warps = exchange(x);
#pragma unroll
            for (int i = 0; i < kSize / 32; ++i) x = bits_from_float(warps[i]) > x ? bits_from_float(warps[i]) : x;
        }
        return x;
    }

   private:
    // What each warp shows. Two sets of places take turns, so that one barrier is enough.
    __device__ const float* exchange(uint32_t bits) {
        __shared__ float shown[2][kSize / 32];
        float* place = shown[turn];
        turn ^= 1;
        if (threadIdx.x % 32 == 0) place[threadIdx.x / 32] = float_from_bits(bits);
        __syncthreads();
        return place;
    }
};

// ---- pieces of rows -------------------------------------------------------------------------------------------------

template <int kStreams>
struct Rows {
    Matrix of[kStreams];
    int64_t rows, cols;
    int64_t piece;           // columns of a piece: all, or a multiple of kEight
    int64_t across, pieces;  // in a row, and in all
    int buffers;             // in shared memory: 2, or 1 without reading ahead, or 0 where a piece does not fit
    bool wide;               // every eight numbers are there, and start at a multiple of 16 bytes
    int offset[kStreams];    // bytes, of each stream in a buffer
    int buffer;              // bytes

    size_t memory(int teams) const { return static_cast<size_t>(buffers) * teams * buffer; }
};

// teams: of a block; `room`: bytes of shared memory that may be used.
template <int kStreams>
Rows<kStreams> rows_of(const Matrix (&of)[kStreams], int64_t rows, int64_t cols, int64_t piece, int teams,
                       size_t room) {
    Rows<kStreams> out{};
    out.rows = rows, out.cols = cols;
    out.piece = piece;
    out.across = (cols + piece - 1) / piece;
    out.pieces = rows * out.across;
    out.wide = cols % kEight == 0;
    int64_t bytes = 0;
    for (int s = 0; s < kStreams; ++s) {
        out.of[s] = of[s];
        out.offset[s] = static_cast<int>(bytes);
        bytes += piece * size_of(of[s].type);
        out.wide = out.wide && starts_wide(of[s]);
    }
    const int64_t fitting = static_cast<int64_t>(room) / (teams * bytes);
    out.buffers = !out.wide ? 0 : fitting > 2 ? 2 : static_cast<int>(fitting);
    out.buffer = out.buffers > 0 ? static_cast<int>(bytes) : 0;
    return out;
}

// One team's way through its pieces.
template <int kTeam, int kStreams>
class Walk {
    const Rows<kStreams>& rows_;
    uint8_t* memory_;  // of this team: two buffers
    int at_ = 0;       // which of them is at hand

    __device__ int64_t columns(int64_t first) const {
        return rows_.cols - first < rows_.piece ? rows_.cols - first : rows_.piece;
    }

    __device__ void fetch(int64_t piece, int buffer) const {
        if (rows_.buffers > 0 && piece < rows_.pieces) {
            const int64_t line = piece / rows_.across, first = piece % rows_.across * rows_.piece;
            const auto count = static_cast<int>(columns(first));
#pragma unroll
            for (int s = 0; s < kStreams; ++s) {
                const Matrix& m = rows_.of[s];
                const int size = m.type == InputType::fp32 ? 4 : 2;
                const auto* from = static_cast<const uint8_t*>(m.data) + (line * m.row_stride + first) * size;
                uint8_t* to = memory_ + buffer * rows_.buffer + rows_.offset[s];
                for (int c = Team<kTeam>::lane() * kEight; c < count; c += kTeam * kEight) {
                    ptx::copy_async(to + c * size, from + c * size);
                    if (size == 4) ptx::copy_async(to + c * size + 16, from + c * size + 16);
                }
            }
        }
        ptx::copies_commit();
    }

   public:
    int64_t row = 0, first = 0;  // of the piece at hand, and its first column
    int count = 0;               // of its columns

    __device__ Walk(const Rows<kStreams>& rows, uint8_t* memory)
        : rows_(rows), memory_(memory + threadIdx.x / kTeam * rows.buffers * rows.buffer) {}

    __device__ bool wide() const { return rows_.wide; }

    // Eight numbers of the piece from column c on; zeros beyond its end.
    __device__ __forceinline__ void load(int stream, int c, float (&x)[kEight]) const {
        const Matrix& m = rows_.of[stream];
        if (rows_.buffers > 0 && c < count) {
            const int size = m.type == InputType::fp32 ? 4 : 2;
            load_wide(memory_ + at_ * rows_.buffer + rows_.offset[stream] + c * size, m.type, x);
            return;
        }
        load_eight(m.data, m.type, row * m.row_stride + first + c, count - c, rows_.wide && c < count, x);
    }

    // Calls body() for every piece of this team; all threads of a block come along the same number of times.
    template <class Body>
    __device__ void each(Body body) {
        constexpr int kTeams = kRowThreads / kTeam > 0 ? kRowThreads / kTeam : 1;
        const int64_t step = static_cast<int64_t>(gridDim.x) * kTeams;
        int64_t piece = static_cast<int64_t>(blockIdx.x) * kTeams + threadIdx.x / kTeam;
        const bool ahead = rows_.buffers == 2;
        if (ahead) fetch(piece, 0);
        for (; piece < rows_.pieces; piece += step) {
            fetch(ahead ? piece + step : piece, ahead ? at_ ^ 1 : 0);
            if (ahead) {
                ptx::copies_wait<1>();
            } else {
                ptx::copies_wait<0>();
            }
            row = piece / rows_.across;
            first = piece % rows_.across * rows_.piece;
            count = static_cast<int>(columns(first));
            body();
            at_ ^= ahead ? 1 : 0;
        }
        ptx::copies_wait<0>();
    }

    // Calls body(c) for every eight columns of this thread; the threads of a team come along the same number of times.
    template <class Body>
    __device__ __forceinline__ void along(Body body) const {
        for (int base = 0; base < count; base += kTeam * kEight) body(base + Team<kTeam>::lane() * kEight);
    }
};

// How many blocks walk together: as many as the processors hold, and not more than there are pieces. `most`: how many
// of them a processor has registers for.
inline unsigned blocks_of(int64_t pieces, int teams, size_t shared, int processors, int64_t most) {
    constexpr size_t kHeld = 200 << 10;  // bytes of shared memory of a processor of sm_90, less what blocks cost
    int64_t at_a_time = shared == 0 ? most : static_cast<int64_t>(kHeld / shared);
    at_a_time = at_a_time < 1 ? 1 : at_a_time > most ? most : at_a_time;
    const int64_t needed = (pieces + teams - 1) / teams, held = at_a_time * processors;
    return static_cast<unsigned>(needed < held ? needed : held);
}

}  // namespace fp8kernels
