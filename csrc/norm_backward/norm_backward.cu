// norm_backward: one read of dy and x, one write of dx; dweight and dbias are summed on the way.
//
// A team of threads takes one row after the other. A thread has the same columns in each, so it sums their dweight in
// registers; each block writes one row of partial sums, and a second kernel adds these rows in their order. The same
// input gives the same bits.
#include "norm_backward/norm_backward.h"

#include <cuda_runtime.h>

#include "rows/rows.cuh"

namespace fp8kernels {
namespace {

constexpr int kStreams = 2;                                // dy and x
constexpr int64_t kFewColumns = kRowThreads * kEight * 4;  // up to here two blocks have the registers of a processor

struct Task {
    const float* rstd;
    const float* mean;
    Vector weight;
    float offset;
    void* dx;
    bool wide;        // of dx: eight numbers always exist, and start at multiples of 16 bytes
    float* partials;  // [2, blocks, cols]: dweight, dbias
    bool sums_weight, sums_bias;
};

// Sums over the rows of a block to one row in memory. kTeam 32: the warps' sums meet in shared memory.
template <int kTeam, int kOwn>
__device__ void write_sums(const float (&sums)[kOwn][kEight], float* to, int cols) {
    constexpr int kTeams = kRowThreads / kTeam;
    auto* shared = reinterpret_cast<float*>(dynamic_shared());
    float* mine = kTeams == 1 ? to : shared + static_cast<int>(threadIdx.x) / kTeam * cols;
    if (kTeams > 1) __syncthreads();
#pragma unroll
    for (int v = 0; v < kOwn; ++v) {
        const int c = (v * kTeam + Team<kTeam>::lane()) * kEight;
#pragma unroll
        for (int i = 0; i < kEight; ++i) {
            if (c + i < cols) mine[c + i] = sums[v][i];
        }
    }
    if (kTeams == 1) return;
    __syncthreads();
    for (int c = static_cast<int>(threadIdx.x); c < cols; c += kRowThreads) {
        float sum = 0.0f;
#pragma unroll
        for (int team = 0; team < kTeams; ++team) sum += shared[team * cols + c];
        to[c] = sum;
    }
}

// kOwn: how many times eight columns a thread has at most.
template <int kTeam, int kOwn>
__global__ void __launch_bounds__(kRowThreads, kOwn > 4 ? 1 : 2)
    norm_backward_kernel(const __grid_constant__ Rows<kStreams> rows, const __grid_constant__ Task task) {
    Walk<kTeam, kStreams> walk(rows, dynamic_shared());
    Team<kTeam> team;
    float dweight[kOwn][kEight] = {}, dbias[kOwn][kEight] = {};
    walk.each([&] {
        const float rstd = task.rstd[walk.row], mean = task.mean != nullptr ? task.mean[walk.row] : 0.0f;
        // z = (x - mean) * rstd and g = dy * (weight + offset); zeros beyond the end, as dy is zero there
        const auto load = [&](int c, float (&dy)[kEight], float (&z)[kEight], float (&g)[kEight]) {
            float w[kEight];
            walk.load(0, c, dy);
            walk.load(1, c, z);
            load_vector(task.weight, 1.0f, c, walk.count - c, w);
            const float more = task.weight.data == nullptr ? 0.0f : task.offset;
#pragma unroll
            for (int i = 0; i < kEight; ++i) {
                z[i] = (z[i] - mean) * rstd;
                g[i] = dy[i] * (w[i] + more);
            }
        };
        float of_gz = 0.0f, of_g = 0.0f;
        walk.along([&](int c) {
            float dy[kEight], z[kEight], g[kEight];
            load(c, dy, z, g);
#pragma unroll
            for (int i = 0; i < kEight; ++i) {
                of_gz += g[i] * z[i];
                of_g += g[i];
            }
        });
        const auto cols = static_cast<float>(walk.count);
        of_gz = __fdiv_rn(team.sum(of_gz), cols);
        of_g = task.mean != nullptr ? __fdiv_rn(team.sum(of_g), cols) : 0.0f;
#pragma unroll
        for (int v = 0; v < kOwn; ++v) {
            const int c = (v * kTeam + Team<kTeam>::lane()) * kEight;
            if (c >= walk.count) continue;
            float dy[kEight], z[kEight], g[kEight];
            load(c, dy, z, g);
#pragma unroll
            for (int i = 0; i < kEight; ++i) {
                if (task.sums_weight) dweight[v][i] += dy[i] * z[i];
                if (task.sums_bias) dbias[v][i] += dy[i];
                g[i] = (g[i] - z[i] * of_gz - of_g) * rstd;
            }
            store_eight(task.dx, rows.of[1].type, walk.row * rows.cols + c, walk.count - c, task.wide, g);
        }
    });
    const auto width = static_cast<int>(rows.cols);
    float* to = task.partials + static_cast<int64_t>(blockIdx.x) * rows.cols;
    if (task.sums_weight) write_sums<kTeam>(dweight, to, width);
    if (task.sums_bias) write_sums<kTeam>(dbias, to + static_cast<int64_t>(gridDim.x) * rows.cols, width);
}

constexpr int kAcross = 32, kDown = kRowThreads / kAcross;

// out[c] = the sum of partials[., c], in a fixed order.
__global__ void __launch_bounds__(kRowThreads)
    sum_columns(const float* partials, int64_t rows, int64_t cols, void* out, InputType type) {
    __shared__ float shared[kDown][kAcross];
    const int across = static_cast<int>(threadIdx.x % kAcross), down = static_cast<int>(threadIdx.x / kAcross);
    const int64_t c = static_cast<int64_t>(blockIdx.x) * kAcross + across;
    float sum = 0.0f;
    if (c < cols) {
#pragma unroll 4
        for (int64_t r = down; r < rows; r += kDown) sum += partials[r * cols + c];
    }
    shared[down][across] = sum;
    __syncthreads();
    if (down != 0 || c >= cols) return;
#pragma unroll
    for (int i = 1; i < kDown; ++i) sum += shared[i][across];
    switch (type) {
        case InputType::fp32: static_cast<float*>(out)[c] = sum; break;
        case InputType::bf16: static_cast<uint16_t*>(out)[c] = bf16_from_float(sum); break;
        case InputType::fp16: static_cast<uint16_t*>(out)[c] = fp16_from_float(sum); break;
    }
}

// What the launcher and the size of the workspace have to agree on.
struct Layout {
    Rows<kStreams> rows;
    int teams;
    size_t shared;
    unsigned blocks;
};

Layout layout_of(const NormBackwardArgs& args) {
    const Matrix of[kStreams] = {{args.dy, args.dy_type, args.dy_stride}, {args.x, args.x_type, args.x_stride}};
    Layout out{};
    out.teams = args.cols <= kShortRow ? kRowThreads / 32 : 1;
    out.rows = rows_of(of, args.rows, args.cols, args.cols, out.teams, kRowMemory);
    const size_t sums = out.teams == 1 ? 0 : static_cast<size_t>(out.teams) * args.cols * sizeof(float);
    out.shared = out.rows.memory(out.teams) > sums ? out.rows.memory(out.teams) : sums;
    out.blocks = blocks_of(args.rows, out.teams, out.shared, args.processors, args.cols <= kFewColumns ? 2 : 1);
    return out;
}

}  // namespace

size_t norm_backward_workspace(const NormBackwardArgs& args) {
    return 2 * static_cast<size_t>(layout_of(args).blocks) * args.cols * sizeof(float);
}

int norm_backward_cuda(const NormBackwardArgs& args, void* workspace, void* stream) {
    if (args.cols > kLongestNormRow) return cudaErrorInvalidValue;
    const Layout layout = layout_of(args);
    const bool wide = args.cols % kEight == 0 && reinterpret_cast<uintptr_t>(args.dx) % 16 == 0;
    auto* partials = static_cast<float*>(workspace);
    const Task task{args.rstd, args.mean, {args.weight, args.weight_type}, args.offset,          args.dx,
                    wide,      partials,  args.dweight != nullptr,         args.dbias != nullptr};
    const auto start = [&](auto kernel) {
        return launch(kernel, Grid{layout.blocks}, kRowThreads, layout.shared, stream, layout.rows, task);
    };
    int error = layout.teams > 1           ? start(norm_backward_kernel<32, 4>)
                : args.cols <= kFewColumns ? start(norm_backward_kernel<kRowThreads, 4>)
                                           : start(norm_backward_kernel<kRowThreads, 8>);
    const Grid columns{static_cast<unsigned>((args.cols + kAcross - 1) / kAcross)};
    if (error == cudaSuccess && args.dweight != nullptr) {
        error = launch(sum_columns, columns, kRowThreads, 0, stream, partials, layout.blocks, args.cols, args.dweight,
                       args.weight_type);
    }
    if (error == cudaSuccess && args.dbias != nullptr) {
        error = launch(sum_columns, columns, kRowThreads, 0, stream, partials + layout.blocks * args.cols,
                       layout.blocks, args.cols, args.dbias, args.bias_type);
    }
    return error;
}

}  // namespace fp8kernels
