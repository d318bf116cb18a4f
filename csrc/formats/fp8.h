// E4M3 (the "fn" kind, without infinities) and E5M2. Source: OCP 8-bit Floating Point Specification rev 1.0.
#pragma once

#include "formats/format.h"

namespace fp8kernels {

// What the two share: one sign bit, an exponent with gradual underflow, and a mantissa; ties go to the even code.
template <int kKept, int kSmallestNormal>  // mantissa bits; exponent of the smallest normal number
struct Fp8 {
    static constexpr bool kNegativeZero = true;
    static constexpr bool kTiesAway = false;
    static constexpr int kMantissa = kKept;
    static constexpr int kMinExponent = kSmallestNormal;

    // The code of a magnitude below overflow, rounded to nearest even.
    FP8K_HD static constexpr uint32_t round(uint32_t magnitude) {
        const int e = static_cast<int>(magnitude >> kMantissaBits) - kBias;
        if (e < kMinExponent - kMantissa - 1) return 0;  // below half of the smallest number
        const int exponent = e > kMinExponent ? e : kMinExponent;
        const uint32_t whole = (magnitude & 0x7FFFFFu) | 0x800000u;  // with the implicit one
        const int shift = kMantissaBits - kMantissa + (exponent - e);
        const uint32_t odd = (whole >> shift) & 1;
        const uint32_t steps = (whole + (1u << (shift - 1)) - 1 + odd) >> shift;  // in units of the last kept bit
        return (static_cast<uint32_t>(exponent - kMinExponent) << kMantissa) + steps;
    }

    FP8K_HD static constexpr uint32_t decode_finite(uint32_t rest) {
        const int stored = static_cast<int>(rest >> kMantissa);
        uint32_t mantissa = rest & ((1u << kMantissa) - 1);
        if (stored > 0) return fp32_bits(stored - 1 + kMinExponent, mantissa, kMantissa);
        if (mantissa == 0) return 0;
        int e = kMinExponent;
        while (mantissa < (1u << kMantissa)) {
            mantissa <<= 1;
            --e;
        }
        return fp32_bits(e, mantissa & ((1u << kMantissa) - 1), kMantissa);
    }
};

struct E4M3 : Fp8<3, -6> {
    static constexpr FormatId kId = FormatId::e4m3;
    static constexpr uint8_t kMaxCode = 0x7E;
    static constexpr uint8_t kInfCode = 0x7F;  // there is no infinity: overflow is NaN, without a sign
    static constexpr uint8_t kNanCode = 0x7F;
    static constexpr uint32_t kMaxBits = fp32_bits(8, 6, 3);  // 448
    static constexpr uint32_t kOverflowBits =
        fp32_bits(8, 13, 4) + 1;  // the next number after 464, a tie that goes down

    FP8K_HD static constexpr uint8_t encode_bits(uint32_t bits, bool saturate) {
        const uint32_t magnitude = bits & kMagnitude;
        const uint8_t sign = static_cast<uint8_t>(bits >> 31 << 7);
        if (magnitude > kInfBits) return kNanCode;
        if (magnitude >= kOverflowBits) return saturate ? static_cast<uint8_t>(sign | kMaxCode) : kNanCode;
        return static_cast<uint8_t>(sign | round(magnitude));
    }

    FP8K_HD static constexpr uint32_t decode_bits(uint8_t code) {
        const uint32_t sign = static_cast<uint32_t>(code >> 7) << 31;
        const uint32_t rest = code & 0x7F;
        return sign | (rest == kNanCode ? 0x7FC00000u : decode_finite(rest));
    }
};

struct E5M2 : Fp8<2, -14> {
    static constexpr FormatId kId = FormatId::e5m2;
    static constexpr uint8_t kMaxCode = 0x7B;
    static constexpr uint8_t kInfCode = 0x7C;
    static constexpr uint8_t kNanCode = 0x7E;
    static constexpr uint32_t kMaxBits = fp32_bits(15, 3, 2);       // 57344
    static constexpr uint32_t kOverflowBits = fp32_bits(15, 7, 3);  // 61440, a tie that goes up

    FP8K_HD static constexpr uint8_t encode_bits(uint32_t bits, bool saturate) {
        const uint32_t magnitude = bits & kMagnitude;
        const uint8_t sign = static_cast<uint8_t>(bits >> 31 << 7);
        if (magnitude > kInfBits) return kNanCode;
        if (magnitude >= kOverflowBits) return static_cast<uint8_t>(sign | (saturate ? kMaxCode : kInfCode));
        return static_cast<uint8_t>(sign | round(magnitude));
    }

    FP8K_HD static constexpr uint32_t decode_bits(uint8_t code) {
        const uint32_t sign = static_cast<uint32_t>(code >> 7) << 31;
        const uint32_t rest = code & 0x7F;
        if (rest > kInfCode) return sign | 0x7FC00000u;
        return sign | (rest == kInfCode ? kInfBits : decode_finite(rest));
    }
};

}  // namespace fp8kernels
