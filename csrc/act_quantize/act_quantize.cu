// act_quantize: one read of x and other from memory; a warp has a piece of a row at hand and the next one in flight.
#include "act_quantize/act_quantize.h"

#include <cuda_runtime.h>

#include "activation/activation.cuh"
#include "rows/sink.cuh"

namespace fp8kernels {
namespace {

template <bool kGated>
struct ActRows {
    static constexpr int kStreams = kGated ? 2 : 1;

    Activation activation;

    struct State {};

    template <class Walk, class Team>
    __device__ State begin(const Walk&, Team&) const {
        return {};
    }

    template <class Walk>
    __device__ __forceinline__ void value(const Walk& walk, const State&, int c, float (&y)[kEight]) const {
        walk.load(0, c, y);
        with_activation(activation, [&](auto a) {
#pragma unroll
            for (int i = 0; i < kEight; ++i) y[i] = decltype(a)::value(y[i]);
        });
        if constexpr (kGated) {
            float other[kEight];
            walk.load(1, c, other);
#pragma unroll
            for (int i = 0; i < kEight; ++i) y[i] = __fmul_rn(y[i], other[i]);
        }
    }
};

}  // namespace

int act_quantize_cuda(const QuantizeArgs& args, const QuantizeOnGpu& gpu, const ActArgs& act) {
    const Matrix x{args.x, args.type, args.row_stride}, other{act.other, act.other_type, act.other_stride};
    if (act.other == nullptr) return produce({x}, false, ActRows<false>{act.activation}, args, gpu);
    return produce({x, other}, false, ActRows<true>{act.activation}, args, gpu);
}

}  // namespace fp8kernels
