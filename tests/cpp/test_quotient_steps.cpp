// The quotient of the Triton kernels (fp8kernels/kernels/triton_jit.py), step by step, against the division: it is the
// correctly rounded one wherever a code could depend on it, for scales and numbers of every exponent.
#include <cmath>
#include <cstdint>
#include <random>

#include "check.h"
#include "formats/format.h"

namespace {

float quotient(float x, float scale) {
    const float lift = scale < 0x1p-30f ? 0x1p64f : scale > 0x1p60f ? 0x1p-64f : 1.0f;
    const float near = scale * lift, r = 1.0f / near;
    x *= lift;
    const float q = x * r;
    const float faithful = std::fma(std::fma(-q, near, x), r, q);
    const float correct = std::fma(std::fma(-faithful, near, x), r, faithful);
    return std::isinf(q) || std::isnan(q) ? q : correct;
}

}  // namespace

int main() {
    using fp8kernels::float_from_bits;
    std::mt19937_64 random(0);
    int64_t tried = 0, wrong = 0;
    for (int64_t i = 0; i < 4'000'000; ++i) {
        const uint64_t bits = random();
        const float scale =
            float_from_bits(0x00800000u + static_cast<uint32_t>(bits) % 0x7F000000u);  // positive, normal
        float x = float_from_bits(static_cast<uint32_t>(bits >> 32));
        if (i % 4) x = std::ldexp(scale, static_cast<int>(bits >> 58) - 32) * (1 + (bits >> 40) * 0x1p-24f);  // near it
        const float want = x / scale, got = quotient(x, scale);
        if (std::isnan(want)) {
            wrong += !std::isnan(got);
        } else if (std::fabs(want) < 0x1p-24f) {  // every format rounds it to zero
            wrong += !(std::fabs(got) <= 0x1p-24f);
        } else if (std::fabs(want) >= 0x1p17f) {  // every format overflows
            wrong += !(std::fabs(got) >= 0x1p17f) || std::signbit(want) != std::signbit(got);
        } else {
            ++tried;
            wrong += got != want;
        }
    }
    CHECK(tried > 2'000'000, "only %lld quotients in the range that matters", static_cast<long long>(tried));
    CHECK(wrong == 0, "%lld of %lld quotients differ", static_cast<long long>(wrong), static_cast<long long>(tried));
    return report("quotient in steps");
}
