// HiFloat8. Layout, by the exponent e of the number (arXiv 2409.16626; the table is drawn in formats/hif8.py):
//
//   |e| = 0      0001 mmm          |e| = 4..7    10 s ee mm
//   |e| = 1      001 s mmm         |e| = 8..15   11 s eee m
//   |e| = 2..3   01 s e mmm        e = -16..-22  0000 nnn, n = e + 23
//
// s is the exponent's sign; the top bit of |e| is not stored. 0x00 zero, 0x80 NaN, 0x6F / 0xEF infinities.
#pragma once

#include "formats/format.h"

namespace fp8kernels {

struct HiF8 {
    static constexpr FormatId kId = FormatId::hif8;
    static constexpr uint8_t kMaxCode = 0x6E;
    static constexpr uint8_t kInfCode = 0x6F;
    static constexpr uint8_t kNanCode = 0x80;
    static constexpr bool kNegativeZero = false;
    static constexpr bool kTiesAway = true;
    static constexpr uint32_t kMaxBits = fp32_bits(15);             // 32768
    static constexpr uint32_t kOverflowBits = fp32_bits(15, 1, 2);  // 40960: from here on it overflows
    static constexpr int kSmallestExponent = -22;
    static constexpr int kLargestExponent = 15;

    // How many mantissa bits the numbers in [2^e, 2^(e + 1)) keep; e in [-23, 15].
    FP8K_HD static constexpr int mantissa_bits(int e) {
        const int size = e < 0 ? -e : e;
        return size <= 3 ? 3 : size <= 7 ? 2 : size <= 15 ? 1 : 0;
    }

    // The code of 2^e; those of the same binade follow it. e in [-22, 15].
    FP8K_HD static constexpr uint8_t first_code(int e) {
        const int size = e < 0 ? -e : e;
        const int negative = e < 0 ? 1 : 0;
        if (size == 0) return 0x08;
        if (size == 1) return static_cast<uint8_t>(0x10 | negative << 3);
        if (size <= 3) return static_cast<uint8_t>(0x20 | negative << 4 | (size - 2) << 3);
        if (size <= 7) return static_cast<uint8_t>(0x40 | negative << 4 | (size - 4) << 2);
        if (size <= 15) return static_cast<uint8_t>(0x60 | negative << 4 | (size - 8) << 1);
        return static_cast<uint8_t>(e + 23);
    }

    // The half step that is added to the bits before the lower ones are cut off. At e = -23 everything rounds to 2^-22.
    FP8K_HD static constexpr uint32_t half_step(int e) {
        return 1u << (e == kSmallestExponent - 1 ? kMantissaBits : kMantissaBits - 1 - mantissa_bits(e));
    }

    FP8K_HD static constexpr uint8_t encode_bits(uint32_t bits, bool saturate) {
        const uint32_t magnitude = bits & kMagnitude;
        const uint8_t sign = static_cast<uint8_t>(bits >> 31 << 7);
        if (magnitude > kInfBits) return kNanCode;
        if (magnitude >= kOverflowBits) return static_cast<uint8_t>(sign | (saturate ? kMaxCode : kInfCode));
        const int e = static_cast<int>(magnitude >> kMantissaBits) - kBias;
        if (e < kSmallestExponent - 1) return 0;
        const uint32_t rounded = magnitude + half_step(e);
        const int out = static_cast<int>(rounded >> kMantissaBits) - kBias;
        const int kept = mantissa_bits(out);
        const uint32_t mantissa = (rounded >> (kMantissaBits - kept)) & ((1u << kept) - 1);
        return static_cast<uint8_t>(sign | (first_code(out) + mantissa));
    }

    FP8K_HD static constexpr uint32_t decode_bits(uint8_t code) {
        const uint32_t sign = static_cast<uint32_t>(code >> 7) << 31;
        const uint32_t rest = code & 0x7F;
        if (code == kNanCode) return 0x7FC00000u;
        if (rest == 0) return 0;
        if (rest == kInfCode) return sign | kInfBits;
        if (rest < 0x08) return sign | fp32_bits(static_cast<int>(rest) - 23);
        if (rest < 0x10) return sign | fp32_bits(0, rest & 7, 3);
        const int stored = rest < 0x20 ? 0 : rest < 0x40 ? 1 : rest < 0x60 ? 2 : 3;  // exponent bits
        const int kept = rest < 0x40 ? 3 : rest < 0x60 ? 2 : 1;                      // mantissa bits
        const int size = (1 << stored) | static_cast<int>((rest >> kept) & ((1u << stored) - 1));
        const bool negative = (rest >> (kept + stored)) & 1;
        return sign | fp32_bits(negative ? -size : size, rest & ((1u << kept) - 1), kept);
    }
};

}  // namespace fp8kernels
