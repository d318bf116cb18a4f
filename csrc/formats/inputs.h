// bf16 and fp16, one number at a time, without the help of the processor; equal to the vector conversions.
#pragma once

#include "formats/format.h"

namespace fp8kernels {

FP8K_HD inline float float_from_bf16(uint16_t x) { return float_from_bits(static_cast<uint32_t>(x) << 16); }

FP8K_HD inline float float_from_fp16(uint16_t x) {
    const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16;
    const uint32_t magnitude = x & 0x7FFF;
    if (magnitude > 0x7C00) return float_from_bits(sign | 0x7FC00000u | (magnitude & 0x3FF) << 13);  // a quiet NaN
    if (magnitude == 0x7C00) return float_from_bits(sign | kInfBits);
    if (magnitude >= 0x0400) return float_from_bits(sign | ((magnitude << 13) + (112u << kMantissaBits)));
    const float value = static_cast<float>(magnitude) * 5.9604644775390625e-08f;  // 2^-24, exact
    return float_from_bits(sign | bits_from_float(value));
}

// Round to nearest, ties to even; NaN becomes the quiet NaN of its sign.
FP8K_HD inline uint16_t bf16_from_float(float x) {
    const uint32_t bits = bits_from_float(x);
    if ((bits & kMagnitude) > kInfBits) return static_cast<uint16_t>((bits >> 16) | 0x40);
    return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

FP8K_HD inline uint16_t fp16_from_float(float x) {
    const uint32_t bits = bits_from_float(x);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    const uint32_t magnitude = bits & kMagnitude;
    if (magnitude > kInfBits) return static_cast<uint16_t>(sign | 0x7E00);
    if (magnitude >= fp32_bits(15, 0x7FF, 11)) return static_cast<uint16_t>(sign | 0x7C00);  // 65520 rounds to Inf
    if (magnitude < fp32_bits(-14)) {  // subnormal: adding 0.5 rounds at 2^-24, the step of fp16 there
        const float shifted = float_from_bits(magnitude) + 0.5f;
        return static_cast<uint16_t>(sign | (bits_from_float(shifted) - fp32_bits(-1)));
    }
    const uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((rounded - (112u << kMantissaBits)) >> 13));
}

}  // namespace fp8kernels
