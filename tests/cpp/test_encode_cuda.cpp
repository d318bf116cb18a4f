// The encoders and the quotient of csrc/quantize/encode.cuh against the scalar formats: all bf16 and fp16 numbers, all
// values and midpoints with their neighbours, and random fp32 numbers by random scales.
#include "quantize/encode.cuh"

#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "formats/inputs.h"
#include "judge.h"

using namespace fp8kernels;

namespace {

// Codes of x by the paths that a kernel takes, and the counts.
template <class Encode>
struct Encoder {
    Coding how;
    std::vector<uint32_t> table = std::vector<uint32_t>(Encode::kTable);
    Encode encode;

    explicit Encoder(const Coding& coding) : how(coding), encode(how, table.data(), 0, 1) {}

    template <int kTurns>
    void run(const float (&x)[4], float scale, uint8_t* codes, Tally& tally, int64_t& fast) {
        const Divisor d = divisor(scale, how);
        const float most = largest(x);
        tally.raise(most);
        if (most < d.limit) {
            uint32_t packed[1];
            const uint32_t signs[1] = {signs_of(x)};
            encode_fast<kTurns>(x, signs, d, encode, packed, tally);
            std::memcpy(codes, packed, 4);
            fast += 4;
        } else {
            for (int i = 0; i < 4; ++i) codes[i] = static_cast<uint8_t>(encode_any(x[i], scale, how, tally));
        }
    }
};

struct Seen {
    uint8_t code;
    bool saturated, flushed;
};

// What the two steps of the definition give: round to the format, then write with the carrier.
template <class Fmt>
Seen want(float x, float scale, const Coding& how, const Carrier& carrier) {
    const float y = x / scale;
    const uint32_t size = bits_from_float(y) & kMagnitude;
    uint8_t code = Fmt::encode_bits(bits_from_float(y), how.saturate);
    Seen seen{code, size >= Fmt::kOverflowBits && size <= kInfBits,
              code != Fmt::kNanCode && (code & 0x7F) == 0 && x != 0.0f && std::isfinite(x)};
    if (how.carrier != kNoCarrier) {
        seen = {carrier.code[code], seen.saturated || carrier.above[code] != 0,
                seen.flushed || carrier.below[code] != 0};
    }
    return seen;
}

template <class Fmt, class Encode, int kTurns>
void check_numbers(const std::vector<float>& x, float scale, const Coding& how, const char* what) {
    Encoder<Encode> encoder(how);
    const Carrier carrier = Carrier::make<Fmt>(how.carrier == kNoCarrier ? 0 : how.carrier);
    Tally tally;
    int64_t fast = 0, saturated = 0, flushed = 0, nonfinite = 0;
    for (size_t i = 0; i < x.size(); i += 4) {
        float four[4] = {};
        for (size_t j = 0; j < 4 && i + j < x.size(); ++j) four[j] = x[i + j];
        uint8_t codes[4];
        encoder.template run<kTurns>(four, scale, codes, tally, fast);
        for (int j = 0; j < 4; ++j) {
            const Seen seen = want<Fmt>(four[j], scale, how, carrier);
            CHECK(codes[j] == seen.code, "%s: %a / %a gives %02x, the format %02x", what, four[j], scale, codes[j],
                  seen.code);
            saturated += seen.saturated;
            flushed += seen.flushed;
            nonfinite += !std::isfinite(four[j]);
        }
    }
    CHECK(tally.saturated == saturated, "%s: %u saturated, %lld wanted", what, tally.saturated,
          static_cast<long long>(saturated));
    CHECK(tally.flushed == flushed, "%s: %u flushed, %lld wanted", what, tally.flushed,
          static_cast<long long>(flushed));
    CHECK(tally.nonfinite == nonfinite, "%s: %u not finite, %lld wanted", what, tally.nonfinite,
          static_cast<long long>(nonfinite));
    CHECK(fast > 0 || scale > 0x1p100f || scale < 0x1p-60f, "%s: the fast path was never taken", what);
}

std::vector<float> all_of(float (*widen)(uint16_t)) {
    std::vector<float> out;
    for (uint32_t i = 0; i < 1 << 16; ++i) {
        // by magnitude, so that groups of four are fast or not together; both signs in each
        out.push_back(widen(static_cast<uint16_t>((i >> 1) | (i & 1) << 15)));
    }
    return out;
}

template <class Fmt, class Encode>
void check_format(const char* name, int carrier) {
    std::mt19937 random(7);
    std::uniform_int_distribution<uint32_t> any_bits;
    for (bool saturate : {true, false}) {
        const Coding how = coding(Fmt::kId, saturate, carrier);
        for (float scale : {1.0f, 0.0123f, 1.0f / 3.0f, 0x1.FFFFFEp-9f, 0x1.000002p3f, 0x1p-61f, 0x1p101f}) {
            check_numbers<Fmt, Encode, 1>(all_of(float_from_bf16), scale, how, name);
            check_numbers<Fmt, Encode, 1>(all_of(float_from_fp16), scale, how, name);
            std::vector<float> hard;
            for (float y : hard_numbers(Fmt::kId)) {
                for (int i = 0; i < 4; ++i) hard.push_back(y * scale);  // its own group of four
            }
            check_numbers<Fmt, Encode, 2>(hard, scale, how, name);
        }
    }
    const Coding how = coding(Fmt::kId, true, carrier);
    constexpr int kScales = 200, kNumbers = 1 << 14;
    for (int s = 0; s < kScales; ++s) {
        const float scale =
            float_from_bits(fp32_bits(static_cast<int>(any_bits(random) % 40) - 20) | (any_bits(random) & 0x7FFFFFu));
        std::vector<float> x;
        for (int i = 0; i < kNumbers; ++i) {
            const int exponent = static_cast<int>(any_bits(random) % 45) - 28;
            const uint32_t bits = fp32_bits(exponent) | (any_bits(random) & 0x807FFFFFu);
            x.push_back(float_from_bits(bits) * scale);
        }
        check_numbers<Fmt, Encode, 2>(x, scale, how, name);
    }
}

// The quotient of fp32 numbers is the division: random ones, and those whose quotient lies next to the middle between
// two fp32 numbers, where one unit in the last place of a product decides.
void check_quotients() {
    std::mt19937 random(13);
    std::uniform_int_distribution<uint32_t> any_bits;
    for (int i = 0; i < 4000000; ++i) {
        const float scale =
            float_from_bits(fp32_bits(static_cast<int>(any_bits(random) % 160) - 60) | (any_bits(random) & 0x7FFFFFu));
        const float y =
            float_from_bits(fp32_bits(static_cast<int>(any_bits(random) % 38) - 22) | (any_bits(random) & 0x7FFFFFu));
        const float above = std::nextafterf(y, INFINITY);
        const double middle = (static_cast<double>(y) + static_cast<double>(above)) / 2;
        const auto hard = static_cast<float>(middle * static_cast<double>(scale));
        for (const float x : {y * scale, hard, std::nextafterf(hard, 0.0f), std::nextafterf(hard, INFINITY)}) {
            if (!std::isfinite(x)) continue;
            const float got = quotient<2>(x, {scale, 1.0f / scale, 0.0f});
            CHECK(got == x / scale, "%a / %a is %a, not %a", x, scale, x / scale, got);
        }
    }
}

}  // namespace

int main() {
    check_quotients();
    check_format<E4M3, EncodeByAdder>("e4m3", kNoCarrier);
    check_format<E5M2, EncodeByAdder>("e5m2", kNoCarrier);
    check_format<HiF8, EncodeByTable>("hif8", kNoCarrier);
    check_format<HiF8, EncodeByTable>("hif8 carrier 4", 4);
    check_format<HiF8, EncodeByTable>("hif8 carrier 1", 1);
    return report("encode_cuda");
}
