// norm_quantize, run thread by thread on the host, against RMSNorm and LayerNorm in float64.
#include "norm_quantize/norm_quantize.cu"
#include "producer.h"
#include "quantize/transpose_codes.cu"

using namespace fp8kernels;

namespace {

struct Case {
    const char* what;
    int64_t rows, cols;
    InputType type;
    bool center;
    int64_t grid_rows, grid_cols;
    float scale;  // 0: its own
    FormatId fmt;
    int64_t more;
    int offset;
    bool transpose;
    int carrier;
};

// y of one row, with the error of fp32 sums of K numbers in any order (Higham 2002, section 3.1): mean within
// (K + 1) u mean|x|, each square and the sum of squares likewise; rstd moves by at most the relative error of what is
// under the root (if that is below a half) and four roundings; then five operations an element.
std::vector<Result> normalise(const Numbers& x, const Numbers* weight, const Numbers* bias, float eps, float offset,
                              bool center, std::vector<Result>& rstd, std::vector<Result>& mean) {
    std::vector<Result> out;
    const int64_t cols = x.cols;
    for (int64_t r = 0; r < x.rows; ++r) {
        double sum = 0.0, size = 0.0;
        for (int64_t c = 0; c < cols; ++c) sum += x.at(r, c), size += std::fabs(x.at(r, c));
        const double middle = center ? sum / cols : 0.0, middle_off = center ? (cols + 1) * kUnit * size / cols : 0.0;
        const auto off = [&](double centered) { return middle_off + kUnit * (std::fabs(centered) + middle_off); };
        double squares = 0.0, squares_off = 0.0;
        for (int64_t c = 0; c < cols; ++c) {
            const double centered = x.at(r, c) - middle;
            squares += centered * centered;
            squares_off += 2 * std::fabs(centered) * off(centered) + off(centered) * off(centered);
        }
        const double under = squares / cols + eps;
        const double relative = (squares_off / cols + (cols + 3) * kUnit * under) / under + 4 * kUnit;
        const double root = 1.0 / std::sqrt(under);
        rstd.push_back({root, root * relative});
        mean.push_back({middle, middle_off});
        for (int64_t c = 0; c < cols; ++c) {
            const double centered = x.at(r, c) - middle, w = weight ? weight->at(0, c) + offset : 1.0;
            const double b = bias ? bias->at(0, c) : 0.0;
            const double scaled = std::fabs(w * root);
            const double delta = scaled * (off(centered) + std::fabs(centered) * relative) +
                                 5 * kUnit * (scaled * std::fabs(centered) + std::fabs(b));
            out.push_back({centered * root * w + b, delta});
        }
    }
    return out;
}

void check(const Case& c) {
    Numbers x(c.type, c.rows, c.cols, c.more, c.offset);
    Numbers weight(c.type == InputType::fp32 ? InputType::bf16 : c.type, 1, c.cols), bias(InputType::fp32, 1, c.cols);
    const float eps = 1e-5f, offset = c.center ? 0.0f : 1.0f;
    std::vector<Result> rstd, mean;
    const auto want = normalise(x, &weight, c.center ? &bias : nullptr, eps, offset, c.center, rstd, mean);
    Outputs out(c.rows, c.cols, c.grid_rows, c.grid_cols, c.scale);
    std::vector<float> got_rstd(c.rows, NAN), got_mean(c.rows, NAN);
    const auto args = out.args(x, c.fmt, c.fmt == FormatId::hif8 ? 15.0f : 400.0f, c.carrier);
    const auto gpu = out.gpu(c.transpose, 2);
    const NormArgs norm{weight.first, weight.type,     c.center ? bias.first : nullptr,     bias.type, eps, offset,
                        c.center,     got_rstd.data(), c.center ? got_mean.data() : nullptr};
    const int error = norm_quantize_cuda(args, gpu, norm);
    CHECK(error == 0, "%s: error %d", c.what, error);
    judge_producer(out, args, gpu, want, c.what);
    for (int64_t r = 0; r < c.rows; ++r) {
        CHECK(std::fabs(got_rstd[r] - rstd[r].y) <= rstd[r].delta, "%s: rstd %g, not %g", c.what, got_rstd[r],
              rstd[r].y);
        if (c.center) {
            CHECK(std::fabs(got_mean[r] - mean[r].y) <= mean[r].delta, "%s: mean %g, not %g", c.what, got_mean[r],
                  mean[r].y);
        }
    }
}

// A row with NaN is NaN throughout; the others, and the scale of all, do not see it.
void check_nan() {
    Numbers x(InputType::bf16, 3, 64);
    x.set(64 + 5, NAN);
    std::vector<Result> rstd, mean;
    auto want = normalise(x, nullptr, nullptr, 0.0f, 0.0f, false, rstd, mean);
    Outputs out(3, 64, 1, 1, 0.0f);
    std::vector<float> got_rstd(3);
    const auto args = out.args(x, FormatId::hif8, 15.0f);
    const auto gpu = out.gpu(false, 2);
    norm_quantize_cuda(args, gpu, {nullptr, x.type, nullptr, x.type, 0.0f, 1.0f, false, got_rstd.data(), nullptr});
    judge_producer(out, args, gpu, want, "a row of NaN");
}

}  // namespace

int main() {
    const auto bf16 = InputType::bf16, fp16 = InputType::fp16, fp32 = InputType::fp32;
    const auto hif8 = FormatId::hif8, e4m3 = FormatId::e4m3, e5m2 = FormatId::e5m2;
    for (const Case& c : {
             Case{"one number", 1, 1, bf16, false, 1, 1, 0.1f, e4m3, 0, 0, true, kNoCarrier},
             Case{"short rows", 37, 128, bf16, false, 1, 1, 0.2f, hif8, 0, 0, true, kNoCarrier},
             Case{"own scale", 19, 96, fp16, true, 1, 1, 0.0f, e4m3, 8, 0, false, kNoCarrier},
             Case{"unaligned", 5, 77, bf16, true, 1, 1, 0.05f, e5m2, 3, 1, true, kNoCarrier},
             Case{"rows", 9, 200, fp32, false, 9, 1, 0.0f, hif8, 0, 0, false, kNoCarrier},
             Case{"rows, unaligned", 9, 203, fp32, true, 9, 1, 0.0f, e4m3, 0, 3, false, kNoCarrier},
             Case{"1x128", 6, 256, bf16, false, 6, 2, 0.0f, e4m3, 0, 0, true, kNoCarrier},
             Case{"1x128, given", 6, 384, fp16, true, 6, 3, 0.3f, hif8, 0, 0, false, kNoCarrier},
             Case{"a block a row", 5, 1536, bf16, false, 1, 1, 0.01f, e4m3, 0, 0, false, kNoCarrier},
             Case{"a block a row, own scale", 3, 2312, bf16, true, 1, 1, 0.0f, hif8, 0, 0, true, kNoCarrier},
             Case{"a block a row, rows", 4, 4096, fp32, false, 4, 1, 0.0f, e4m3, 0, 0, false, kNoCarrier},
             Case{"a block a row, 1x128", 4, 2560, bf16, true, 4, 20, 0.0f, hif8, 0, 0, false, kNoCarrier},
             Case{"too long for two", 5, 13000, fp32, true, 1, 1, 0.02f, e4m3, 0, 0, false, kNoCarrier},
             Case{"too long to wait", 3, 25000, fp32, true, 3, 1, 0.0f, e4m3, 0, 0, false, kNoCarrier},
             Case{"carrier", 7, 256, bf16, false, 1, 1, 0.3f, hif8, 0, 0, true, 4},
             Case{"carrier, rows", 7, 264, bf16, false, 7, 1, 0.0f, hif8, 0, 0, false, 4},
         }) {
        check(c);
    }
    check_nan();
    return report("norm_quantize");
}
