// The HiF8 carrier: codes of a format written as E4M3 codes of value * 2^k, as fp8kernels/kernels/quantize/carrier.py.
#pragma once

#include "formats/fp8.h"
#include "formats/hif8.h"
#include "scaling/rules.h"

namespace fp8kernels {

constexpr int kNoCarrier = -1;

// value * 2^k as bits of fp32, from those of a value of a format; k in 0 .. 13 cannot overflow.
FP8K_HD constexpr uint32_t shifted_bits(uint32_t bits, int k) {
    const uint32_t magnitude = bits & kMagnitude;
    const bool moves = magnitude != 0 && magnitude < kInfBits;
    return moves ? bits + (static_cast<uint32_t>(k) << kMantissaBits) : bits;
}

// What becomes of each code: the E4M3 code, and whether it loses something above (it saturates) or below.
struct Carrier {
    uint8_t code[256] = {};
    uint8_t above[256] = {}, below[256] = {};  // 0 or 1

    template <class Fmt>
    static constexpr Carrier make(int k) {
        Carrier table;
        for (int i = 0; i < 256; ++i) {
            const uint32_t wanted = shifted_bits(Fmt::decode_bits(static_cast<uint8_t>(i)), k);
            const uint32_t magnitude = wanted & kMagnitude;
            table.code[i] = E4M3::encode_bits(wanted, true);
            table.above[i] = magnitude > E4M3::kMaxBits && magnitude <= kInfBits;
            table.below[i] = magnitude < E4M3::kMaxBits && E4M3::decode_bits(table.code[i]) != wanted;
        }
        return table;
    }
};

// The scale that a carried tensor is divided by: so large that that of its codes, scale * 2^-k, is no subnormal number.
FP8K_HD inline float usable_scale(float scale, int k) {
    const float least = float_from_bits(kSmallestScaleBits + (static_cast<uint32_t>(k) << kMantissaBits));
    return scale < least ? least : scale;
}

// 2^-k, which the scale is multiplied by in the end; exact.
FP8K_HD inline float carrier_step(int k) { return float_from_bits(fp32_bits(-k)); }

}  // namespace fp8kernels
