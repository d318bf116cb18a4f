// act_quantize, run thread by thread on the host, against the activations in float64.
#include "act_quantize/act_quantize.cu"
#include "activations.h"
#include "producer.h"
#include "quantize/transpose_codes.cu"

using namespace fp8kernels;

namespace {

struct Case {
    const char* what;
    int64_t rows, cols;
    InputType type, other_type;
    bool gated;
    Activation activation;
    int64_t grid_rows, grid_cols;
    float scale;  // 0: its own
    FormatId fmt;
    int64_t more;
    int offset;
    bool transpose;
};

void check(const Case& c, bool special) {
    Numbers x(c.type, c.rows, c.cols, c.more, c.offset), other(c.other_type, c.rows, c.cols, 2 * c.more, c.offset);
    if (special) x.set(3, NAN), x.set(9, INFINITY), x.set(x.stride, 0.0f), x.set(x.stride + 1, -0.0f);
    std::vector<Result> want;
    for (int64_t r = 0; r < c.rows; ++r) {
        for (int64_t col = 0; col < c.cols; ++col) {
            Result y = activated(x.at(r, col), c.activation);
            if (c.gated) {
                const double with = other.at(r, col);
                y = {y.y * with, y.delta * std::fabs(with) + kUnit * std::fabs(y.y * with)};
            }
            want.push_back(y);
        }
    }
    Outputs out(c.rows, c.cols, c.grid_rows, c.grid_cols, c.scale);
    const auto args = out.args(x, c.fmt, c.fmt == FormatId::hif8 ? 15.0f : 400.0f);
    const auto gpu = out.gpu(c.transpose, 2);
    const int error =
        act_quantize_cuda(args, gpu, {c.activation, c.gated ? other.first : nullptr, other.type, other.stride});
    CHECK(error == 0, "%s: error %d", c.what, error);
    judge_producer(out, args, gpu, want, c.what);
}

}  // namespace

int main() {
    const auto bf16 = InputType::bf16, fp16 = InputType::fp16, fp32 = InputType::fp32;
    const auto hif8 = FormatId::hif8, e4m3 = FormatId::e4m3, e5m2 = FormatId::e5m2;
    const auto relu = Activation::relu, silu = Activation::silu, gelu = Activation::gelu;
    const auto gelu_tanh = Activation::gelu_tanh;
    for (const Case& c : {
             Case{"one number", 1, 1, fp32, fp32, false, silu, 1, 1, 0.1f, e4m3, 0, 0, true},
             Case{"SwiGLU", 17, 1400, bf16, bf16, true, silu, 1, 1, 0.2f, hif8, 0, 0, true},
             Case{"SwiGLU, own scale", 17, 1032, bf16, fp16, true, silu, 1, 1, 0.0f, e4m3, 8, 0, false},
             Case{"GELU", 5, 77, fp16, fp16, false, gelu, 1, 1, 0.01f, e5m2, 3, 1, true},
             Case{"GELU of tanh, 1x128", 6, 1280, fp32, fp32, false, gelu_tanh, 6, 10, 0.0f, e4m3, 0, 0, false},
             Case{"rows", 5, 1064, bf16, fp32, true, gelu, 5, 1, 0.0f, hif8, 0, 0, false},
             Case{"short rows", 21, 40, bf16, bf16, true, relu, 21, 1, 0.0f, e4m3, 0, 0, false},
             Case{"long rows", 5, 14336, bf16, bf16, true, silu, 5, 1, 0.0f, hif8, 0, 0, false},
             Case{"given rows", 3, 2056, bf16, bf16, true, silu, 3, 1, 0.1f, e4m3, 0, 0, false},
         }) {
        check(c, false);
    }
    check({"special numbers", 4, 64, bf16, bf16, false, relu, 1, 1, 0.0f, e4m3, 0, 0, false}, true);
    check({"special rows", 4, 64, bf16, bf16, false, relu, 4, 1, 0.0f, hif8, 0, 0, false}, true);
    check({"special parts", 4, 256, bf16, bf16, false, relu, 4, 2, 0.0f, hif8, 0, 0, false}, true);
    return report("act_quantize");
}
