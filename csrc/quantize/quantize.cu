// quantize on a GPU: one read of x where the scales are given or a block fits a tile; see README.md of the verb.
//
// Three kernels make codes:
//   quantize_tiles  a block of threads holds a tile of 16,384 elements: a block of scales that finds its own amax, or
//                   part of one whose scale is known. It can write the codes transposed too
//   quantize_runs   half a warp or a warp holds short rows that have a scale each: 1x128, rows (runs.cuh)
//   prepare_scales  before quantize_tiles where blocks are larger than a tile: the scales of blocks that have none.
//                   It reads x only where a scale is 0, which is decided here, not on the host
// A vector whose largest number is not below the fast path's limit is put aside, and encoded number by number.
//
// Instructions an element on sm_90, counted in the machine code of the fast path: bf16 16, of which 9 are the integer
// unit's; fp32 20 and 12; bf16 in 1x128 with the scale of its own amax 27. At a copy's speed an H200 has about 21 for
// bf16 (10 of them the integer unit's) and 34 for fp32.
#include "quantize/runs.cuh"
#include "quantize/task.cuh"
#include "quantize/transpose.cuh"
#include "quantize/transpose_codes.h"

namespace fp8kernels {
namespace {

// ---- scales of blocks that are larger than a tile -------------------------------------------------------------------

// The vectors of a thread in a tile.
template <class Input>
struct TileVectors {
    const Task& task;
    Stand stand;
    Place place;
    uint32_t* square;  // where codes are noted to be transposed, or null

    __device__ TileVectors(const Task& of, unsigned tile, uint32_t* to)
        : task(of), stand(of.tiling, Input::kCount), place(locate(of.tiling, tile)), square(to) {}

    __device__ int left(int i) const { return stand.left(task.tiling, place, i, Input::kCount); }
    __device__ const typename Input::T* x(int i) const {
        const Tiling& t = task.tiling;
        return static_cast<const typename Input::T*>(task.x) + (place.row + stand.row) * t.stride + place.col +
               stand.col + i * t.step;
    }
    __device__ uint8_t* codes(int i) const {
        const Tiling& t = task.tiling;
        return task.codes + (place.row + stand.row) * t.cols + place.col + stand.col + i * t.code_step;
    }
    __device__ void note(int i, int element, uint8_t code) const {
        if (!square) return;
        const int row = stand.row + i * task.tiling.step_rows, col = stand.col + element;
        reinterpret_cast<uint8_t*>(square + tile_word(row, col / 4))[col % 4] = code;
    }

    // Reads what can be held and zeros, with a bit each of `held`; returns the bits of what has to be put aside.
    __device__ __forceinline__ unsigned load_all(uint4 (&v)[Input::kSteps], unsigned& held) const {
        unsigned aside = 0;
        const typename Input::T* next = x(0);
        held = 0;
#pragma unroll
        for (int i = 0; i < Input::kSteps; ++i, next += task.tiling.step) {
            const int count = left(i);
            const bool holds = count == Input::kCount && task.tiling.whole;
            v[i] = holds ? load<Input>(next) : make_uint4(0, 0, 0, 0);
            if (holds) {
                held |= 1u << i;
            } else if (count > 0) {
                aside |= 1u << i;
            }
        }
        return aside;
    }

    // The largest |x|, or the largest finite one, of what this thread has of the tile.
    __device__ __forceinline__ float largest(uint4 (&v)[Input::kSteps], unsigned aside, bool finite_only) const {
        float size = aside ? largest_aside<Input>(aside, *this, finite_only) : 0.0f;
#pragma unroll
        for (int i = 0; i < Input::kSteps; ++i) {
            size = ptx::max_nan(size, finite_only ? largest_finite_of<Input>(v[i]) : largest_of<Input>(v[i]));
            ptx::forget(v[i]);
        }
        return size;
    }
};

template <class Input>
__global__ void __launch_bounds__(Input::kThreads, Input::kResident) prepare_scales(const Task task) {
    const Tiling& t = task.tiling;
    const bool one = t.blocks == 1;
    if (one && task.scale_in[0] != 0.0f) {
        if (blockIdx.x == 0 && threadIdx.x == 0) {
            *task.scale_out = task.decodes(task.divides(task.scale_in[0], 0.0f));
        }
        return;
    }
    float most = 0.0f;
    for (unsigned tile = blockIdx.x; tile < t.tiles; tile += gridDim.x) {
        const TileVectors<Input> vectors(task, tile, nullptr);
        if (!one && task.scale_in[vectors.place.block] != 0.0f) continue;
        uint4 v[Input::kSteps];
        unsigned held;
        const unsigned aside = vectors.load_all(v, held);
        float size = vectors.largest(v, aside, false);
        if (!is_finite(size)) size = vectors.largest(v, aside, true);
        most = fmaxf(most, size);
        if (!one) {
            const uint32_t bits = block_largest(size);
            if (threadIdx.x == 0) atomicMax(reinterpret_cast<unsigned*>(task.scale_out + vectors.place.block), bits);
        }
    }
    Workspace* all = task.report.workspace;
    const uint32_t bits = block_largest(most);
    if (one && threadIdx.x == 0) atomicMax(&all->finite, bits);
    if (!last_to_arrive(all)) return;
    if (threadIdx.x == 0) all->arrived = 0;
    for (int64_t b = threadIdx.x; b < t.blocks; b += Input::kThreads) {
        const unsigned found = __ldcg(one ? &all->finite : reinterpret_cast<unsigned*>(task.scale_out + b));
        task.scale_out[b] = task.decodes(task.divides(task.scale_in[b], float_from_bits(found)));
        if (one) all->finite = 0;
    }
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

template <class Input, class Encode, bool kTransposes>
__global__ void __launch_bounds__(Input::kThreads, Input::kResident) quantize_tiles(const Task task) {
    constexpr int kCount = Input::kCount;
    __shared__ uint32_t table[Encode::kTable];
    const Encode encode(task.coding, table, threadIdx.x, Input::kThreads);
    uint32_t* const square = kTransposes ? reinterpret_cast<uint32_t*>(dynamic_shared()) : nullptr;
    __syncthreads();

    const Tiling& t = task.tiling;
    Tally tally;
    for (unsigned tile = blockIdx.x; tile < t.tiles; tile += gridDim.x) {
        const TileVectors<Input> vectors(task, tile, square);
        uint4 v[Input::kSteps];
        unsigned held, aside = vectors.load_all(v, held);

        float scale;
        const int64_t block = vectors.place.block;
        if (task.prepared) {
            scale = task.divides_as(task.scale_out[block]);
        } else {
            const float amax = float_from_bits(block_largest(vectors.largest(v, aside, false)));
            float finite = amax;
            if (!is_finite(amax)) finite = float_from_bits(block_largest(vectors.largest(v, aside, true)));
            scale = task.divides(task.scale_in[block], finite);
            if (threadIdx.x == 0) {
                task.scale_out[block] = task.decodes(scale);
                task.amax[block] = amax;
            }
        }

        const Divisor d = divisor(scale, task.coding);
        float amax = aside ? largest_aside<Input>(aside, vectors, false) : 0.0f;
        uint8_t* next = vectors.codes(0);
#pragma unroll
        for (int i = 0; i < Input::kSteps; ++i) {
            uint8_t* const to = next;
            next += t.code_step;
            if (!(held >> i & 1)) continue;
            float numbers[kCount];
            uint32_t signs[kCount / 4], codes[kCount / 4];
            Input::unpack(v[i], numbers);
            const float size = largest(numbers);
            amax = ptx::max_nan(amax, size);
            if (!(size < d.limit)) {
                aside |= 1u << i;
                continue;
            }
            Input::signs(v[i], signs);
            encode_fast<Input::kTurns>(numbers, signs, d, encode, codes, tally);
            store(to, codes);
            if (kTransposes) {
#pragma unroll
                for (int w = 0; w < kCount / 4; ++w)
                    square[tile_word(vectors.stand.row + i * t.step_rows, vectors.stand.col / 4 + w)] = codes[w];
            }
        }
        tally.raise(amax);

        unsigned same = tile;
        ptx::forget(same);  // what is rarely needed is found again, not kept
        const TileVectors<Input> again(task, same, square);
        encode_aside<Input>(aside, again, scale, task.coding, tally);
        if (task.prepared && t.blocks > 1) {
            const uint32_t bits = block_largest(amax);
            if (threadIdx.x == 0) atomicMax(reinterpret_cast<unsigned*>(task.amax + again.place.block), bits);
        }
        if (kTransposes) {
            const Place& p = again.place;
            __syncthreads();
            write_transposed(square, task.codes_t, t.rows, p.row, p.col, p.rows, p.cols);
            __syncthreads();
        }
    }
    finish(task.report, tally);
}

// ---- the host's part ------------------------------------------------------------------------------------------------

template <class Input, class Encode>
int launch_tiles(Task task, const QuantizeOnGpu& gpu) {
    const Tiling& t = task.tiling;
    if (t.tiles > INT32_MAX) return cudaErrorInvalidValue;
    const int64_t most = int64_t{Input::kResident} * gpu.processors;
    const Grid grid{static_cast<unsigned>(t.tiles < most ? t.tiles : most)};
    task.prepared = t.across * t.down > 1;
    if (task.prepared) {
        int error = cudaSuccess;
        if (t.blocks == 1) {
            task.report.amax = task.amax;
        } else {
            const auto bytes = static_cast<size_t>(t.blocks) * sizeof(float);
            const auto stream = static_cast<cudaStream_t>(gpu.stream);
            error = cudaMemsetAsync(task.scale_out, 0, bytes, stream);
            if (error == cudaSuccess) error = cudaMemsetAsync(task.amax, 0, bytes, stream);
        }
        if (error == cudaSuccess) error = launch(prepare_scales<Input>, grid, Input::kThreads, 0, gpu.stream, task);
        if (error != cudaSuccess) return error;
    }
    return task.codes_t
               ? launch(quantize_tiles<Input, Encode, true>, grid, Input::kThreads, kTileBytes, gpu.stream, task)
               : launch(quantize_tiles<Input, Encode, false>, grid, Input::kThreads, 0, gpu.stream, task);
}

template <class Input, class Encode>
int run(const QuantizeArgs& args, const QuantizeOnGpu& gpu) {
    constexpr int kCount = Input::kCount;
    constexpr int64_t kElement = sizeof(typename Input::T), kRow = int64_t{Input::kThreads} * kCount;
    const Tiling matrix = blocks_of(args.rows, args.cols, args.row_stride, args.grid_rows, args.grid_cols);
    Tiling t = flattened(matrix);
    const bool runs = t.block_rows == 1 && t.block_cols <= 32 * kRunVectors * kCount;
    const bool square = matrix.block_rows <= kTile && matrix.block_cols <= kTile;
    const bool transposes = gpu.codes_t && (t.blocks == 1 || (square && !runs));
    if (transposes) {
        t = matrix;
        cut(t, Input::kThreads, Input::kSteps, kCount, kTile, kTile);
    } else if (!runs) {
        cut(t, Input::kThreads, Input::kSteps, kCount, t.block_rows, t.block_cols);
        const int64_t steps = ceil_div(t.block_cols, kRow * Input::kResident * gpu.processors);
        if (t.blocks == 1 && t.block_rows == 1 && t.across > 1 && steps < Input::kSteps) {
            cut(t, Input::kThreads, Input::kSteps, kCount, 1, steps * kRow);  // smaller tiles, for every multiprocessor
        }
    }
    const auto at = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
    t.whole = at(args.x) % 16 == 0 && at(args.codes) % kCount == 0 &&
              (t.rows == 1 || (t.stride * kElement % 16 == 0 && t.cols % kCount == 0)) &&
              (t.grid_cols == 1 || t.block_cols % kCount == 0);

    Task task{};
    task.x = args.x, task.codes = args.codes, task.codes_t = transposes ? gpu.codes_t : nullptr;
    task.scale_in = args.scale_in, task.scale_out = args.scale_out, task.amax = args.amax;
    task.tiling = t;
    task.coding = coding(args.fmt, args.saturate, args.carrier);
    task.target = args.target, task.rule = args.rule;
    task.report = {gpu.workspace, args.rows * args.cols, args.counts, nullptr, gpu.pending, gpu.counters};
    const int error =
        runs && !transposes ? launch_runs<Input, Encode>(task, gpu) : launch_tiles<Input, Encode>(task, gpu);
    if (error != cudaSuccess || !gpu.codes_t || transposes) return error;
    return transpose_codes_cuda(args.codes, gpu.codes_t, args.rows, args.cols, gpu.processors, gpu.stream);
}

template <class Input>
int run_input(const QuantizeArgs& args, const QuantizeOnGpu& gpu) {
    return args.fmt == FormatId::hif8 ? run<Input, EncodeByTable>(args, gpu) : run<Input, EncodeByAdder>(args, gpu);
}

}  // namespace

int quantize_cuda(const QuantizeArgs& args, const QuantizeOnGpu& gpu) {
    switch (args.type) {
        case InputType::fp32: return run_input<Fp32Input>(args, gpu);
        case InputType::bf16: return run_input<Bf16Input>(args, gpu);
        case InputType::fp16: return run_input<Fp16Input>(args, gpu);
    }
    return cudaErrorInvalidValue;
}

}  // namespace fp8kernels
