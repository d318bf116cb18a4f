// One persistent kernel for every product of FP8 codes on sm_90.
//
// A block has three warpgroups. The last one brings tiles of both operands to shared memory with the copy engine; the
// other two multiply them with wgmma. full[stage] says that a stage is there, empty[stage] that it was read. Sums stay
// in registers and leave through a strip of shared memory a warp, so that the epilogue reads and writes rows.
//
// Either both warpgroups work on one tile, 64 rows each, or (kTurns) they take tiles in turn: while one writes its
// tile, the other multiplies the next. No more is needed for that than the order in which tiles arrive.
//
// The 128-row side of a tile is called a, the other one b. As a rule a is x and b is w; for few rows of x it is the
// other way round (kSwapped), so that w, which is what takes time to read, fills whole tiles.
//
// The tensor cores of sm_90 keep about 14 bits of a sum of FP8 products. kPromote takes the sums of every 128 of K out
// and adds them up in fp32, with the block scales where there are some.
#pragma once

#include <cuda_runtime.h>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "gemm_sm90/epilogue.cuh"
#include "gemm_sm90/gemm.h"

namespace fp8kernels {

struct GemmTask {
    int64_t rows_a, rows_b;
    int tiles_a, tiles_b, splits;
    int steps, steps_of_split;   // along K, 128 at a time
    const float* block_scale_a;  // [rows_a, steps], or null
    const float* block_scale_b;  // [rows_b / 128, steps]
    float* partials;             // [tiles, splits, registers, 256]
    unsigned* tickets;           // [tiles], zero
    GemmEpilogue epilogue;
};

namespace gemm_sm90 {

constexpr int kRows = 128, kDepth = 128;  // of a tile of a, and bytes of K in a stage: one row of the swizzle
constexpr int kConsumers = 256, kThreads = 384;
// 64 Ki registers a processor: 168 a thread at the start, of which the producer needs few
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
constexpr int kBand = 8;  // tiles of a that are worked on together, so that tiles of b stay in L2

template <int kColumns_, int kStages_, bool kTurns_, bool kSwapped_, bool kPromote_>
struct Config {
    static constexpr int kColumns = kColumns_, kStages = kStages_;
    static constexpr bool kTurns = kTurns_, kSwapped = kSwapped_, kPromote = kPromote_;

    static constexpr int kTeam = kTurns ? 128 : 256;              // consumers that work on one tile
    static constexpr int kHalves = kTurns ? 2 : 1;                // times 64 rows that one warpgroup has of it
    static constexpr int kStrip = kColumns < 32 ? kColumns : 32;  // columns that a warp stages at a time
    static constexpr int kStageA = kRows * kDepth, kStageB = kColumns * kDepth;  // bytes
    static constexpr int kPitch = kStrip + 8;  // floats; rows of a strip start in different banks
    static constexpr int kStaging = 8 * 16 * kPitch * 4;
    static constexpr int kShared = kStages * (kStageA + kStageB) + kStaging + 2 * kStages * 8 + 16;
    static constexpr int kSums = kColumns / 2;  // of one thread and one half
};

// The tile and the part of K that an item of work stands for.
struct Item {
    int a, b, tile, split, first, last;  // tile indices; steps first .. last - 1

    __device__ __forceinline__ Item(const GemmTask& task, int64_t index) {
        const int tiles = task.tiles_a * task.tiles_b;
        tile = static_cast<int>(index % tiles);
        split = static_cast<int>(index / tiles);
        const int in_band = kBand * task.tiles_b, band = tile / in_band, start = band * kBand;
        const int high = min(task.tiles_a - start, kBand);
        a = start + tile % in_band % high;
        b = tile % in_band / high;
        first = split * task.steps_of_split;
        last = min(first + task.steps_of_split, task.steps);
    }
};

// Runs the pipeline of stages around: which one comes next, and in which round.
struct Turn {
    int stage = 0;
    uint32_t round = 0;  // parity

    template <int kStages>
    __device__ __forceinline__ void next() {
        if (++stage == kStages) {
            stage = 0;
            round ^= 1;
        }
    }

    // Past the stages of a tile that is somebody else's.
    template <int kStages>
    __device__ __forceinline__ void skip(int count) {
        const int to = stage + count;
        round ^= static_cast<uint32_t>(to / kStages) & 1;
        stage = to % kStages;
    }
};

template <class C>
struct Shared {
    uint8_t *a, *b;
    float* staging;
    uint64_t *full, *empty;
    int* last;

    __device__ __forceinline__ explicit Shared(uint8_t* base) {
        a = base;
        b = a + C::kStages * C::kStageA;
        staging = reinterpret_cast<float*>(b + C::kStages * C::kStageB);
        full = reinterpret_cast<uint64_t*>(reinterpret_cast<uint8_t*>(staging) + C::kStaging);
        empty = full + C::kStages;
        last = reinterpret_cast<int*>(empty + C::kStages);
    }
};

template <class C>
__device__ __forceinline__ void produce(const CUtensorMap* a_map, const CUtensorMap* b_map, const GemmTask& task,
                                        const Shared<C>& shared) {
    const int64_t items = static_cast<int64_t>(task.tiles_a) * task.tiles_b * task.splits;
    Turn turn;
    for (int64_t index = blockIdx.x; index < items; index += gridDim.x) {
        const Item item(task, index);
        for (int step = item.first; step < item.last; ++step) {
            ptx::barrier_wait(&shared.empty[turn.stage], turn.round ^ 1);
            uint64_t* full = &shared.full[turn.stage];
            ptx::barrier_expect(full, C::kStageA + C::kStageB);
            ptx::load_box(a_map, full, shared.a + turn.stage * C::kStageA, step * kDepth, item.a * kRows);
            ptx::load_box(b_map, full, shared.b + turn.stage * C::kStageB, step * kDepth, item.b * C::kColumns);
            turn.next<C::kStages>();
        }
    }
}

// sums (+)= the products of one stage; four instructions of 32 bytes of K.
template <class C, class A, class B>
__device__ __forceinline__ void multiply(float (&sums)[C::kSums], uint32_t a, uint32_t b, bool add) {
    ptx::hold(sums);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDepth; k += 32) {
        ptx::Wgmma<A, B, C::kColumns>::run(sums, ptx::swizzled_matrix(a + k), ptx::swizzled_matrix(b + k),
                                           add || k > 0);
    }
}

// The sums of one item of work, straight from the tensor cores.
template <class C, class A, class B>
__device__ __forceinline__ void multiply_item(float (&sums)[C::kHalves][C::kSums], const Item& item,
                                              const Shared<C>& shared, uint32_t a, Turn& turn, int lane) {
    const uint32_t b = ptx::shared_address(shared.b);
    int previous = -1;
    for (int step = item.first; step < item.last; ++step) {
        ptx::barrier_wait(&shared.full[turn.stage], turn.round);
#pragma unroll
        for (int half = 0; half < C::kHalves; ++half) {
            multiply<C, A, B>(sums[half], a + half * 64 * kDepth + turn.stage * C::kStageA, b + turn.stage * C::kStageB,
                              step > item.first);
        }
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();  // the products before these are done, and their stage is free
        if (previous >= 0 && lane == 0) ptx::barrier_arrive(&shared.empty[previous]);
        previous = turn.stage;
        turn.next<C::kStages>();
    }
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int half = 0; half < C::kHalves; ++half) ptx::hold(sums[half]);
    if (lane == 0) ptx::barrier_arrive(&shared.empty[previous]);
}

// The same, with the sums of every 128 of K added up in fp32. While one warpgroup adds, the other multiplies.
template <class C, class A, class B>
__device__ __forceinline__ void multiply_carefully(float (&sums)[C::kSums], const GemmTask& task, const Item& item,
                                                   const Shared<C>& shared, uint32_t a, Turn& turn, int64_t row,
                                                   int lane) {
    const uint32_t b = ptx::shared_address(shared.b);
    const float* scale_b = task.block_scale_b + static_cast<int64_t>(item.b) * task.steps;
#pragma unroll
    for (int i = 0; i < C::kSums; ++i) sums[i] = 0.0f;
    for (int step = item.first; step < item.last; ++step) {
        float scale[2] = {1.0f, 1.0f};  // of this thread's two rows
        if (task.block_scale_a != nullptr) {
            const float both = __ldg(scale_b + step);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int64_t at = row + 8 * half < task.rows_a ? row + 8 * half : 0;
                scale[half] = __ldg(task.block_scale_a + at * task.steps + step) * both;
            }
        }
        float part[C::kSums];
        ptx::barrier_wait(&shared.full[turn.stage], turn.round);
        multiply<C, A, B>(part, a + turn.stage * C::kStageA, b + turn.stage * C::kStageB, false);
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
        ptx::hold(part);
        if (lane == 0) ptx::barrier_arrive(&shared.empty[turn.stage]);
        turn.next<C::kStages>();
#pragma unroll
        for (int i = 0; i < C::kSums; ++i) sums[i] += part[i] * scale[i % 4 / 2];
    }
}

// With K split: leaves the sums of this part for the last one to come, which adds them up in order. Returns whether
// this is the last; it then holds the sums of all parts.
template <class C>
__device__ __forceinline__ bool gather_splits(float (&sums)[C::kHalves][C::kSums], const GemmTask& task,
                                              const Item& item, const Shared<C>& shared, int team) {
    constexpr int64_t kPart = kRows * C::kColumns;
    const int member = static_cast<int>(threadIdx.x) % C::kTeam;
    float* tile = task.partials + static_cast<int64_t>(item.tile) * task.splits * kPart + member;
    const auto at = [](int split, int half, int i) { return split * kPart + (half * C::kSums + i) * C::kTeam; };
#pragma unroll
    for (int half = 0; half < C::kHalves; ++half) {
#pragma unroll
        for (int i = 0; i < C::kSums; ++i) __stcg(&tile[at(item.split, half, i)], sums[half][i]);
    }
    __threadfence();
    ptx::named_barrier(1 + team, C::kTeam);
    volatile int* last = shared.last + team;
    if (member == 0) *last = atomicAdd(&task.tickets[item.tile], 1u) == static_cast<unsigned>(task.splits - 1);
    ptx::named_barrier(1 + team, C::kTeam);
    if (!*last) return false;
    __threadfence();
#pragma unroll
    for (int half = 0; half < C::kHalves; ++half) {
#pragma unroll
        for (int i = 0; i < C::kSums; ++i) {
            float sum = 0.0f;
            for (int split = 0; split < task.splits; ++split) sum += __ldcg(&tile[at(split, half, i)]);
            sums[half][i] = sum;
        }
    }
    return true;
}

// Sums leave a warp strip by strip: 16 rows of kStrip columns, written as wgmma holds them, read as rows of out.
template <class C>
__device__ __forceinline__ void write_rows(const float (&sums)[C::kSums], const GemmTask& task, const Item& item,
                                           float* strip, int64_t row, int lane, EpilogueTally& tally) {
    constexpr int kStrips = C::kColumns / C::kStrip, kEights = C::kStrip / 8;
    const int64_t first_column = static_cast<int64_t>(item.b) * C::kColumns;
#pragma unroll 1
    for (int s = 0; s < kStrips; ++s) {
#pragma unroll
        for (int which = 0; which < kStrips; ++which) {  // registers have constant indices
            if (which != s) continue;
#pragma unroll
            for (int j = 0; j < kEights; ++j) {
                const int i = 4 * (which * kEights + j);
                float* to = strip + lane / 4 * C::kPitch + 8 * j + 2 * (lane % 4);
                *reinterpret_cast<float2*>(to) = make_float2(sums[i], sums[i + 1]);
                *reinterpret_cast<float2*>(to + 8 * C::kPitch) = make_float2(sums[i + 2], sums[i + 3]);
            }
        }
        __syncwarp();
#pragma unroll 1
        for (int place = lane; place < 2 * C::kStrip; place += 32) {
            float eight[kTogether];
            if constexpr (C::kSwapped) {  // rows of the tile are columns of out
                const int column = place / 2, half = place % 2;
#pragma unroll
                for (int i = 0; i < kTogether; ++i) eight[i] = strip[(8 * half + i) * C::kPitch + column];
                finish_sums(eight, first_column + s * C::kStrip + column, row + 8 * half, task.epilogue, tally);
            } else {
                const int r = place / kEights, column = place % kEights * 8;
                const auto* from = reinterpret_cast<const float4*>(strip + r * C::kPitch + column);
                const float4 low = from[0], high = from[1];
                eight[0] = low.x, eight[1] = low.y, eight[2] = low.z, eight[3] = low.w;
                eight[4] = high.x, eight[5] = high.y, eight[6] = high.z, eight[7] = high.w;
                finish_sums(eight, row + r, first_column + s * C::kStrip + column, task.epilogue, tally);
            }
        }
        __syncwarp();
    }
}

template <class C, class A, class B>
__device__ __forceinline__ void consume(const GemmTask& task, const Shared<C>& shared) {
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    const int group = warp / 4, team = C::kTurns ? group : 0;
    const int first_row = C::kTurns ? 0 : group * 64;  // of this warpgroup in its tile
    const uint32_t a = ptx::shared_address(shared.a) + static_cast<uint32_t>(first_row * kDepth);
    const int64_t items = static_cast<int64_t>(task.tiles_a) * task.tiles_b * task.splits;
    float* strip = shared.staging + warp * 16 * C::kPitch;
    Turn turn;
    EpilogueTally tally;
    int count = 0;
    for (int64_t index = blockIdx.x; index < items; index += gridDim.x, ++count) {
        const Item item(task, index);
        if (C::kTurns && count % 2 != group) {
            turn.skip<C::kStages>(item.last - item.first);
            continue;
        }
        float sums[C::kHalves][C::kSums];
        const int64_t row = static_cast<int64_t>(item.a) * kRows + first_row + warp % 4 * 16;
        if constexpr (C::kPromote) {
            multiply_carefully<C, A, B>(sums[0], task, item, shared, a, turn, row + lane / 4, lane);
        } else {
            multiply_item<C, A, B>(sums, item, shared, a, turn, lane);
        }
        if (task.splits > 1 && !gather_splits<C>(sums, task, item, shared, team)) continue;
#pragma unroll
        for (int half = 0; half < C::kHalves; ++half) {
            write_rows<C>(sums[half], task, item, strip, row + half * 64, lane, tally);
        }
    }
    if (task.epilogue.writes_codes) note(tally, task.epilogue);
}

template <class C, class A, class B>
__global__ void __launch_bounds__(kThreads, 1)
    gemm_sm90_kernel(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
                     const __grid_constant__ GemmTask task) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(FP8K_EMULATE)
    const Shared<C> shared(dynamic_shared());
    if (threadIdx.x == 0) {
        ptx::prefetch_map(&a_map);
        ptx::prefetch_map(&b_map);
        for (int stage = 0; stage < C::kStages; ++stage) {
            ptx::barrier_init(&shared.full[stage], 1);
            ptx::barrier_init(&shared.empty[stage], C::kTeam / 32);
        }
        ptx::fence_barrier_init();
    }
    __syncthreads();
    if (threadIdx.x < kConsumers) {
        ptx::take_registers<kConsumerRegisters>();
        consume<C, A, B>(task, shared);
    } else {
        ptx::give_registers<kProducerRegisters>();
        if (threadIdx.x == kConsumers) produce<C>(&a_map, &b_map, task, shared);
    }
#endif
}

// Starts the kernel for one pair of formats; the three instances are compiled in files of their own.
template <class A, class B>
int start(GemmTile tile, const CUtensorMap& a_map, const CUtensorMap& b_map, const GemmTask& task, int processors,
          void* stream) {
    const auto go = [&](auto config) {
        using C = decltype(config);
        const int64_t items = static_cast<int64_t>(task.tiles_a) * task.tiles_b * task.splits;
        const Grid grid{static_cast<unsigned>(items < processors ? items : processors)};
        return launch(gemm_sm90_kernel<C, A, B>, grid, kThreads, C::kShared, stream, a_map, b_map, task);
    };
    switch (tile) {
        //                                     columns, stages, turns, swapped, promote
        case GemmTile::wide: return go(Config<256, 4, false, false, false>{});
        case GemmTile::turns: return go(Config<128, 6, true, false, false>{});
        case GemmTile::careful: return go(Config<128, 6, false, false, true>{});
        case GemmTile::rows16: return go(Config<16, 8, false, true, true>{});
        case GemmTile::rows32: return go(Config<32, 8, false, true, true>{});
        case GemmTile::rows64: return go(Config<64, 8, false, true, true>{});
    }
    return -1;
}

}  // namespace gemm_sm90
}  // namespace fp8kernels
