// quantize with AVX2, FMA and F16C: eight elements a turn, in lanes of fp32, by true division.
//
// What is saturated, flushed or not finite is counted from comparison masks on the way; there is no second path.
#include <immintrin.h>

#include <cstring>

#include "formats/fp8.h"
#include "formats/hif8.h"
#include "formats/inputs.h"
#include "quantize/driver.h"

namespace fp8kernels {
namespace {

constexpr int64_t kLanes = 8;

__m256i splat(uint32_t value) { return _mm256_set1_epi32(static_cast<int>(value)); }
__m256i as_int(__m256 x) { return _mm256_castps_si256(x); }
__m256 as_float(__m256i x) { return _mm256_castsi256_ps(x); }
int64_t count(__m256i mask) {  // lanes that are all ones
    return __builtin_popcount(static_cast<unsigned>(_mm256_movemask_ps(as_float(mask))));
}

struct Fp32 {
    using T = float;
    static float widen(T x) { return x; }
    static __m256 load(const T* x) { return _mm256_loadu_ps(x); }
};

struct Bf16 {
    using T = uint16_t;
    static float widen(T x) { return float_from_bf16(x); }
    static __m256 load(const T* x) {
        const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
        return as_float(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
    }
};

struct Fp16 {
    using T = uint16_t;
    static float widen(T x) { return float_from_fp16(x); }
    static __m256 load(const T* x) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))); }
};

// ---- formats: magnitudes of at most the largest value to codes, one in each lane ------------------------------------

// HiF8: what depends on the exponent e is looked up by |e| in tables of 16 bytes; beyond |e| = 15 all of them give 0.
struct ByteTable {
    alignas(16) uint8_t at[16];
    __m256i look_up(__m256i size) const {  // size in 0 .. 127, one in each lane
        const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(at)));
        // an index of 128 and more gives 0: so do the upper three bytes of a lane, and a size of 16 and more
        return _mm256_shuffle_epi8(table, _mm256_adds_epu8(size, splat(0x80808070u)));
    }
};

struct HiF8Tables {
    ByteTable kept{}, first{}, negative{};
    constexpr HiF8Tables() {
        for (int e = 0; e < 16; ++e) {
            kept.at[e] = static_cast<uint8_t>(HiF8::mantissa_bits(e));
            first.at[e] = HiF8::first_code(e);
            negative.at[e] = static_cast<uint8_t>(HiF8::first_code(-e) - HiF8::first_code(e));
        }
    }
};

struct EncodeHiF8 {
    using Fmt = HiF8;
    static constexpr HiF8Tables kTables{};

    static __m256i codes(__m256 y) {
        const __m256i bias = splat(kBias), smallest = splat(fp32_bits(HiF8::kSmallestExponent - 1));
        const __m256i bits = _mm256_max_epi32(as_int(y), smallest);
        __m256i e = _mm256_sub_epi32(_mm256_srli_epi32(bits, kMantissaBits), bias);
        __m256i kept = kTables.kept.look_up(_mm256_abs_epi32(e));
        __m256i half = _mm256_srlv_epi32(splat(1u << (kMantissaBits - 1)), kept);
        // at e = -23 everything rounds up: twice the half step
        const __m256i last = _mm256_cmpeq_epi32(e, splat(static_cast<uint32_t>(HiF8::kSmallestExponent - 1)));
        half = _mm256_sllv_epi32(half, _mm256_srli_epi32(last, 31));
        const __m256i rounded = _mm256_add_epi32(bits, half);
        e = _mm256_sub_epi32(_mm256_srli_epi32(rounded, kMantissaBits), bias);
        const __m256i size = _mm256_abs_epi32(e), below_zero = _mm256_srai_epi32(e, 31);
        kept = kTables.kept.look_up(size);
        __m256i first =
            _mm256_add_epi32(kTables.first.look_up(size), _mm256_and_si256(below_zero, kTables.negative.look_up(size)));
        const __m256i denormal = _mm256_cmpgt_epi32(splat(static_cast<uint32_t>(-15)), e);
        first = _mm256_blendv_epi8(first, _mm256_add_epi32(e, splat(23)), denormal);
        const __m256i mantissa =
            _mm256_srlv_epi32(_mm256_and_si256(rounded, splat(0x7FFFFF)), _mm256_sub_epi32(splat(kMantissaBits), kept));
        const __m256i flushed = _mm256_cmpgt_epi32(smallest, as_int(y));
        return _mm256_andnot_si256(flushed, _mm256_add_epi32(first, mantissa));
    }
};

// E4M3 and E5M2: the adder rounds, as in quantize_avx512.cpp.
template <class Format>
struct EncodeFp8 {
    using Fmt = Format;
    static __m256i codes(__m256 y) {
        const __m256i lowest = splat(fp32_bits(Fmt::kMinExponent));
        const __m256i exponent = _mm256_max_epi32(_mm256_and_si256(as_int(y), splat(kInfBits)), lowest);
        const __m256i large = _mm256_add_epi32(exponent, splat((kMantissaBits - Fmt::kMantissa) << kMantissaBits));
        const __m256i steps = _mm256_sub_epi32(as_int(_mm256_add_ps(y, as_float(large))), large);
        const __m256i binade = _mm256_srli_epi32(_mm256_sub_epi32(exponent, lowest), kMantissaBits - Fmt::kMantissa);
        return _mm256_add_epi32(binade, steps);
    }
};

// ---- the kernel -----------------------------------------------------------------------------------------------------

template <class Input, class Encode>
struct Kernel {
    using T = typename Input::T;
    using Fmt = typename Encode::Fmt;
    static float widen(T x) { return Input::widen(x); }

    static uint32_t largest(__m256i most) {
        uint32_t lanes[kLanes], out = 0;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), most);
        for (uint32_t lane : lanes) out = lane > out ? lane : out;
        return out;
    }

    static void finish(bool) {}

    static uint32_t amax(const T* x, int64_t n) {
        __m256i most = _mm256_setzero_si256();
        for (int64_t i = 0; i < n; i += kLanes) {
            most = _mm256_max_epu32(most, _mm256_and_si256(as_int(load(x + i, n - i)), splat(kMagnitude)));
        }
        return largest(most);
    }

    // Eight elements, or the n that are left and zeros.
    static __m256 load(const T* x, int64_t n) {
        if (n >= kLanes) return Input::load(x);
        T padded[kLanes] = {};
        std::memcpy(padded, x, static_cast<size_t>(n) * sizeof(T));
        return Input::load(padded);
    }

    static __m256i encode(__m256 x, const BlockScale& block, Tally& tally) {
        const __m256i size = _mm256_and_si256(as_int(x), splat(kMagnitude));
        const __m256 y = _mm256_div_ps(as_float(size), _mm256_set1_ps(block.scale));
        const __m256i overflow = as_int(_mm256_cmp_ps(y, as_float(splat(Fmt::kOverflowBits)), _CMP_GE_OQ));
        const __m256i nan = as_int(_mm256_cmp_ps(y, y, _CMP_UNORD_Q));
        const __m256i nonfinite = _mm256_cmpgt_epi32(size, splat(kInfBits - 1));
        const __m256i zero = _mm256_setzero_si256();
        __m256i codes =
            Encode::codes(_mm256_min_ps(y, as_float(splat(Fmt::kMaxBits))));  // NaN becomes the largest, for now
        const __m256i is_zero = _mm256_cmpeq_epi32(codes, zero);
        const __m256i silent = _mm256_or_si256(_mm256_cmpeq_epi32(size, zero), nonfinite);
        tally.saturated += count(overflow);
        tally.flushed += count(_mm256_andnot_si256(silent, is_zero));
        tally.nonfinite += count(nonfinite);
        __m256i nan_code = nan;
        if (!block.saturate) {
            codes = _mm256_blendv_epi8(codes, splat(Fmt::kInfCode), overflow);
            if (Fmt::kInfCode == Fmt::kNanCode) nan_code = _mm256_or_si256(nan, overflow);  // a NaN has no sign
        }
        __m256i sign = _mm256_and_si256(_mm256_srli_epi32(as_int(x), 24), splat(0x80));
        if (!Fmt::kNegativeZero) sign = _mm256_andnot_si256(is_zero, sign);
        return _mm256_blendv_epi8(_mm256_or_si256(codes, sign), splat(Fmt::kNanCode), nan_code);
    }

    static void encode(const T* x, uint8_t* codes, int64_t n, const BlockScale& block, bool, Tally& tally) {
        __m256i most = _mm256_setzero_si256();
        for (int64_t i = 0; i < n; i += kLanes) {
            const __m256 value = load(x + i, n - i);
            most = _mm256_max_epu32(most, _mm256_and_si256(as_int(value), splat(kMagnitude)));
            const __m256i lanes = encode(value, block, tally);
            const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
            const auto bytes = static_cast<uint64_t>(_mm_cvtsi128_si64(_mm_packus_epi16(words, words)));
            std::memcpy(codes + i, &bytes, static_cast<size_t>(n - i < kLanes ? n - i : kLanes));
        }
        tally.raise(largest(most));
    }
};

}  // namespace

void quantize_avx2(const QuantizeArgs& args) {
    switch (args.fmt) {
        case FormatId::hif8: return run_format<Kernel, Fp32, Bf16, Fp16, EncodeHiF8>(args);
        case FormatId::e4m3: return run_format<Kernel, Fp32, Bf16, Fp16, EncodeFp8<E4M3>>(args);
        case FormatId::e5m2: return run_format<Kernel, Fp32, Bf16, Fp16, EncodeFp8<E5M2>>(args);
    }
}

}  // namespace fp8kernels
