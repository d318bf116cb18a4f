// How an amax becomes a scale: the same to the bit as fp8kernels/scaling/rules.py, on host and device.
#pragma once

#include <cstdint>

#include "formats/format.h"

namespace fp8kernels {

constexpr uint32_t kSmallestScaleBits = 0x00800000u;  // 2^-126, the smallest normal number
constexpr uint32_t kLargestScaleBits = 0x7F7FFFFFu;   // FLT_MAX

struct ScaleRule {
    float headroom;     // 2^margin
    bool power_of_two;  // round up to a power of two
};

// amax is finite and not negative. The result decodes: x = code * scale.
FP8K_HD static inline float scale_from_amax(float amax, float target, ScaleRule rule) {
    if (amax == 0.0f) return 1.0f;
    float scale = amax / target * rule.headroom;
    const auto clamp = [](float s) {
        const float low = float_from_bits(kSmallestScaleBits), high = float_from_bits(kLargestScaleBits);
        return s < low ? low : s > high ? high : s;
    };
    scale = clamp(scale);
    if (rule.power_of_two) {
        const uint32_t bits = bits_from_float(scale);
        if (bits & 0x7FFFFFu) scale = clamp(float_from_bits((bits & kInfBits) + (1u << kMantissaBits)));
    }
    return scale;
}

}  // namespace fp8kernels
