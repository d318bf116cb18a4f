// Numbers to codes inside a CUDA kernel: the quotient x / scale, and encoders without a branch.
//
// Two paths, as in quantize_avx512.cpp. The fast one holds for a group of numbers whose largest lies below
// Divisor::limit: nothing overflows, nothing is Inf or NaN, and the quotient is a few multiplications. encode_any()
// takes one number, whatever it is.
//
// The quotient y = x / scale is the correctly rounded one:
//   r = 1 / scale;  q = x * r;  then once or twice  q = fma(fma(-q, scale, x), r, q)
// Once is enough for x of bf16 and fp16: tests/cpp/test_quotient.cpp tries every mantissa. For x of fp32 the first turn
// leaves q within one unit in the last place, and with r correctly rounded the second is exact (Markstein, IBM J. Res.
// Dev. 34, 1990). scale is in [2^-60, 2^100] here, so the remainder is exact wherever y is not far below the smallest
// code.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/convert.cuh"
#include "quantize/carrier.h"

namespace fp8kernels {

// How codes are made, apart from the scale; a kernel's argument, so that its members are operands in constant memory.
struct Coding {
    FormatId fmt;
    bool saturate;
    int carrier;      // kNoCarrier, or k: codes are E4M3's of value * 2^k
    float limit;      // the fast path takes |y| below it
    uint32_t lowest;  // E4M3 and E5M2: the bits of the smallest normal number,
    uint32_t cut;     // how many mantissa bits are cut off,
    float step;       // and 2^cut

    bool by_table() const { return fmt == FormatId::hif8; }  // else by the adder; see the encoders below
};

constexpr float kClearlyBelow = 0.9999f;  // so far that the rounding of a product or two does not matter

template <class Fmt>
Coding adder_coding(bool saturate) {
    constexpr uint32_t cut = kMantissaBits - Fmt::kMantissa;
    return {Fmt::kId,
            saturate,
            kNoCarrier,
            float_from_bits(Fmt::kOverflowBits) * kClearlyBelow,
            fp32_bits(Fmt::kMinExponent),
            cut,
            static_cast<float>(1u << cut)};
}

inline Coding coding(FormatId fmt, bool saturate, int carrier) {
    if (fmt == FormatId::e4m3) return adder_coding<E4M3>(saturate);
    if (fmt == FormatId::e5m2) return adder_coding<E5M2>(saturate);
    float limit = float_from_bits(HiF8::kOverflowBits);
    if (carrier != kNoCarrier) {  // what E4M3 cannot hold above saturates too
        const float held = float_from_bits(E4M3::kMaxBits) * carrier_step(carrier);
        limit = held < limit ? held : limit;
    }
    return {fmt, saturate, carrier, limit * kClearlyBelow, 0, 0, 0.0f};
}

// What a thread has seen.
struct Tally {
    float amax = 0.0f;  // NaN above Inf above numbers
    unsigned saturated = 0, flushed = 0, nonfinite = 0;

    __device__ void raise(float size) { amax = ptx::max_nan(amax, size); }
};

// ---- the quotient ---------------------------------------------------------------------------------------------------

struct Divisor {
    float scale, reciprocal;
    float limit;  // the fast path takes |x| below it; 0: none
};

__device__ inline Divisor divisor(float scale, const Coding& how) {
    const bool exact = scale >= 0x1p-60f && scale <= 0x1p100f;
    return {scale, __frcp_rn(scale), exact ? __fmul_rn(how.limit, scale) : 0.0f};
}

template <int kTurns>
__device__ __forceinline__ float quotient(float x, const Divisor& d) {
    float q = __fmul_rn(x, d.reciprocal);
#pragma unroll
    for (int i = 0; i < kTurns; ++i) q = __fmaf_rn(__fmaf_rn(-q, d.scale, x), d.reciprocal, q);
    return q;
}

// ---- one number, whatever it is -------------------------------------------------------------------------------------

template <class Fmt>
__device__ inline uint32_t encode_finite_or_not(uint32_t bits, bool saturate, bool& overflows) {
    overflows = (bits & kMagnitude) >= Fmt::kOverflowBits && (bits & kMagnitude) <= kInfBits;
    return Fmt::encode_bits(bits, saturate);
}

__device__ inline uint32_t encode_any(float x, float scale, const Coding& how, Tally& tally) {
    const uint32_t size = bits_from_float(x) & kMagnitude;
    const uint32_t y = bits_from_float(__fdiv_rn(x, scale));
    bool overflows = false;
    uint32_t code = 0;
    switch (how.fmt) {
        case FormatId::hif8: code = encode_finite_or_not<HiF8>(y, how.saturate, overflows); break;
        case FormatId::e4m3: code = encode_finite_or_not<E4M3>(y, how.saturate, overflows); break;
        case FormatId::e5m2: code = encode_finite_or_not<E5M2>(y, how.saturate, overflows); break;
    }
    bool lost = (code & 0x7F) == 0 && size != 0 && size < kInfBits;
    if (how.carrier != kNoCarrier) {
        const uint32_t wanted = shifted_bits(HiF8::decode_bits(static_cast<uint8_t>(code)), how.carrier);
        const uint32_t magnitude = wanted & kMagnitude;
        code = E4M3::encode_bits(wanted, true);
        overflows = overflows || (magnitude > E4M3::kMaxBits && magnitude <= kInfBits);
        lost = lost || (magnitude < E4M3::kMaxBits && E4M3::decode_bits(static_cast<uint8_t>(code)) != wanted);
    }
    tally.saturated += overflows;
    tally.flushed += lost;
    tally.nonfinite += size >= kInfBits;
    return code;
}

// ---- four numbers below the limit -----------------------------------------------------------------------------------

// The low bytes of four words.
__device__ __forceinline__ uint32_t pack(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// E4M3 and E5M2: adding 2^(e + cut) makes the adder round y to the format's mantissa bits at y's exponent e, ties to
// even; the low bits of the sum are then y in units of its last kept bit. Below the smallest normal number e stays.
struct EncodeByAdder {
    const Coding& how;

    __device__ EncodeByAdder(const Coding& coding, uint32_t*, unsigned, unsigned) : how(coding) {}
    static constexpr unsigned kTable = 1;  // words of shared memory: none is needed, and an array has one

    // Only the low byte counts.
    __device__ __forceinline__ uint32_t one(float y) const {
        const uint32_t exponent = max(bits_from_float(y) & kInfBits, how.lowest);
        const float sum = __fadd_rn(fabsf(y), __fmul_rn(float_from_bits(exponent), how.step));
        return bits_from_float(sum) + (exponent >> how.cut) - (how.lowest >> how.cut);
    }

    struct Four {
        uint32_t lost;  // the top bit of each byte whose code is zero
        __device__ __forceinline__ bool is_lost(int i) const { return lost >> 8 * i & 0x80; }
    };

    // Codes of four quotients; signs: the top bit of each byte.
    __device__ __forceinline__ uint32_t four(const float* y, uint32_t signs, Four& seen) const {
        const uint32_t codes = pack(one(y[0]), one(y[1]), one(y[2]), one(y[3]));
        seen.lost = ~(codes + 0x7F7F7F7Fu) & 0x80808080u;
        return codes | signs;
    }
};

// HiF8: its ties go away from zero and it keeps three mantissa bits at most, so the exponent and four mantissa bits
// decide the code. They index a table; 2^-kDown moves everything that counts to the exponents 2 .. 40, and what is
// flushed below.
struct EncodeByTable {
    static constexpr int kDown = 102, kBits = 4;
    static constexpr unsigned kTable = (HiF8::kLargestExponent + kBias - kDown + 1) << kBits;  // words
    static constexpr uint32_t kTakesSign = 0x8000, kLost = 0x10000;  // beside the code; zero takes no sign

    const uint32_t* table;

    __device__ EncodeByTable(const Coding& how, uint32_t* shared, unsigned thread, unsigned threads) : table(shared) {
        for (unsigned i = thread; i < kTable; i += threads) shared[i] = entry(i, how.carrier);
    }

    __device__ static uint32_t entry(uint32_t index, int carrier) {
        const uint32_t bits = index << (kMantissaBits - kBits);
        const bool tiny = bits < static_cast<uint32_t>(2) << kMantissaBits;
        const uint32_t code =
            tiny ? 0 : HiF8::encode_bits(bits + (static_cast<uint32_t>(kDown) << kMantissaBits), true);
        if (code == 0) return kLost;
        if (carrier == kNoCarrier) return code | kTakesSign;
        const uint32_t wanted = shifted_bits(HiF8::decode_bits(static_cast<uint8_t>(code)), carrier);
        const uint32_t carried = E4M3::encode_bits(wanted, true);
        const bool held = E4M3::decode_bits(static_cast<uint8_t>(carried)) == wanted;
        return carried | kTakesSign | (held ? 0 : kLost);
    }

    __device__ __forceinline__ uint32_t one(float y) const {
        const uint32_t down = bits_from_float(__fmul_rn(y, 0x1p-102f));
        return table[down >> (kMantissaBits - kBits) & 0x3FF];  // without the sign
    }

    struct Four {
        uint32_t lost, found[4];
        __device__ __forceinline__ bool is_lost(int i) const { return found[i] & kLost; }
    };

    __device__ __forceinline__ uint32_t four(const float* y, uint32_t signs, Four& seen) const {
        uint32_t (&found)[4] = seen.found;
#pragma unroll
        for (int i = 0; i < 4; ++i) found[i] = one(y[i]);
        seen.lost = (found[0] | found[1] | found[2] | found[3]) & kLost;
        const uint32_t low = __byte_perm(found[0], found[1], 0x5410), high = __byte_perm(found[2], found[3], 0x5410);
        return __byte_perm(low, high, 0x6420) | (signs & __byte_perm(low, high, 0x7531));
    }
};

// ---- a group of numbers ---------------------------------------------------------------------------------------------

template <int kCount>
__device__ __forceinline__ float largest(const float (&x)[kCount]) {
    float most = fabsf(x[0]);
#pragma unroll
    for (int i = 1; i < kCount; ++i) most = ptx::max_nan(most, fabsf(x[i]));
    return most;
}

// The top bits of four numbers, one in each byte.
__device__ __forceinline__ uint32_t signs_of(const float* x) {
    const uint32_t low = __byte_perm(bits_from_float(x[0]), bits_from_float(x[1]), 0x0073);
    const uint32_t high = __byte_perm(bits_from_float(x[2]), bits_from_float(x[3]), 0x0073);
    return __byte_perm(low, high, 0x5410) & 0x80808080u;
}

// Codes of numbers whose largest lies below d.limit; kTurns is 1 where x came from bf16 or fp16, else 2.
template <int kTurns, class Encode, int kCount>
__device__ __forceinline__ void encode_fast(const float (&x)[kCount], const uint32_t (&signs)[kCount / 4],
                                            const Divisor& d, const Encode& encode, uint32_t (&codes)[kCount / 4],
                                            Tally& tally) {
    typename Encode::Four seen[kCount / 4];
    uint32_t lost = 0;
#pragma unroll
    for (int w = 0; w < kCount / 4; ++w) {
        float y[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) y[i] = quotient<kTurns>(x[4 * w + i], d);
        codes[w] = encode.four(y, signs[w], seen[w]);
        lost |= seen[w].lost;
    }
    if (lost == 0) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) tally.flushed += seen[i / 4].is_lost(i % 4) && x[i] != 0.0f;  // zeros are kept
}

}  // namespace fp8kernels
