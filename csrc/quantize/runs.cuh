// quantize for short rows that have a scale each (1x128, rows): half a warp or a warp holds them, and reads them once.
#pragma once

#include "quantize/task.cuh"

namespace fp8kernels {
namespace {

constexpr unsigned kRunThreads = 256, kRunResident = 3;
constexpr int kRunVectors = 8;  // a lane, where a warp holds a run

// The vectors of a lane in the kBlocks blocks of its team, vector j of block b at b * kVectors + j.
template <class Input, int kLanes, int kBlocks, int kVectors>
struct RunVectors {
    const Task& task;
    int64_t block;       // the first one of the team,
    int64_t row, place;  // its row, and how many blocks stand before it there
    int lane;

    __device__ RunVectors(const Task& of, int64_t first, int of_team)
        : task(of), block(first), row(first), place(0), lane(of_team) {
        if (of.tiling.grid_cols == 1) return;
        row = first / of.tiling.grid_cols;
        place = first - row * of.tiling.grid_cols;
    }

    __device__ int col(int i) const { return (lane + i % kVectors * kLanes) * Input::kCount; }
    __device__ int left(int i) const {
        const int cols =
            block + i / kVectors < task.tiling.blocks ? static_cast<int>(task.tiling.block_cols) - col(i) : 0;
        return cols <= 0 ? 0 : cols < Input::kCount ? cols : Input::kCount;
    }
    __device__ int64_t at(int i, int64_t stride) const {
        const Tiling& t = task.tiling;
        const int b = i / kVectors;
        if (t.grid_cols == 1) return (row + b) * stride + col(i);
        int64_t r = row, p = place + b;
#pragma unroll 1
        for (; p >= t.grid_cols; p -= t.grid_cols) ++r;
        return r * stride + p * t.block_cols + col(i);
    }
    __device__ const typename Input::T* x(int i) const {
        return static_cast<const typename Input::T*>(task.x) + at(i, task.tiling.stride);
    }
    __device__ uint8_t* codes(int i) const { return task.codes + at(i, task.tiling.cols); }
    __device__ void note(int, int, uint8_t) const {}
};

// A team of kLanes lanes holds kBlocks blocks at a time, each at most kVectors vectors a lane of one row.
template <class Input, class Encode, int kLanes, int kBlocks, int kVectors>
__global__ void __launch_bounds__(kRunThreads, kRunResident) quantize_runs(const Task task) {
    constexpr int kCount = Input::kCount, kAll = kBlocks * kVectors;
    constexpr unsigned kTeams = kRunThreads / kLanes;
    constexpr unsigned kOfBlock = (1u << kVectors) - 1;
    __shared__ uint32_t table[Encode::kTable];
    const Encode encode(task.coding, table, threadIdx.x, kRunThreads);
    __syncthreads();

    const Tiling& t = task.tiling;
    const int lane = static_cast<int>(threadIdx.x % kLanes);
    const auto team_largest = [](float size) {
#pragma unroll
        for (int other = kLanes / 2; other > 0; other /= 2)
            size = ptx::max_nan(size, __shfl_xor_sync(kAllLanes, size, other));
        return size;
    };
    Tally tally;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kTeams * kBlocks;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * kTeams * kBlocks; first < t.blocks; first += stride) {
        const RunVectors<Input, kLanes, kBlocks, kVectors> vectors(task, first + threadIdx.x / kLanes * kBlocks, lane);
        uint4 v[kAll];
        unsigned held = 0, aside = 0;
#pragma unroll
        for (int i = 0; i < kAll; ++i) {
            const int count = vectors.left(i);
            const bool holds = count == kCount && t.whole;
            v[i] = holds ? load<Input>(vectors.x(i / kVectors * kVectors) + i % kVectors * kLanes * kCount)
                         : make_uint4(0, 0, 0, 0);
            if (holds) {
                held |= 1u << i;
            } else if (count > 0) {
                aside |= 1u << i;
            }
        }

        // Lane b of the team keeps what is found of block b; it makes the scale, and shows it to the others.
        float amax = 0.0f, finite = 0.0f;
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
            const unsigned bits = aside & kOfBlock << b * kVectors;
            float size = bits ? largest_aside<Input>(bits, vectors, false) : 0.0f;
#pragma unroll
            for (int j = 0; j < kVectors; ++j) {
                size = ptx::max_nan(size, largest_of<Input>(v[b * kVectors + j]));
                ptx::forget(v[b * kVectors + j]);
            }
            size = team_largest(size);
            if (lane % kBlocks == b) finite = amax = size;
        }
        tally.raise(amax);
        if (!__all_sync(kAllLanes, is_finite(amax))) {
#pragma unroll
            for (int b = 0; b < kBlocks; ++b) {
                const unsigned bits = aside & kOfBlock << b * kVectors;
                float size = bits ? largest_aside<Input>(bits, vectors, true) : 0.0f;
#pragma unroll
                for (int j = 0; j < kVectors; ++j) {
                    size = fmaxf(size, largest_finite_of<Input>(v[b * kVectors + j]));
                    ptx::forget(v[b * kVectors + j]);
                }
                size = team_largest(size);
                if (lane % kBlocks == b) finite = size;
            }
        }
        const int64_t own = vectors.block + lane % kBlocks;
        const float own_scale = task.divides(own < t.blocks ? task.scale_in[own] : 1.0f, finite);
        if (lane < kBlocks && own < t.blocks) {
            task.scale_out[own] = task.decodes(own_scale);
            task.amax[own] = amax;
        }

#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
            const float scale = __shfl_sync(kAllLanes, own_scale, b, kLanes);
            const Divisor d = divisor(scale, task.coding);
            uint8_t* const to = vectors.codes(b * kVectors);
#pragma unroll
            for (int j = 0; j < kVectors; ++j) {
                const int i = b * kVectors + j;
                if (!(held >> i & 1)) continue;
                float numbers[kCount];
                uint32_t signs[kCount / 4], codes[kCount / 4];
                Input::unpack(v[i], numbers);
                if (!(largest(numbers) < d.limit)) {
                    aside |= 1u << i;
                    continue;
                }
                Input::signs(v[i], signs);
                encode_fast<Input::kTurns>(numbers, signs, d, encode, codes, tally);
                store(to + j * kLanes * kCount, codes);
            }
        }
        if (!__any_sync(kAllLanes, aside != 0)) continue;
#pragma unroll 1
        for (int b = 0; b < kBlocks; ++b) {
            const float scale = __shfl_sync(kAllLanes, own_scale, b, kLanes);
            encode_aside<Input>(aside & kOfBlock << b * kVectors, vectors, scale, task.coding, tally);
        }
    }
    finish(task.report, tally);
}

template <class Input, class Encode>
int launch_runs(const Task& task, const QuantizeOnGpu& gpu) {
    constexpr int kLanesOf128 = 128 / Input::kCount;
    const bool is_short = task.tiling.block_cols <= 128;
    const int64_t held = is_short ? kRunThreads / kLanesOf128 * 4 : kRunThreads / 32;  // by a block of threads
    const int64_t needed = ceil_div(task.tiling.blocks, held), most = int64_t{kRunResident} * gpu.processors;
    const Grid grid{static_cast<unsigned>(needed < most ? needed : most)};
    return is_short ? launch(quantize_runs<Input, Encode, kLanesOf128, 4, 1>, grid, kRunThreads, 0, gpu.stream, task)
                    : launch(quantize_runs<Input, Encode, 32, 1, kRunVectors>, grid, kRunThreads, 0, gpu.stream, task);
}

}  // namespace
}  // namespace fp8kernels
