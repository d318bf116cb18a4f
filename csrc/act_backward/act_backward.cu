// act_backward: one read of dy, x and other, one write of each gradient.
#include "act_backward/act_backward.h"

#include <cuda_runtime.h>

#include "activation/activation.cuh"
#include "rows/rows.cuh"

namespace fp8kernels {
namespace {

constexpr int kTeam = 32, kTeams = kRowThreads / kTeam;
constexpr int kBlocks = 2;  // of a processor: what registers allow

struct Gradients {
    Activation activation;
    void* dx;
    void* dother;
    bool wide;  // eight numbers always exist, and start at multiples of 16 bytes
};

// The streams are dy, x, and other where there is one.
template <int kStreams>
__global__ void __launch_bounds__(kRowThreads, kBlocks)
    act_backward_kernel(const __grid_constant__ Rows<kStreams> rows, const __grid_constant__ Gradients to) {
    Walk<kTeam, kStreams> walk(rows, dynamic_shared());
    walk.each([&] {
        walk.along([&](int c) {
            if (c >= walk.count) return;
            const int64_t at = walk.row * rows.cols + walk.first + c;
            const int left = walk.count - c;
            float dy[kEight], x[kEight];
            walk.load(0, c, dy);
            walk.load(1, c, x);
            float other[kEight], dother[kEight], dx[kEight];
            if constexpr (kStreams == 3) walk.load(2, c, other);
            with_activation(to.activation, [&](auto a) {
#pragma unroll
                for (int i = 0; i < kEight; ++i) {
                    float g = dy[i];
                    if constexpr (kStreams == 3) {
                        dother[i] = __fmul_rn(g, decltype(a)::value(x[i]));
                        g = __fmul_rn(g, other[i]);
                    }
                    dx[i] = __fmul_rn(g, decltype(a)::slope(x[i]));
                }
            });
            if constexpr (kStreams == 3) store_eight(to.dother, rows.of[2].type, at, left, to.wide, dother);
            store_eight(to.dx, rows.of[1].type, at, left, to.wide, dx);
        });
    });
}

template <int kStreams>
int start(const Matrix (&of)[kStreams], const ActBackwardArgs& args, void* stream) {
    const int64_t piece = args.cols < kShortRow ? args.cols : kShortRow;
    const auto rows = rows_of(of, args.rows, args.cols, piece, kTeams, kRowMemory);
    const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
    const Gradients to{args.activation, args.dx, args.dother,
                       args.cols % kEight == 0 && aligned(args.dx) && aligned(args.dother)};
    const size_t shared = rows.memory(kTeams);
    return launch(act_backward_kernel<kStreams>, Grid{blocks_of(rows.pieces, kTeams, shared, args.processors, kBlocks)},
                  kRowThreads, shared, stream, rows, to);
}

}  // namespace

int act_backward_cuda(const ActBackwardArgs& args, void* stream) {
    const Matrix dy{args.dy, args.dy_type, args.dy_stride}, x{args.x, args.x_type, args.x_stride};
    if (args.other == nullptr) return start({dy, x}, args, stream);
    return start({dy, x, {args.other, args.other_type, args.other_stride}}, args, stream);
}

}  // namespace fp8kernels
