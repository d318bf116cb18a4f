// norm_backward, run thread by thread on the host, against the gradients of RMSNorm and LayerNorm in float64.
#include "norm_backward/norm_backward.cu"
#include "producer.h"

using namespace fp8kernels;

namespace {

struct Case {
    int64_t rows, cols;
    InputType dy_type, type, weight_type;
    bool center, has_weight;
    int64_t more;
    int offset;
};

void compare(const Numbers& got, int64_t r, int64_t c, double want, double delta, const char* what) {
    const double value = got.at(r, c);
    CHECK(std::fabs(value - want) <= delta + got.rounding(std::fabs(want) + delta),
          "%s at (%lld, %lld): %g, not %g +- %g", what, (long long)r, (long long)c, value, want, delta);
}

// With z within 2 u |z|(its mean and rstd are taken as given), g = dy (w + offset) within 2 u |g|, and sums of K
// numbers in any order within (K + 1) u of the sum of their sizes (Higham 2002, section 3.1).
void check(const Case& c) {
    Numbers dy(c.dy_type, c.rows, c.cols, c.more, c.offset), x(c.type, c.rows, c.cols, c.more, c.offset);
    Numbers weight(c.weight_type, 1, c.cols), dx(c.type, c.rows, c.cols), dweight(c.weight_type, 1, c.cols);
    Numbers dbias(c.weight_type, 1, c.cols);
    const float offset = c.center ? 0.0f : 1.0f;
    std::vector<float> rstd, mean;
    for (int64_t r = 0; r < c.rows; ++r) {
        rstd.push_back(0.5f + 0.1f * static_cast<float>(r % 7));
        mean.push_back(0.01f * static_cast<float>(r % 5));
    }
    NormBackwardArgs args{};
    args.rows = c.rows, args.cols = c.cols;
    args.dy = dy.first, args.x = x.first;
    args.dy_type = c.dy_type, args.x_type = c.type;
    args.dy_stride = dy.stride, args.x_stride = x.stride;
    args.rstd = rstd.data(), args.mean = c.center ? mean.data() : nullptr;
    args.weight = c.has_weight ? weight.first : nullptr, args.weight_type = c.weight_type;
    args.offset = offset;
    args.dx = dx.first;
    args.dweight = c.has_weight ? dweight.first : nullptr;
    args.dbias = c.center && c.has_weight ? dbias.first : nullptr, args.bias_type = c.weight_type;
    args.processors = 2;
    std::vector<uint8_t> workspace(norm_backward_workspace(args), 0xCB);
    const int error = norm_backward_cuda(args, workspace.data(), nullptr);
    CHECK(error == 0, "error %d", error);

    std::vector<double> of_weight(c.cols), of_weight_size(c.cols), of_bias(c.cols), of_bias_size(c.cols);
    const double u = kUnit, sum_unit = (c.cols + 4) * u;
    for (int64_t r = 0; r < c.rows; ++r) {
        const double middle = c.center ? mean[r] : 0.0;
        const auto z_of = [&](int64_t i) { return (x.at(r, i) - middle) * rstd[r]; };
        const auto g_of = [&](int64_t i) { return dy.at(r, i) * (c.has_weight ? weight.at(0, i) + offset : 1.0); };
        double gz = 0.0, gz_size = 0.0, g = 0.0, g_size = 0.0;
        for (int64_t i = 0; i < c.cols; ++i) {
            gz += g_of(i) * z_of(i) / c.cols, gz_size += std::fabs(g_of(i) * z_of(i)) / c.cols;
            g += g_of(i) / c.cols, g_size += std::fabs(g_of(i)) / c.cols;
            of_weight[i] += dy.at(r, i) * z_of(i), of_weight_size[i] += std::fabs(dy.at(r, i) * z_of(i));
            of_bias[i] += dy.at(r, i), of_bias_size[i] += std::fabs(dy.at(r, i));
        }
        if (!c.center) g = g_size = 0.0;
        for (int64_t i = 0; i < c.cols; ++i) {
            const double z = z_of(i), want = (g_of(i) - z * gz - g) * rstd[r];
            const double delta = rstd[r] * (8 * u * (std::fabs(g_of(i)) + std::fabs(z * gz) + std::fabs(g)) +
                                            (sum_unit + 4 * u) * (std::fabs(z) * gz_size + g_size));
            compare(dx, r, i, want, delta, "dx");
        }
    }
    for (int64_t i = 0; i < c.cols; ++i) {
        const double rows_unit = (c.rows + 16) * u;
        if (args.dweight) compare(dweight, 0, i, of_weight[i], rows_unit * of_weight_size[i], "dweight");
        if (args.dbias) compare(dbias, 0, i, of_bias[i], rows_unit * of_bias_size[i], "dbias");
    }
}

}  // namespace

int main() {
    const auto bf16 = InputType::bf16, fp16 = InputType::fp16, fp32 = InputType::fp32;
    for (const Case& c : {
             Case{1, 1, fp32, fp32, fp32, false, true, 0, 0},
             Case{41, 96, bf16, bf16, bf16, false, true, 0, 0},    // a warp a row
             Case{70, 1024, bf16, bf16, fp32, true, true, 8, 0},   // the longest of them
             Case{9, 333, fp32, fp16, fp32, true, true, 3, 1},     // rows at any address
             Case{6, 1032, bf16, bf16, bf16, false, true, 0, 0},   // a block a row
             Case{5, 8200, bf16, bf16, bf16, true, true, 0, 0},    // eight times eight columns a thread
             Case{4, 1500, fp16, fp16, fp16, true, false, 0, 0},   // without weights
             Case{5, 16384, bf16, bf16, fp32, false, true, 0, 0},  // too long for two in shared memory
             Case{3, 16384, fp32, fp32, fp32, false, true, 0, 0},  // too long to wait in shared memory
         }) {
        check(c);
    }
    NormBackwardArgs long_row{};
    long_row.rows = 1, long_row.cols = kLongestNormRow + 1;
    CHECK(norm_backward_cuda(long_row, nullptr, nullptr) != 0, "a row of %lld numbers", (long long)long_row.cols);
    return report("norm_backward");
}
