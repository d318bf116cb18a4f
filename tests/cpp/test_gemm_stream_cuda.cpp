// The streaming gemm, run thread by thread on the host, against float64 products of the decoded operands.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "check.h"
#include "formats/format.h"
#include "gemm_stream/stream.cu"

using namespace fp8kernels;

namespace {

std::mt19937 rng(7);

double number(FormatId format, uint8_t code) { return decode_table(format)[code]; }

// Codes of numbers near normal ones, as they lie in memory: rows `stride` bytes apart, `offset` bytes from a multiple
// of 16.
struct Codes {
    std::vector<uint8_t> memory;
    uint8_t* first;
    int64_t stride;
    FormatId format;

    Codes(int64_t rows, int64_t cols, int64_t row_stride, int offset, FormatId fmt) : stride(row_stride), format(fmt) {
        memory.assign(static_cast<size_t>(rows * row_stride + offset + 16),
                      0x7F);  // NaN in two formats between the rows
        first = memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16) % 16 + offset;
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t c = 0; c < cols; ++c) {
                uint8_t code = 0;
                do code = static_cast<uint8_t>(rng());
                while (!std::isfinite(number(fmt, code)));
                at(r, c) = code;
            }
        }
    }

    uint8_t& at(int64_t r, int64_t c) { return first[r * stride + c]; }
    double value(int64_t r, int64_t c) { return number(format, at(r, c)); }
};

struct Case {
    int64_t m, n, k;
    FormatId x, w;
    int64_t x_more, w_more;  // bytes between rows
    int offset;
    int processors;
};

GemmEpilogue plain(int64_t m, int64_t n, float* out) {
    GemmEpilogue e{};
    e.out = out;
    e.out_type = NumberType::fp32;
    e.m = m;
    e.n = n;
    return e;
}

std::vector<float> run(Codes& x, Codes& w, const Case& c, GemmEpilogue epilogue) {
    const StreamGemm gemm{{x.first, x.stride, x.format}, {w.first, w.stride, w.format}, c.m, c.n, c.k, c.processors};
    std::vector<uint8_t> workspace(plan_stream(gemm).workspace() + 16, 0xCB);
    std::vector<float> out(static_cast<size_t>(c.m * c.n + 4), NAN);
    auto* aligned = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(out.data()) + 15) / 16 * 16);
    if (epilogue.out == nullptr) epilogue.out = aligned;
    const int error = gemm_stream_cuda(gemm, epilogue, workspace.data(), nullptr);
    CHECK(error == 0, "error %d", error);
    return {aligned, aligned + c.m * c.n};
}

// sum of K products in fp32 in any order, two scales and a bias: (K + 4) u sum |x w| (Higham 2002, section 3.1)
void check_product(const Case& c) {
    Codes x(c.m, c.k, c.k + c.x_more, c.offset, c.x), w(c.n, c.k, c.k + c.w_more, c.offset, c.w);
    std::vector<float> x_scale, w_scale, bias;
    std::uniform_real_distribution<float> any(0.5f, 2.0f);
    for (int64_t i = 0; i < c.m; ++i) x_scale.push_back(any(rng));
    for (int64_t i = 0; i < c.n; ++i) w_scale.push_back(any(rng)), bias.push_back(any(rng));
    GemmEpilogue epilogue = plain(c.m, c.n, nullptr);
    epilogue.x_scale = x_scale.data(), epilogue.x_scale_step = 1;
    epilogue.w_scale = w_scale.data(), epilogue.w_scale_step = 1;
    epilogue.bias = bias.data(), epilogue.bias_type = NumberType::fp32;
    const auto out = run(x, w, c, epilogue);
    for (int64_t i = 0; i < c.m; ++i) {
        for (int64_t j = 0; j < c.n; ++j) {
            double sum = 0.0, size = 0.0;
            for (int64_t k = 0; k < c.k; ++k) {
                const double product = x.value(i, k) * w.value(j, k);
                sum += product;
                size += std::fabs(product);
            }
            const double scale = static_cast<double>(x_scale[i]) * w_scale[j];
            const double want = sum * scale + bias[j];
            const double bound = std::ldexp((c.k + 4) * (size * scale + std::fabs(bias[j])), -24);
            const double got = out[i * c.n + j];
            CHECK(std::fabs(got - want) <= bound, "[%lld, %lld, %lld] at (%lld, %lld): %g, not %g", (long long)c.m,
                  (long long)c.n, (long long)c.k, (long long)i, (long long)j, got, want);
        }
    }
    const auto again = run(x, w, c, epilogue);
    CHECK(out == again, "[%lld, %lld, %lld]: a second run gives other bits", (long long)c.m, (long long)c.n,
          (long long)c.k);
}

void test_products() {
    const FormatId hif8 = FormatId::hif8, e4m3 = FormatId::e4m3, e5m2 = FormatId::e5m2;
    for (const Case& c : {
             Case{1, 1, 1, hif8, hif8, 15, 15, 0, 132},     // one of everything, in aligned rows
             Case{1, 1, 1, e4m3, e4m3, 0, 0, 0, 132},       // and in unaligned ones
             Case{3, 130, 17, e4m3, hif8, 15, 15, 0, 132},  // a tail of K, a tail of N
             Case{5, 19, 300, hif8, e4m3, 0, 4, 3, 132},    // rows at any address
             Case{8, 129, 1024, e5m2, e5m2, 0, 0, 0, 132},  // slices
             Case{9, 100, 2048, hif8, hif8, 0, 0, 0, 132},  // two groups of x
             Case{16, 40, 520, e4m3, e5m2, 8, 8, 0, 132},   //
             Case{17, 257, 512, e5m2, hif8, 0, 16, 0, 4},   // two tiles of w a warp
             Case{32, 33, 777, hif8, e5m2, 7, 7, 0, 132},   //
             Case{33, 70, 640, e4m3, e4m3, 0, 0, 0, 132},   // steps of 128
             Case{64, 258, 256, hif8, e4m3, 0, 0, 0, 132},  //
             Case{64, 8, 130, e5m2, e4m3, 0, 0, 1, 132},    //
         }) {
        check_product(c);
    }
}

// A NaN in a row of w makes that column of out NaN and no other; an infinity gives the infinity of its sign.
void test_special_codes() {
    const Case c{2, 20, 64, FormatId::hif8, FormatId::hif8, 0, 0, 0, 132};
    Codes x(c.m, c.k, c.k, 0, c.x), w(c.n, c.k, c.k, 0, c.w);
    x.at(0, 5) = 0x08, x.at(1, 5) = 0x88;  // 1 and -1
    w.at(3, 9) = HiF8::kNanCode;
    w.at(7, 5) = HiF8::kInfCode;
    const auto out = run(x, w, c, plain(c.m, c.n, nullptr));
    for (int64_t j = 0; j < c.n; ++j) {
        CHECK(std::isnan(out[j]) == (j == 3), "column %lld: %g", (long long)j, out[j]);
    }
    CHECK(out[7] == INFINITY && out[c.n + 7] == -INFINITY, "%g and %g", out[7], out[c.n + 7]);
}

// The epilogue gets every sum once: codes of out are those of the very numbers that are written without it.
void test_codes_out() {
    const Case c{20, 70, 512, FormatId::e4m3, FormatId::e4m3, 0, 0, 0, 132};
    Codes x(c.m, c.k, c.k, 0, c.x), w(c.n, c.k, c.k, 0, c.w);
    GemmEpilogue epilogue = plain(c.m, c.n, nullptr);
    epilogue.activation = Activation::relu;
    const auto numbers = run(x, w, c, epilogue);
    std::vector<uint8_t> codes(static_cast<size_t>(c.m * c.n) + 16);
    auto* aligned = codes.data() + (16 - reinterpret_cast<uintptr_t>(codes.data()) % 16) % 16;
    const float scale = 300.0f;
    unsigned amax = 0;
    unsigned long long counts[4] = {};
    epilogue.out = aligned;
    epilogue.writes_codes = true;
    epilogue.format = FormatId::hif8;
    epilogue.saturate = true;
    epilogue.out_scale = &scale;
    epilogue.amax = &amax;
    epilogue.counts = counts;
    run(x, w, c, epilogue);
    float most = 0.0f;
    unsigned long long flushed = 0;
    for (int64_t i = 0; i < c.m * c.n; ++i) {
        const uint8_t want = HiF8::encode_bits(bits_from_float(numbers[i] / scale), true);
        CHECK(aligned[i] == want, "at %lld: %02x, not %02x", (long long)i, aligned[i], want);
        most = std::max(most, std::fabs(numbers[i]));
        flushed += want == 0 && numbers[i] != 0.0f;
    }
    CHECK(float_from_bits(amax) == most, "amax %g, not %g", float_from_bits(amax), most);
    CHECK(counts[2] == flushed, "%llu flushed, not %llu", counts[2], flushed);
}

// Every step belongs to one slice, and none is empty.
void test_plan() {
    for (int64_t m : {1, 8, 9, 17, 33, 64}) {
        for (int64_t n : {1, 128, 129, 4096, 128256}) {
            for (int64_t k : {0, 1, 256, 4096, 16384, 53248}) {
                const StreamGemm gemm{{}, {}, m, n, k, 132};
                const StreamPlan plan = plan_stream(gemm);
                CHECK(plan.tile_m >= m && plan.tiles * plan.tile_n >= n && plan.steps * plan.step >= k, "too small");
                CHECK(plan.steps_per_slice * plan.slices >= plan.steps, "steps are left out");
                CHECK(k == 0 || plan.steps_per_slice * (plan.slices - 1) < plan.steps, "an empty slice");
                CHECK((plan.slices == 1) == (plan.workspace() == 0), "workspace %zu", plan.workspace());
            }
        }
    }
    const StreamPlan decode = plan_stream({{}, {}, 1, 4096, 4096, 132});
    CHECK(decode.tiles == 32 && decode.slices == 8, "%lld tiles in %d slices", (long long)decode.tiles, decode.slices);
}

}  // namespace

int main() {
    test_plan();
    test_products();
    test_special_codes();
    test_codes_out();
    return report("gemm_stream");
}
