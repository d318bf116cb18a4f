// norm_quantize: one read of x from memory. A row waits in shared memory while its mean and its variance are summed.
#include "norm_quantize/norm_quantize.h"

#include <cuda_runtime.h>

#include "rows/sink.cuh"

namespace fp8kernels {
namespace {

struct NormRows {
    static constexpr int kStreams = 1;

    Vector weight, bias;
    float eps, offset;
    bool center;
    float* rstd;
    float* mean;

    struct State {
        float mean, rstd;
    };

    template <class Walk, class Team>
    __device__ State begin(const Walk& walk, Team& team) const {
        const auto cols = static_cast<float>(walk.count);
        float middle = 0.0f;
        if (center) {
            float sum = 0.0f;
            walk.along([&](int c) {
                float x[kEight];
                walk.load(0, c, x);  // zeros beyond the end
#pragma unroll
                for (int i = 0; i < kEight; ++i) sum += x[i];
            });
            middle = __fdiv_rn(team.sum(sum), cols);
        }
        float squares = 0.0f;
        walk.along([&](int c) {
            float x[kEight];
            walk.load(0, c, x);
#pragma unroll
            for (int i = 0; i < kEight; ++i) x[i] -= middle;
            cut_off(c, walk.count, x);
#pragma unroll
            for (int i = 0; i < kEight; ++i) squares += x[i] * x[i];
        });
        const float variance = __fdiv_rn(team.sum(squares), cols);
        const State state{middle, __frcp_rn(__fsqrt_rn(variance + eps))};
        if (team.lane() == 0) {
            rstd[walk.row] = state.rstd;
            if (center) mean[walk.row] = middle;
        }
        return state;
    }

    template <class Walk>
    __device__ __forceinline__ void value(const Walk& walk, const State& state, int c, float (&y)[kEight]) const {
        float w[kEight], b[kEight];
        walk.load(0, c, y);
        load_vector(weight, 1.0f, c, walk.count - c, w);
        load_vector(bias, 0.0f, c, walk.count - c, b);
        const float more = weight.data == nullptr ? 0.0f : offset;
#pragma unroll
        for (int i = 0; i < kEight; ++i) y[i] = (y[i] - state.mean) * state.rstd * (w[i] + more) + b[i];
    }
};

}  // namespace

int norm_quantize_cuda(const QuantizeArgs& args, const QuantizeOnGpu& gpu, const NormArgs& norm) {
    const Matrix x[1] = {{args.x, args.type, args.row_stride}};
    const NormRows producer{{norm.weight, norm.weight_type},
                            {norm.bias, norm.bias_type},
                            norm.eps,
                            norm.offset,
                            norm.center,
                            norm.rstd,
                            norm.mean};
    return produce(x, true, producer, args, gpu);
}

}  // namespace fp8kernels
