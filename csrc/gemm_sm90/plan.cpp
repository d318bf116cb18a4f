// Which tile a product on a GPU gets: a pure function, so that every choice can be read, tested and argued with.
//
// The costs are counted in units of one 128 x 128 x 128 product on one processor, where an epilogue of a 128 x 128 tile
// counts kEpilogue. They are estimates from the sizes; bench rows decide about them.
#include "gemm_sm90/gemm.h"

namespace fp8kernels {
namespace {

constexpr int64_t kRows = 128, kDepth = 128;  // of every tile, and of one step along K
constexpr int64_t kFewRows = 64;              // up to here w is the 128-row side, and streaming it is what takes time
constexpr int64_t kEpilogue = 3;              // writing 32 KiB of bf16 takes as long as three steps of the tensor cores
constexpr int64_t kShortestSplit = 4;         // steps along K; shorter ones cost more to add up than they bring
constexpr int kMostSplits = 16;

int64_t parts(int64_t size, int64_t part) { return (size + part - 1) / part; }

// How many parts of K keep every processor busy: each part is one tile's worth of work.
int choose_splits(int64_t tiles, int64_t steps, int64_t slots) {
    if (tiles >= slots || steps < 2 * kShortestSplit) return 1;
    int64_t splits = slots / tiles;
    splits = splits > steps / kShortestSplit ? steps / kShortestSplit : splits;
    splits = splits > kMostSplits ? kMostSplits : splits;
    if (splits < 2) return 1;
    return static_cast<int>(parts(steps, parts(steps, splits)));  // without empty parts
}

}  // namespace

int GemmPlan::columns() const {
    switch (tile) {
        case GemmTile::wide: return 256;
        case GemmTile::rows16: return 16;
        case GemmTile::rows32: return 32;
        case GemmTile::rows64: return 64;
        default: return 128;
    }
}

size_t GemmPlan::workspace() const {
    if (splits == 1) return 0;
    const size_t tiles = static_cast<size_t>(tiles_a * tiles_b);
    return tiles * static_cast<size_t>(splits) * kRows * static_cast<size_t>(columns()) * sizeof(float) +
           parts(static_cast<int64_t>(tiles), 4) * 16;  // sums, and a ticket a tile
}

GemmPlan plan_gemm(const GemmCudaArguments& a) {
    const int64_t m = a.x.rows, n = a.w.rows, steps = parts(a.depth, kDepth), processors = a.processors;
    const bool blocks = a.x.block_scale != nullptr;
    GemmPlan plan{};
    if (m <= kFewRows && !blocks) {
        plan.tile = m <= 16 ? GemmTile::rows16 : m <= 32 ? GemmTile::rows32 : GemmTile::rows64;
        plan.tiles_a = parts(n, kRows);
        plan.tiles_b = 1;
    } else if (a.precise || blocks) {
        plan.tile = GemmTile::careful;
        plan.tiles_a = parts(m, kRows);
        plan.tiles_b = parts(n, 128);
    } else {
        // Tiles of 128 x 128 taken in turn hide their epilogue; those of 128 x 256 read a sixth less shared memory,
        // which is counted as a twentieth of the time.
        const int64_t small = parts(m, kRows) * parts(n, 128), large = parts(m, kRows) * parts(n, 256);
        const int64_t turns = parts(small, processors) * steps * 21 / 20 + kEpilogue;
        const int64_t wide = parts(large, processors) * (2 * steps + 2 * kEpilogue);
        plan.tile = wide <= turns ? GemmTile::wide : GemmTile::turns;
        plan.tiles_a = parts(m, kRows);
        plan.tiles_b = parts(n, plan.columns());
    }
    plan.splits = choose_splits(plan.tiles_a * plan.tiles_b, steps, processors);
    return plan;
}

}  // namespace fp8kernels
