// gemm for few rows of x: w goes once from memory to the registers, is decoded there and multiplied as fp16.
//
// The matrix unit takes 16 rows of w as its larger operand and 8 rows of x as its smaller one. A lane loads 16
// neighbouring codes of a row, four lanes 64; as a sum does not mind the order of K, those 16 codes are what the lane
// gives to four products, and x in shared memory is read at the same 16 places. So w is never moved between lanes.
//
// Each warp keeps one step of w in flight: a register is loaded for the next step as soon as it is decoded. K is cut
// over blocks; the last of a tile to arrive adds the partial sums in the order of the slices, whichever it is, so that
// the same product always gives the same bits.
#include "gemm_stream/stream.h"

#include <cuda_runtime.h>

#include "cuda/launch.cuh"
#include "gemm_sm90/epilogue.cuh"
#include "gemm_stream/decode.cuh"

namespace fp8kernels {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kChunk = 64;      // elements of K that four lanes load at a time, and four products sum up
constexpr int kWide = 16;       // bytes of one load
constexpr int kRowPadding = 8;  // halves; makes the rows of x start in different banks
constexpr size_t kSharedOfSm89 = 99 << 10;
constexpr size_t kAlignment = 1024;  // bytes that aligning the dynamic shared memory may cost
constexpr int kOutPadding = 4;       // floats; the same for the sums on their way out

template <class F, int kRowsOfX, bool kAligned_>
struct Shape {
    using W = F;
    static constexpr bool kAligned = kAligned_;         // rows of x and w start at multiples of 16 bytes
    static constexpr int kM = kRowsOfX;                 // a multiple of 8
    static constexpr int kGroups = kM / 8;              // of rows of x
    static constexpr int kTiles = kM <= 16 ? 1 : 2;     // of 16 rows of w, a warp
    static constexpr int kN = kWarps * 16 * kTiles;     // rows of w, a block
    static constexpr int kStep = kM == 64 ? 128 : 256;  // elements of K
    static constexpr int kChunks = kStep / kChunk;
    static constexpr int kRowOfX = kStep + kRowPadding;                               // halves
    static constexpr int kBuffer = kM * kRowOfX;                                      // halves
    static constexpr int kLoadsOfX = (kM * kStep / kWide + kThreads - 1) / kThreads;  // a thread
    static constexpr int kRowOfOut = kN + kOutPadding;                                // floats
    static constexpr size_t kShared = kTableBytes + 2 * kBuffer * sizeof(uint16_t);
    static_assert(kM * kRowOfOut * sizeof(float) <= kShared, "the sums go through the same memory");
    static_assert(kShared + kAlignment <= kSharedOfSm89, "one block of sm_89 has to hold it");
};

struct Task {
    StreamOperand x, w;
    int64_t m, n, k;
    int64_t steps, steps_per_slice;
    int slices;
    float* partials;    // [slices, tiles, kTiles * kGroups, kThreads, 4]
    unsigned* tickets;  // [tiles], zero
    GemmEpilogue epilogue;
};

// The first `left` bytes of sixteen; zeros, which are zero in every format, in place of the others.
__device__ __forceinline__ uint4 first_bytes(const uint4& v, int left) {
    const auto mask = [&](int bytes) { return bytes <= 0 ? 0u : bytes >= 4 ? 0xFFFFFFFFu : (1u << 8 * bytes) - 1; };
    return make_uint4(v.x & mask(left), v.y & mask(left - 4), v.z & mask(left - 8), v.w & mask(left - 12));
}

// Sixteen bytes at any address, of which `left` are there. Words are read whole if any byte of them is there.
__device__ __forceinline__ uint4 load_anywhere(const uint8_t* from, int left) {
    const auto astray = static_cast<int>(reinterpret_cast<uintptr_t>(from) % 4);
    const auto* at = reinterpret_cast<const uint32_t*>(from - astray);
    uint32_t words[5];
#pragma unroll
    for (int i = 0; i < 5; ++i) words[i] = 4 * i < left + astray ? __ldg(at + i) : 0;
    const auto joined = [&](int i) { return __funnelshift_r(words[i], words[i + 1], 8 * astray); };
    return make_uint4(joined(0), joined(1), joined(2), joined(3));
}

// Sixteen codes of a row from k on, with zeros beyond its end.
template <bool kAligned>
__device__ __forceinline__ uint4 load_codes(const uint8_t* row, int64_t k, int64_t end) {
    if (k >= end) return make_uint4(0, 0, 0, 0);
    const int left = end - k < kWide ? static_cast<int>(end - k) : kWide;
    const uint4 v = kAligned ? ptx::load_once(row + k) : load_anywhere(row + k, left);
    return left == kWide ? v : first_bytes(v, left);
}

// The rows of w of one lane: row and row + 8 of each tile of 16.
template <class S>
struct RowsOfW {
    const uint8_t* rows[S::kTiles][2];
    uint4 codes[S::kTiles][2][S::kChunks];

    __device__ __forceinline__ void point(const Task& task, int64_t first, uint32_t lane) {
#pragma unroll
        for (int i = 0; i < S::kTiles; ++i) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int64_t row = first + 16 * i + 8 * h + lane / 4;
                rows[i][h] = task.w.codes + (row < task.n ? row : task.n - 1) * task.w.row_stride;
            }
        }
    }

    __device__ __forceinline__ void load(int i, int chunk, int64_t k, int64_t end) {
#pragma unroll
        for (int h = 0; h < 2; ++h) codes[i][h][chunk] = load_codes<S::kAligned>(rows[i][h], k + kChunk * chunk, end);
    }
};

// The rows of x of one step: codes in registers, then halves in shared memory.
template <class S>
struct RowsOfX {
    uint4 codes[S::kLoadsOfX];

    static constexpr int kAcross = S::kStep / kWide;

    __device__ __forceinline__ void load(const Task& task, int64_t k) {
#pragma unroll
        for (int i = 0; i < S::kLoadsOfX; ++i) {
            const int at = i * kThreads + static_cast<int>(threadIdx.x), row = at / kAcross;
            codes[i] = make_uint4(0, 0, 0, 0);
            if (row < task.m) {
                codes[i] =
                    load_codes<S::kAligned>(task.x.codes + row * task.x.row_stride, k + at % kAcross * kWide, task.k);
            }
        }
    }

    __device__ __forceinline__ void store(const uint8_t* table, uint32_t place, uint16_t* to) const {
#pragma unroll
        for (int i = 0; i < S::kLoadsOfX; ++i) {
            const int at = i * kThreads + static_cast<int>(threadIdx.x), row = at / kAcross;
            if (row >= S::kM) continue;
            uint4 halves[2];
            look_up(table, place, codes[i].x, halves[0].x, halves[0].y);
            look_up(table, place, codes[i].y, halves[0].z, halves[0].w);
            look_up(table, place, codes[i].z, halves[1].x, halves[1].y);
            look_up(table, place, codes[i].w, halves[1].z, halves[1].w);
            auto* there = reinterpret_cast<uint4*>(to + row * S::kRowOfX + at % kAcross * kWide);
            there[0] = halves[0];
            there[1] = halves[1];
        }
    }
};

// a[.] of four products from sixteen codes of row g and sixteen of row g + 8.
template <class F>
__device__ __forceinline__ void decode(const uint8_t* table, uint32_t place, const uint4& upper, const uint4& lower,
                                       uint32_t (&a)[4][4]) {
    Decoder<F>::run(table, place, upper.x, a[0][0], a[0][2]);
    Decoder<F>::run(table, place, lower.x, a[0][1], a[0][3]);
    Decoder<F>::run(table, place, upper.y, a[1][0], a[1][2]);
    Decoder<F>::run(table, place, lower.y, a[1][1], a[1][3]);
    Decoder<F>::run(table, place, upper.z, a[2][0], a[2][2]);
    Decoder<F>::run(table, place, lower.z, a[2][1], a[2][3]);
    Decoder<F>::run(table, place, upper.w, a[3][0], a[3][2]);
    Decoder<F>::run(table, place, lower.w, a[3][1], a[3][3]);
}

// Adds up what the slices of this tile have summed; true for the block that did it, which is the last to arrive.
template <class S>
__device__ bool gather(const Task& task, float (&sums)[S::kTiles][S::kGroups][4]) {
    __shared__ bool is_last;
    constexpr int kPieces = S::kTiles * S::kGroups;
    const int64_t tiles = gridDim.x;
    const auto place = [&](int64_t slice, int piece) {
        return reinterpret_cast<float4*>(task.partials) + ((slice * tiles + blockIdx.x) * kPieces + piece) * kThreads +
               threadIdx.x;
    };
#pragma unroll
    for (int i = 0; i < S::kTiles; ++i) {
#pragma unroll
        for (int j = 0; j < S::kGroups; ++j) {
            __stcg(place(blockIdx.y, i * S::kGroups + j),
                   make_float4(sums[i][j][0], sums[i][j][1], sums[i][j][2], sums[i][j][3]));
        }
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(&task.tickets[blockIdx.x], 1u) + 1 == static_cast<unsigned>(task.slices);
    __syncthreads();
    if (!is_last) return false;
    __threadfence();
#pragma unroll
    for (int i = 0; i < S::kTiles; ++i) {
#pragma unroll
        for (int j = 0; j < S::kGroups; ++j) {
            float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
            for (int slice = 0; slice < task.slices; ++slice) {
                const float4 part = __ldcg(place(slice, i * S::kGroups + j));
                total = make_float4(total.x + part.x, total.y + part.y, total.z + part.z, total.w + part.w);
            }
            sums[i][j][0] = total.x, sums[i][j][1] = total.y, sums[i][j][2] = total.z, sums[i][j][3] = total.w;
        }
    }
    return true;
}

// The sums of a block, through shared memory, so that a thread finishes eight neighbours of a row of out.
template <class S>
__device__ void write(const Task& task, const float (&sums)[S::kTiles][S::kGroups][4], float* shared) {
    const uint32_t lane = threadIdx.x % 32u, warp = threadIdx.x / 32u;
    __syncthreads();  // the table and x are no longer read
#pragma unroll
    for (int i = 0; i < S::kTiles; ++i) {
#pragma unroll
        for (int j = 0; j < S::kGroups; ++j) {
#pragma unroll
            for (uint32_t c = 0; c < 4; ++c) {
                const uint32_t row = 8 * j + 2 * (lane % 4) + c % 2;
                const uint32_t column = 16 * (warp * S::kTiles + i) + lane / 4 + 8 * (c / 2);
                shared[row * S::kRowOfOut + column] = sums[i][j][c];
            }
        }
    }
    __syncthreads();
    constexpr int kAcross = S::kN / kTogether;
    EpilogueTally tally;
    for (int at = static_cast<int>(threadIdx.x); at < S::kM * kAcross; at += kThreads) {
        const int row = at / kAcross, column = at % kAcross * kTogether;
        const auto* from = reinterpret_cast<const float4*>(shared + row * S::kRowOfOut + column);
        const float4 a = from[0], b = from[1];
        float eight[kTogether] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
        finish_sums<1>(eight, row, static_cast<int64_t>(blockIdx.x) * S::kN + column, task.epilogue, tally);
    }
    if (task.epilogue.writes_codes) note(tally, task.epilogue);
}

template <class S>
__global__ void __launch_bounds__(kThreads, S::kTiles == 1 ? 2 : 1) stream_kernel(const __grid_constant__ Task task) {
    using W = typename S::W;
    uint8_t* table = dynamic_shared();
    auto* x_halves = reinterpret_cast<uint16_t*>(table + kTableBytes);
    const uint32_t lane = threadIdx.x % 32u, warp = threadIdx.x / 32u, t = lane % 4;
    const uint32_t place_of_w = 4 * lane;
    const bool one_table = Decoder<W>::kLooksUp && task.x.format == W::kId;
    const uint32_t place_of_x = 4 * lane + (one_table ? 0 : kTableOfX);
    const int64_t first = blockIdx.y * task.steps_per_slice;
    const int64_t last = first + task.steps_per_slice < task.steps ? first + task.steps_per_slice : task.steps;

    RowsOfW<S> w;
    RowsOfX<S> x;
    w.point(task, static_cast<int64_t>(blockIdx.x) * S::kN + 16 * S::kTiles * warp, lane);
    int64_t k = first * S::kStep + kWide * t;  // of this lane's first chunk
#pragma unroll
    for (int c = 0; c < S::kChunks; ++c) {
#pragma unroll
        for (int i = 0; i < S::kTiles; ++i) w.load(i, c, k, task.k);
    }
    x.load(task, first * S::kStep);
    if (Decoder<W>::kLooksUp) fill_table(table, 0, W::kId);
    if (!one_table) fill_table(table, kTableOfX, task.x.format);
    __syncthreads();
    x.store(table, place_of_x, x_halves);

    float sums[S::kTiles][S::kGroups][4] = {};
    for (int64_t step = first; step < last; ++step) {
        const bool more = step + 1 < last;
        const uint16_t* here = x_halves + ((step - first) & 1) * S::kBuffer;
        __syncthreads();  // this step's x is there, and the next one's place is free
        k += S::kStep;
        if (more) x.load(task, (step + 1) * S::kStep);
#pragma unroll
        for (int c = 0; c < S::kChunks; ++c) {
            uint32_t a[S::kTiles][4][4];
#pragma unroll
            for (int i = 0; i < S::kTiles; ++i) {
                decode<W>(table, place_of_w, w.codes[i][0][c], w.codes[i][1][c], a[i]);
                if (more) w.load(i, c, k, task.k);
            }
#pragma unroll
            for (int j = 0; j < S::kGroups; ++j) {
                const auto* from =
                    reinterpret_cast<const uint4*>(here + (8 * j + lane / 4) * S::kRowOfX + kChunk * c + kWide * t);
                const uint4 b0 = from[0], b1 = from[1];
#pragma unroll
                for (int i = 0; i < S::kTiles; ++i) {
                    ptx::multiply_add(sums[i][j], a[i][0], b0.x, b0.y);
                    ptx::multiply_add(sums[i][j], a[i][1], b0.z, b0.w);
                    ptx::multiply_add(sums[i][j], a[i][2], b1.x, b1.y);
                    ptx::multiply_add(sums[i][j], a[i][3], b1.z, b1.w);
                }
            }
        }
        if (more) x.store(table, place_of_x, x_halves + ((step + 1 - first) & 1) * S::kBuffer);
    }
    if (task.slices > 1 && !gather<S>(task, sums)) return;
    write<S>(task, sums, reinterpret_cast<float*>(table));
}

template <class F, int kM, bool kAligned>
int start(const StreamPlan& plan, const Task& task, void* stream) {
    using S = Shape<F, kM, kAligned>;
    const Grid grid{static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.slices)};
    return launch(stream_kernel<S>, grid, kThreads, S::kShared, stream, task);
}

template <class F, bool kAligned>
int start_rows(const StreamPlan& plan, const Task& task, void* stream) {
    switch (plan.tile_m) {
        case 8: return start<F, 8, kAligned>(plan, task, stream);
        case 16: return start<F, 16, kAligned>(plan, task, stream);
        case 32: return start<F, 32, kAligned>(plan, task, stream);
        default: return start<F, 64, kAligned>(plan, task, stream);
    }
}

template <class F>
int start_format(const StreamPlan& plan, const Task& task, void* stream) {
    const auto aligned = [](const StreamOperand& operand) {
        return reinterpret_cast<uintptr_t>(operand.codes) % kWide == 0 && operand.row_stride % kWide == 0;
    };
    return aligned(task.x) && aligned(task.w) ? start_rows<F, true>(plan, task, stream)
                                              : start_rows<F, false>(plan, task, stream);
}

}  // namespace

int gemm_stream_cuda(const StreamGemm& gemm, const GemmEpilogue& epilogue, void* workspace, void* stream) {
    const StreamPlan plan = plan_stream(gemm);
    Task task{};
    task.x = gemm.x, task.w = gemm.w;
    task.m = gemm.m, task.n = gemm.n, task.k = gemm.k;
    task.steps = plan.steps;
    task.steps_per_slice = plan.steps_per_slice;
    task.slices = plan.slices;
    task.epilogue = epilogue;
    if (plan.slices > 1) {
        task.partials = static_cast<float*>(workspace);
        task.tickets = reinterpret_cast<unsigned*>(static_cast<uint8_t*>(workspace) + plan.partials());
        const int error =
            cudaMemsetAsync(task.tickets, 0, plan.workspace() - plan.partials(), static_cast<cudaStream_t>(stream));
        if (error != cudaSuccess) return error;
    }
    switch (gemm.w.format) {
        case FormatId::hif8: return start_format<HiF8>(plan, task, stream);
        case FormatId::e4m3: return start_format<E4M3>(plan, task, stream);
        default: return start_format<E5M2>(plan, task, stream);
    }
}

}  // namespace fp8kernels
