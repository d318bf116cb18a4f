// The encoders of every instruction set on all values and midpoints with their neighbours, and the counts.
#include <vector>

#include "check.h"
#include "cpu/isa.h"
#include "formats/fp8.h"
#include "formats/hif8.h"
#include "judge.h"
#include "quantize/quantize.h"

using namespace fp8kernels;

struct Result {
    std::vector<uint8_t> codes;
    float scale, amax;
    int64_t counts[4];
};

Result quantize_all(const std::vector<float>& x, FormatId fmt, bool saturate, int carrier = kNoCarrier) {
    const auto n = static_cast<int64_t>(x.size());
    Result out{std::vector<uint8_t>(x.size()), 0, 0, {}};
    const float scale = 1.0f;
    quantize({x.data(),
              InputType::fp32,
              1,
              n,
              n,
              1,
              1,
              &scale,
              &out.scale,
              &out.amax,
              out.codes.data(),
              out.counts,
              fmt,
              1.0f,
              {1.0f, false},
              saturate,
              1,
              carrier});
    return out;
}

template <class Fmt>
void check_format(const char* isa, const char* fmt) {
    const std::vector<float> numbers = hard_numbers(Fmt::kId);
    std::vector<float> ordinary;  // without overflow, so that no chunk leaves the fast path
    for (float y : numbers) {
        if (std::fabs(y) < float_from_bits(Fmt::kOverflowBits) * 0.99f) ordinary.push_back(y);
    }
    for (bool saturate : {true, false}) {
        for (const auto& x : {numbers, ordinary}) {
            const Result got = quantize_all(x, Fmt::kId, saturate);
            int64_t saturated = 0, flushed = 0, nonfinite = 0;
            for (size_t i = 0; i < x.size(); ++i) {
                const uint8_t want = judge<Fmt>(x[i], saturate);
                CHECK(got.codes[i] == want, "%s %s: %a gives %02x, nearest is %02x", isa, fmt, x[i], got.codes[i],
                      want);
                const float size = std::fabs(x[i]);
                saturated += size >= float_from_bits(Fmt::kOverflowBits);
                flushed += size > 0 && decode_table(Fmt::kId)[want] == 0;
                nonfinite += !std::isfinite(size);
            }
            CHECK(got.counts[0] == static_cast<int64_t>(x.size()), "%s %s", isa, fmt);
            CHECK(got.counts[1] == saturated, "%s %s: %d", isa, fmt, static_cast<int>(got.counts[1]));
            CHECK(got.counts[2] == flushed, "%s %s: %d", isa, fmt, static_cast<int>(got.counts[2]));
            CHECK(got.counts[3] == nonfinite, "%s %s: %d", isa, fmt, static_cast<int>(got.counts[3]));
            CHECK(std::isnan(got.amax) == (nonfinite > 0), "%s %s: amax %g", isa, fmt, got.amax);
        }
    }
}

// The codes of a carrier against the nearest E4M3 value of what the format's own codes stand for, times 2^k.
template <class Fmt>
void check_carrier(const char* isa, const char* fmt) {
    const std::vector<float> x = hard_numbers(Fmt::kId);
    for (int k : {0, 1, 4, 13}) {
        const Result plain = quantize_all(x, Fmt::kId, true), got = quantize_all(x, Fmt::kId, true, k);
        int64_t saturated = 0, flushed = 0;
        for (size_t i = 0; i < x.size(); ++i) {
            const float wanted = std::ldexp(decode_table(Fmt::kId)[plain.codes[i]], k);
            const uint8_t code = judge<E4M3>(wanted, true);
            CHECK(got.codes[i] == code, "%s %s: %a gives %02x with k = %d, nearest is %02x", isa, fmt, x[i],
                  got.codes[i], k, code);
            const float decoded = decode_table(FormatId::e4m3)[code];
            const bool overflow = std::fabs(x[i]) >= float_from_bits(Fmt::kOverflowBits);
            const bool above = std::fabs(wanted) > float_from_bits(E4M3::kMaxBits);
            saturated += overflow || above;
            flushed += std::isfinite(x[i]) && x[i] != 0 && !above && (wanted == 0 || decoded != wanted);
        }
        CHECK(got.scale == std::ldexp(1.0f, -k), "%s %s: %g", isa, fmt, got.scale);
        CHECK(got.counts[1] == saturated, "%s %s: %d", isa, fmt, static_cast<int>(got.counts[1]));
        CHECK(got.counts[2] == flushed, "%s %s: %d", isa, fmt, static_cast<int>(got.counts[2]));
        CHECK(got.counts[3] == plain.counts[3], "%s %s: %d", isa, fmt, static_cast<int>(got.counts[3]));
    }
}

int main() {
    for (const char* isa : {"portable", "avx2", "avx512"}) {
        if (!set_isa(isa)) {
            std::printf("quantize: this CPU has no %s\n", isa);
            continue;
        }
        check_format<HiF8>(isa, "hif8");
        check_format<E4M3>(isa, "e4m3");
        check_format<E5M2>(isa, "e5m2");
        check_carrier<HiF8>(isa, "hif8");
    }
    return report("quantize");
}
