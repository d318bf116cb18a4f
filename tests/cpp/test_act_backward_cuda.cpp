// act_backward, run thread by thread on the host, against the slopes of the activations in float64.
#include "act_backward/act_backward.cu"
#include "activations.h"
#include "producer.h"

using namespace fp8kernels;

namespace {

void compare(const Numbers& got, int64_t r, int64_t c, double want, double delta, const char* what) {
    const double value = got.at(r, c);
    CHECK(std::fabs(value - want) <= delta + got.rounding(std::fabs(want) + delta),
          "%s at (%lld, %lld): %g, not %g +- %g", what, (long long)r, (long long)c, value, want, delta);
}

void check(int64_t rows, int64_t cols, InputType dy_type, InputType type, bool gated, Activation activation,
           int64_t more, int offset) {
    Numbers dy(dy_type, rows, cols, more, offset), x(type, rows, cols, more, offset),
        other(type, rows, cols, 0, offset);
    Numbers dx(type, rows, cols), dother(type, rows, cols);
    const ActBackwardArgs args{
        rows, cols,      activation, dy.first,     x.first,  gated ? other.first : nullptr,  dy_type, type,
        type, dy.stride, x.stride,   other.stride, dx.first, gated ? dother.first : nullptr, 2};
    const int error = act_backward_cuda(args, nullptr);
    CHECK(error == 0, "error %d", error);
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < cols; ++c) {
            const double g = dy.at(r, c), with = gated ? other.at(r, c) : 1.0;
            const Result y = activated(x.at(r, c), activation), s = sloped(x.at(r, c), activation);
            const double want = g * with * s.y;
            compare(dx, r, c, want, std::fabs(g * with) * s.delta + 3 * kUnit * std::fabs(want), "dx");
            if (gated) compare(dother, r, c, g * y.y, std::fabs(g) * y.delta + kUnit * std::fabs(g * y.y), "dother");
        }
    }
}

}  // namespace

int main() {
    const auto bf16 = InputType::bf16, fp16 = InputType::fp16, fp32 = InputType::fp32;
    for (const Activation a : {Activation::relu, Activation::silu, Activation::gelu, Activation::gelu_tanh}) {
        check(1, 1, fp32, fp32, false, a, 0, 0);
        check(19, 1288, bf16, bf16, true, a, 8, 0);
        check(5, 131, bf16, fp16, true, a, 3, 1);
        check(7, 64, fp32, bf16, false, a, 0, 0);
    }
    return report("act_backward");
}
