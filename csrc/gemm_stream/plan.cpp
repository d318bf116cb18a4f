// How the streaming gemm is cut: a pure function of the sizes and of the number of processors.
#include "gemm_stream/stream.h"

namespace fp8kernels {
namespace {

constexpr int kFewRows = 16;       // up to here a warp has 16 rows of w, beyond it 32, so that x is read half as often
constexpr int kMostSlices = 32;    // partial sums are written and read once a slice
constexpr int64_t kBlockCost = 2;  // steps' worth of time for a block to begin and to end

int64_t parts(int64_t size, int64_t part) { return (size + part - 1) / part; }

}  // namespace

size_t StreamPlan::partials() const {
    return slices == 1 ? 0 : static_cast<size_t>(slices * tiles) * tile_n * tile_m * sizeof(float);
}

size_t StreamPlan::workspace() const {
    return slices == 1 ? 0 : partials() + static_cast<size_t>(tiles) * sizeof(unsigned);
}

StreamPlan plan_stream(const StreamGemm& gemm) {
    StreamPlan plan{};
    plan.tile_m = gemm.m <= 8 ? 8 : gemm.m <= 16 ? 16 : gemm.m <= 32 ? 32 : 64;
    const bool few = plan.tile_m <= kFewRows;
    plan.tile_n = few ? 128 : 256;
    plan.step = plan.tile_m == 64 ? 128 : 256;  // so that x and the table fit the 99 KiB of sm_89
    plan.tiles = parts(gemm.n, plan.tile_n);
    plan.steps = parts(gemm.k, plan.step);
    plan.slices = 1;
    plan.steps_per_slice = plan.steps;
    const int64_t together = gemm.processors * (few ? 2 : 1);  // blocks that run at a time
    int64_t least = 0;
    for (int64_t slices = 1; slices <= kMostSlices && slices <= plan.steps; ++slices) {
        const int64_t steps = parts(plan.steps, slices);
        if (parts(plan.steps, steps) != slices) continue;  // the last ones would be empty
        const int64_t cost = parts(plan.tiles * slices, together) * (steps + kBlockCost);
        if (slices > 1 && cost >= least) continue;
        least = cost;
        plan.slices = static_cast<int>(slices);
        plan.steps_per_slice = steps;
    }
    return plan;
}

}  // namespace fp8kernels
