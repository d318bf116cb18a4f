// The sm_90 gemm, thread by thread on the host: every tile, its edges, split K, block scales and the epilogue.
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
// clang-format off: what declares the instances comes before them
#include "gemm_sm90/gemm.cu"
#include "gemm_sm90/e4m3_e4m3.cu"
#include "gemm_sm90/e4m3_e5m2.cu"
#include "gemm_sm90/e5m2_e4m3.cu"
// clang-format on

using namespace fp8kernels;

namespace {

constexpr int kProcessors = 3;  // more tiles than blocks, so that blocks go on to a second and third one

float value(FormatId format, uint8_t code) {
    return float_from_bits(format == FormatId::e4m3 ? E4M3::decode_bits(code) : E5M2::decode_bits(code));
}

// Codes [rows, columns] of a matrix whose rows start every `stride` bytes; what lies between them is NaN.
struct Matrix {
    int64_t rows, columns, stride;
    FormatId format;
    std::vector<uint8_t> memory;
    uint8_t* codes;

    Matrix(int64_t rows_, int64_t columns_, FormatId format_, unsigned seed)
        : rows(rows_), columns(columns_), stride((columns_ + 15) / 16 * 16 + 16), format(format_) {
        memory.assign(static_cast<size_t>(rows * stride) + 16, 0x7F);
        codes = memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16) % 16;
        std::mt19937 random(seed);
        std::normal_distribution<float> normal(0.0f, 1.0f);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < columns; ++c) {
                const uint32_t bits = bits_from_float(normal(random));
                codes[r * stride + c] =
                    format == FormatId::e4m3 ? E4M3::encode_bits(bits, true) : E5M2::encode_bits(bits, true);
            }
    }

    double at(int64_t r, int64_t c) const { return value(format, codes[r * stride + c]); }
    CudaOperand operand() const { return {codes, rows, stride, format, nullptr}; }
};

struct Case {
    int64_t m, n, k;
    GemmTile tile;
    int splits = 1;
    FormatId x = FormatId::e4m3, w = FormatId::e4m3;
    bool blocks = false, rows = false;
    Activation activation = Activation::none;
    bool bias = false, residual = false, codes = false;
    NumberType out = NumberType::fp32;
};

std::vector<float> random_scales(size_t count, unsigned seed) {
    std::mt19937 random(seed);
    std::uniform_real_distribution<float> uniform(0.01f, 2.0f);
    std::vector<float> scales(count);
    for (float& scale : scales) scale = uniform(random);
    return scales;
}

double activated(double y, Activation activation) {
    switch (activation) {
        case Activation::relu: return y < 0 ? 0 : y;
        case Activation::silu: return y / (1 + std::exp(-y));
        case Activation::gelu: return 0.5 * y * (1 + std::erf(y * std::sqrt(0.5)));
        case Activation::gelu_tanh:
            return 0.5 * y * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (y + 0.044715 * y * y * y)));
        default: return y;
    }
}

void run(const Case& c) {
    const Matrix x(c.m, c.k, c.x, 1), w(c.n, c.k, c.w, 2);
    const int64_t steps = (c.k + 127) / 128;
    const auto x_scale = random_scales(static_cast<size_t>(c.blocks ? c.m * steps : c.rows ? c.m : 1), 3);
    const auto w_scale = random_scales(static_cast<size_t>(c.blocks ? (c.n + 127) / 128 * steps : c.rows ? c.n : 1), 4);
    const auto bias = random_scales(static_cast<size_t>(c.n), 5);
    const auto residual = random_scales(static_cast<size_t>(c.m * c.n), 6);
    const size_t size = static_cast<size_t>(c.m * c.n);
    std::vector<float4> out(size / 4 + 2, make_float4(-7, -7, -7, -7));  // 16-byte aligned
    unsigned amax = 0;
    unsigned long long counts[4] = {};
    const float out_scale = 0.037f;

    GemmCudaArguments arguments{x.operand(), w.operand(), c.k, false, kProcessors};
    GemmEpilogue e{};
    if (c.blocks) {
        arguments.x.block_scale = x_scale.data();
        arguments.w.block_scale = w_scale.data();
    } else {
        e.x_scale = x_scale.data();
        e.w_scale = w_scale.data();
        e.x_scale_step = e.w_scale_step = c.rows;
    }
    e.bias = c.bias ? bias.data() : nullptr;
    e.residual = c.residual ? residual.data() : nullptr;
    e.residual_stride = c.n;
    e.activation = c.activation;
    e.out = out.data();
    e.out_type = c.out;
    e.writes_codes = c.codes;
    e.format = FormatId::e4m3;
    e.saturate = true;
    e.out_scale = &out_scale;
    e.amax = &amax;
    e.counts = counts;
    e.m = c.m;
    e.n = c.n;

    GemmPlan plan = plan_gemm(arguments);
    plan.tile = c.tile;
    plan.tiles_a = ((plan.swapped() ? c.n : c.m) + 127) / 128;
    plan.tiles_b = ((plan.swapped() ? c.m : c.n) + plan.columns() - 1) / plan.columns();
    plan.splits = c.splits;
    std::vector<float4> workspace(plan.workspace() / 16 + 1, make_float4(NAN, NAN, NAN, NAN));
    CHECK(gemm_cuda(arguments, plan, e, workspace.data(), nullptr) == cudaSuccess, "did not start");

    double worst = 0, most = 0;
    int64_t wrong_codes = 0;
    for (int64_t m = 0; m < c.m; ++m)
        for (int64_t n = 0; n < c.n; ++n) {
            double sum = 0, size_of_sum = 0;
            for (int64_t k = 0; k < c.k; ++k) {
                const double scale = c.blocks
                                         ? double(x_scale[m * steps + k / 128]) * w_scale[n / 128 * steps + k / 128]
                                         : double(x_scale[c.rows ? m : 0]) * w_scale[c.rows ? n : 0];
                sum += x.at(m, k) * w.at(n, k) * scale;
                size_of_sum += std::fabs(x.at(m, k) * w.at(n, k) * scale);
            }
            const double before = c.bias ? sum + bias[n] : sum;
            double exact = activated(before, c.activation);
            if (c.residual) exact += residual[m * c.n + n];
            const double u = std::pow(2.0, -24);
            // a sum of K products, two scales and the bias; the activations have slopes up to 1.13 and round a few
            // times
            const double bound = 1.13 * ((c.k + 2) * u * size_of_sum + u * std::fabs(before)) +
                                 8 * u * (std::fabs(before) + std::fabs(exact)) + 1e-30;
            most = std::fmax(most, std::fabs(exact));
            const int64_t at = m * c.n + n;
            if (c.codes) {
                const uint8_t code = reinterpret_cast<const uint8_t*>(out.data())[at];
                const auto encode = [&](double y) {
                    return E4M3::decode_bits(E4M3::encode_bits(bits_from_float(float(y / out_scale)), true));
                };
                const float got = float_from_bits(E4M3::decode_bits(code));
                wrong_codes +=
                    got < float_from_bits(encode(exact - bound)) || got > float_from_bits(encode(exact + bound));
                continue;
            }
            double got, unit;
            if (c.out == NumberType::fp32) {
                got = reinterpret_cast<const float*>(out.data())[at], unit = u;
            } else {
                const uint16_t bits = reinterpret_cast<const uint16_t*>(out.data())[at];
                got = c.out == NumberType::bf16 ? float_from_bf16(bits) : float_from_fp16(bits);
                unit = std::pow(2.0, c.out == NumberType::bf16 ? -8 : -11);
            }
            const double error = std::fabs(got - exact) / (bound + unit * (std::fabs(exact) + bound));
            worst = error > worst || std::isnan(error) ? error : worst;
        }
    CHECK(worst <= 1, "%lldx%lldx%lld tile %d splits %d: the error is %g times its bound", (long long)c.m,
          (long long)c.n, (long long)c.k, int(c.tile), c.splits, worst);
    CHECK(wrong_codes == 0, "%lld codes are wrong", (long long)wrong_codes);
    const size_t bytes = size * (c.codes ? 1 : c.out == NumberType::fp32 ? 4 : 2);
    const float* guard =
        reinterpret_cast<const float*>(reinterpret_cast<const uint8_t*>(out.data()) + (bytes + 3) / 4 * 4);
    CHECK(*guard == -7.0f, "%lldx%lld: wrote beyond the end", (long long)c.m, (long long)c.n);
    if (c.codes) {
        CHECK(std::fabs(float_from_bits(amax) - most) <= 1e-5 * most, "amax is %g, not %g", float_from_bits(amax),
              most);
    }
}

void tiles() {
    using T = GemmTile;
    for (const T tile : {T::wide, T::turns, T::careful}) {
        run({1, 1, 1, tile});
        run({130, 264, 300, tile});
        run({127, 129, 17, tile});
    }
    run({500, 300, 140, T::turns});     // several tiles a warpgroup
    run({300, 520, 1000, T::careful});  // more steps than stages
    run({129, 130, 900, T::wide});
    for (const T tile : {T::rows16, T::rows32, T::rows64}) {
        run({1, 1, 1, tile});
        run({13, 300, 1200, tile});
    }
    run({64, 130, 257, T::rows64});
}

void splits() {
    using T = GemmTile;
    run({130, 140, 1100, T::wide, 3});
    run({260, 140, 1100, T::turns, 5});
    run({130, 140, 520, T::careful, 5});
    run({9, 260, 1540, T::rows16, 4});
    run({40, 130, 640, T::rows64, 2});
}

void formats_and_scales() {
    using T = GemmTile;
    run({70, 140, 256, T::turns, 1, FormatId::e5m2, FormatId::e4m3});
    run({70, 140, 256, T::wide, 1, FormatId::e4m3, FormatId::e5m2});
    run({20, 140, 256, T::rows32, 1, FormatId::e5m2, FormatId::e4m3});
    run({140, 256, 384, T::careful, 1, FormatId::e4m3, FormatId::e4m3, true});
    run({140, 256, 1024, T::careful, 4, FormatId::e4m3, FormatId::e4m3, true});
    for (const T tile : {T::wide, T::turns, T::careful, T::rows16}) {
        run({16, 150, 128, tile, 1, FormatId::e4m3, FormatId::e4m3, false, true});
    }
}

void epilogue() {
    for (int activation = 0; activation < 5; ++activation) {
        for (const GemmTile tile : {GemmTile::turns, GemmTile::rows16}) {
            Case c{14, 77, 128, tile};
            c.activation = static_cast<Activation>(activation);
            c.bias = true;
            c.residual = activation % 2 == 0;
            c.out = static_cast<NumberType>(activation % 3);
            run(c);
            c.codes = true;
            c.n = 80;
            run(c);
        }
    }
}

void plans() {
    const auto plan = [](int64_t m, int64_t n, int64_t k, bool precise) {
        return plan_gemm(
            {{nullptr, m, 0, FormatId::e4m3, nullptr}, {nullptr, n, 0, FormatId::e4m3, nullptr}, k, precise, 132});
    };
    for (const int64_t m : {1, 16, 17, 32, 33, 64, 65, 4096, 38430})
        for (const int64_t n : {1, 768, 6144, 30522})
            for (const int64_t k : {1, 128, 768, 4096, 16384})
                for (const bool precise : {false, true}) {
                    const GemmPlan p = plan(m, n, k, precise);
                    const int64_t steps = (k + 127) / 128, each = (steps + p.splits - 1) / p.splits;
                    CHECK(p.splits >= 1 && each * (p.splits - 1) < steps, "a split of %lld has nothing to do",
                          (long long)k);
                    CHECK(p.tiles_a * 128 >= (p.swapped() ? n : m), "tiles do not cover the rows");
                    CHECK(p.tiles_b * p.columns() >= (p.swapped() ? m : n), "tiles do not cover the columns");
                    CHECK((p.workspace() > 0) == (p.splits > 1), "a workspace belongs to splits");
                }
    CHECK(plan(1, 4096, 4096, false).splits > 1, "32 tiles of w leave most processors idle");
    CHECK(plan(8192, 8192, 8192, false).tile == GemmTile::wide, "large products take the large tile");
    CHECK(plan(9618, 768, 768, false).tile == GemmTile::turns, "short sums hide their epilogue");
}

}  // namespace

int main() {
    for (const bool eager : {false, true}) {
        emulate::eager() = eager;
        tiles();
        splits();
        formats_and_scales();
        epilogue();
    }
    plans();
    return report("gemm on sm_90");
}
