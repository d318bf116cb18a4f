// quantize with AVX-512 (F, BW, VL, DQ, VBMI): 64 elements a turn.
//
// Two paths. The fast one holds while the chunk's amax says that nothing overflows and nothing is Inf or NaN; it has
// only to round, and to count what became zero. A chunk that turns out otherwise is encoded again by the careful path.
//
// The quotient y = x / scale is the correctly rounded one. For fp32 x it is a division. For bf16 and fp16 x it is
//   r = 1 / scale;  q = x * r;  rem = fma(-q, scale, x);  y = fma(rem, r, q)
// which equals the division for every mantissa of x (8 or 11 bits) and of scale (24 bits): tests/cpp/test_quotient.cpp
// tries all of them. Exponents do not matter while nothing underflows: scale is in [2^-60, 2^100], so rem is exact
// wherever y is not far below the smallest code, and y cannot overflow below the fast path's limit.
#include <immintrin.h>

#include "formats/fp8.h"
#include "formats/hif8.h"
#include "formats/inputs.h"
#include "quantize/driver.h"

namespace fp8kernels {
namespace {

constexpr int64_t kGroup = 64;
constexpr int64_t kChunk = 1024;  // elements between two looks at the amax
constexpr __mmask32 kOdd = 0xAAAAAAAAu;

__m512i splat16(int value) { return _mm512_set1_epi16(static_cast<short>(value)); }
__m512i splat32(uint32_t value) { return _mm512_set1_epi32(static_cast<int>(value)); }
__m512i as_int(__m512 x) { return _mm512_castps_si512(x); }
__m512 as_float(__m512i x) { return _mm512_castsi512_ps(x); }

// The first n of 64 lanes.
__mmask64 first(int64_t n) { return n >= kGroup ? ~0ull : (1ull << n) - 1; }

// Words: the low halves of a's lanes in the even words, those of b's in the odd ones; and the same of the high halves.
__m512i low_halves(__m512i a, __m512i b) { return _mm512_mask_blend_epi16(kOdd, a, _mm512_slli_epi32(b, 16)); }
__m512i high_halves(__m512i a, __m512i b) { return _mm512_mask_blend_epi16(kOdd, _mm512_srli_epi32(a, 16), b); }

uint32_t largest_word(__m512i words) {  // 16 bits, unsigned
    const __m512i even = _mm512_and_si512(words, splat32(0xFFFF)), odd = _mm512_srli_epi32(words, 16);
    return _mm512_reduce_max_epu32(_mm512_max_epu32(even, odd));
}

// ---- inputs: 64 elements as four vectors of fp32 magnitudes, in pairs (a, b), and what is asked about them ----------

// Pairs from 16-bit words are the even and the odd words, or the lower and the upper half of the vector; codes come out
// of an encoder as words in the pair's order: a's in the even words. `first_byte(i)` says where code i then lies.
struct EvenOdd {
    static constexpr uint8_t place(int i) { return static_cast<uint8_t>(2 * i); }
    static uint32_t order(uint32_t a, uint32_t b) { return _pdep_u32(a, 0x55555555u) | _pdep_u32(b, kOdd); }
};

struct LowHigh {
    static constexpr uint8_t place(int i) { return static_cast<uint8_t>(i / 32 * 64 + i % 16 * 4 + i % 32 / 16 * 2); }
    static uint32_t order(uint32_t a, uint32_t b) { return a | b << 16; }
};

struct alignas(64) ByteIndex {
    uint8_t at[64];
};

template <class Order>
constexpr ByteIndex pack_index(int offset) {
    ByteIndex index{};
    for (int i = 0; i < 64; ++i) index.at[i] = static_cast<uint8_t>(Order::place(i) + offset);
    return index;
}

// Byte `offset` of each word of two vectors, in element order.
template <class Order, int offset>
__m512i pack(__m512i words0, __m512i words1) {
    static constexpr ByteIndex index = pack_index<Order>(offset);
    return _mm512_permutex2var_epi8(words0, _mm512_load_si512(&index), words1);
}

// What bf16 and fp16 have in common: 64 elements are two vectors of words.
template <uint16_t kInf>
struct Words {
    using T = uint16_t;
    struct Group {
        __m512i w[2];
    };
    static Group load(const T* x) { return {{_mm512_loadu_si512(x), _mm512_loadu_si512(x + 32)}}; }
    static Group load(const T* x, __mmask64 lanes) {
        return {{_mm512_maskz_loadu_epi16(static_cast<__mmask32>(lanes), x),
                 _mm512_maskz_loadu_epi16(static_cast<__mmask32>(lanes >> 32), x + 32)}};
    }
    static __m512i magnitude(__m512i w) { return _mm512_and_si512(w, splat16(0x7FFF)); }
    static __m512i raise(__m512i most, const Group& g) {
        return _mm512_max_epu16(most, _mm512_max_epu16(magnitude(g.w[0]), magnitude(g.w[1])));
    }
    static __mmask64 nonzero(const Group& g) {
        const __m512i bits = splat16(0x7FFF);
        return _mm512_kunpackd(_mm512_test_epi16_mask(g.w[1], bits), _mm512_test_epi16_mask(g.w[0], bits));
    }
    static __mmask64 nonfinite(const Group& g) {
        const __m512i inf = splat16(kInf);
        return _mm512_kunpackd(_mm512_cmpge_epu16_mask(magnitude(g.w[1]), inf),
                               _mm512_cmpge_epu16_mask(magnitude(g.w[0]), inf));
    }
    static __m512i sign_bytes(const Group& g) { return pack<EvenOdd, 1>(g.w[0], g.w[1]); }
};

struct Bf16 : Words<0x7F80> {
    using Order = EvenOdd;
    static constexpr bool kDivide = false;
    static float widen(T x) { return float_from_bf16(x); }
    static uint32_t finish(__m512i most) { return largest_word(most) << 16; }
    static void magnitudes(const Group& g, int half, __m512& a, __m512& b) {
        a = as_float(_mm512_slli_epi32(magnitude(g.w[half]), 16));
        b = as_float(_mm512_and_si512(g.w[half], splat32(0x7FFF0000)));
    }
};

struct Fp16 : Words<0x7C00> {
    using Order = LowHigh;
    static constexpr bool kDivide = false;
    static float widen(T x) { return float_from_fp16(x); }
    static uint32_t finish(__m512i most) { return bits_from_float(widen(static_cast<T>(largest_word(most)))); }
    static void magnitudes(const Group& g, int half, __m512& a, __m512& b) {
        const __m512i w = magnitude(g.w[half]);
        a = _mm512_cvtph_ps(_mm512_castsi512_si256(w));
        b = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(w, 1));
    }
};

struct Fp32 {
    using T = float;
    using Order = LowHigh;
    static constexpr bool kDivide = true;
    struct Group {
        __m512i w[4];
    };
    static float widen(T x) { return x; }
    static Group load(const T* x) {
        return {{_mm512_loadu_si512(x), _mm512_loadu_si512(x + 16), _mm512_loadu_si512(x + 32),
                 _mm512_loadu_si512(x + 48)}};
    }
    static Group load(const T* x, __mmask64 lanes) {
        Group g;
        for (int i = 0; i < 4; ++i)
            g.w[i] = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(lanes >> 16 * i), x + 16 * i);
        return g;
    }
    static __m512i magnitude(__m512i w) { return _mm512_and_si512(w, splat32(kMagnitude)); }
    static __m512i raise(__m512i most, const Group& g) {
        for (__m512i w : g.w) most = _mm512_max_epu32(most, magnitude(w));
        return most;
    }
    static uint32_t finish(__m512i most) { return _mm512_reduce_max_epu32(most); }
    static __mmask64 nonzero(const Group& g) {
        __mmask64 out = 0;
        for (int i = 3; i >= 0; --i) out = out << 16 | _mm512_test_epi32_mask(g.w[i], splat32(kMagnitude));
        return out;
    }
    static __mmask64 nonfinite(const Group& g) {
        __mmask64 out = 0;
        for (int i = 3; i >= 0; --i) out = out << 16 | _mm512_cmpge_epu32_mask(magnitude(g.w[i]), splat32(kInfBits));
        return out;
    }
    static void magnitudes(const Group& g, int half, __m512& a, __m512& b) {
        a = as_float(magnitude(g.w[2 * half]));
        b = as_float(magnitude(g.w[2 * half + 1]));
    }
    static __m512i sign_bytes(const Group& g) {
        return pack<Order, 1>(high_halves(g.w[0], g.w[1]), high_halves(g.w[2], g.w[3]));
    }
};

// ---- formats: two vectors of magnitudes below overflow to words whose low bytes are the codes -----------------------

struct alignas(64) WordTable {
    uint16_t at[64];
    __m512i look_up(__m512i index) const {  // the low 6 bits of the words of `index` count
        return _mm512_permutex2var_epi16(_mm512_load_si512(at), index, _mm512_load_si512(at + 32));
    }
};

struct HiF8Tables {
    static constexpr int kLow = HiF8::kSmallestExponent - 2;  // stands for everything that is flushed
    WordTable half{}, shift{}, base{};
    constexpr HiF8Tables() {
        for (int e = kLow; e <= HiF8::kLargestExponent; ++e) {
            const int field = e + kBias, at = field & 63, kept = HiF8::mantissa_bits(e);
            const int first = e < HiF8::kSmallestExponent ? 0 : HiF8::first_code(e);
            half.at[at] = static_cast<uint16_t>(e == kLow ? 0 : HiF8::half_step(e) >> 16);
            shift.at[at] = static_cast<uint16_t>(7 - kept);
            base.at[at] = static_cast<uint16_t>(first - (field << kept));
        }
    }
};

// HiF8 rounds ties away from zero: what lies below the half step cannot matter, so the upper 16 bits of y are enough.
// Add the half step of its exponent, look the new exponent up again, cut the mantissa, add where its binade begins.
struct EncodeHiF8 {
    using Fmt = HiF8;
    static constexpr HiF8Tables kTables{};

    static __m512i words(__m512 a, __m512 b) {
        __m512i y = _mm512_max_epu16(high_halves(as_int(a), as_int(b)), splat16(fp32_bits(HiF8Tables::kLow) >> 16));
        y = _mm512_add_epi16(y, kTables.half.look_up(_mm512_srli_epi16(y, 7)));
        const __m512i exponent = _mm512_srli_epi16(y, 7);
        return _mm512_add_epi16(_mm512_srlv_epi16(y, kTables.shift.look_up(exponent)), kTables.base.look_up(exponent));
    }
    static __m512i with_sign(__m512i codes, __m512i signs) {  // zero has none
        const __m512i sign = _mm512_and_si512(signs, _mm512_set1_epi8(-128));
        return _mm512_mask_add_epi8(codes, _mm512_test_epi8_mask(codes, codes), codes, sign);
    }
};

// E4M3 and E5M2: adding 2^(e + 23 - m) makes the adder round y to m mantissa bits of its exponent e, ties to even; the
// low bits of the sum are then y in units of its last kept bit. Below the smallest normal number e stays where it is.
template <class Format>
struct EncodeFp8 {
    using Fmt = Format;
    static constexpr int kExponentAt = 7;  // of an fp32 number cut to its upper 16 bits

    static __m512i words(__m512 a, __m512 b) {
        const __m512i lowest = splat16(fp32_bits(Fmt::kMinExponent) >> 16);
        __m512i exponent = _mm512_and_si512(high_halves(as_int(a), as_int(b)), splat16(0x7F80));
        exponent = _mm512_max_epu16(exponent, lowest);
        const __m512i large = _mm512_add_epi16(exponent, splat16((kMantissaBits - Fmt::kMantissa) << kExponentAt));
        const __m512 sum_a = _mm512_add_ps(a, as_float(_mm512_slli_epi32(large, 16)));
        const __m512 sum_b = _mm512_add_ps(b, as_float(_mm512_and_si512(large, splat32(0xFFFF0000))));
        const __m512i steps = low_halves(as_int(sum_a), as_int(sum_b));
        const __m512i binade = _mm512_srli_epi16(_mm512_sub_epi16(exponent, lowest), kExponentAt - Fmt::kMantissa);
        return _mm512_add_epi16(binade, steps);
    }
    static __m512i with_sign(__m512i codes, __m512i signs) {
        return _mm512_ternarylogic_epi64(codes, signs, _mm512_set1_epi8(-128), 0xF8);  // codes | (signs & 0x80)
    }
};

// ---- the kernel -----------------------------------------------------------------------------------------------------

template <class Input, class Encode>
struct Kernel {
    using T = typename Input::T;
    using Group = typename Input::Group;
    using Order = typename Input::Order;
    using Fmt = typename Encode::Fmt;

    struct Divisor {
        __m512 scale, reciprocal;
    };

    static float widen(T x) { return Input::widen(x); }

    static uint32_t amax(const T* x, int64_t n) {
        __m512i most = _mm512_setzero_si512();
        int64_t i = 0;
        for (; i + kGroup <= n; i += kGroup) most = Input::raise(most, Input::load(x + i));
        if (i < n) most = Input::raise(most, Input::load(x + i, first(n - i)));
        return Input::finish(most);
    }

    static __m512 quotient(__m512 x, const Divisor& d) {
        if (Input::kDivide) return _mm512_div_ps(x, d.scale);
        const __m512 q = _mm512_mul_ps(x, d.reciprocal);
        return _mm512_fmadd_ps(_mm512_fnmadd_ps(q, d.scale, x), d.reciprocal, q);
    }

    static void store(uint8_t* to, __m512i codes, bool stream) {
        if (stream) {
            _mm512_stream_si512(reinterpret_cast<__m512i*>(to), codes);
        } else {
            _mm512_storeu_si512(to, codes);
        }
    }

    // Codes of finite numbers below overflow.
    static __m512i fast(const Group& g, const Divisor& d, int64_t& flushed) {
        __m512i words[2];
        for (int half = 0; half < 2; ++half) {
            __m512 a, b;
            Input::magnitudes(g, half, a, b);
            words[half] = Encode::words(quotient(a, d), quotient(b, d));
        }
        const __m512i codes = pack<Order, 0>(words[0], words[1]);
        const __mmask64 zero = _mm512_testn_epi8_mask(codes, codes);
        if (zero) flushed += _mm_popcnt_u64(zero & Input::nonzero(g));
        return Encode::with_sign(codes, Input::sign_bytes(g));
    }

    // Codes of anything.
    static __m512i careful(const Group& g, const BlockScale& block, Tally& tally) {
        const __m512 scale = _mm512_set1_ps(block.scale);
        const __m512 overflow = as_float(splat32(Fmt::kOverflowBits)), top = as_float(splat32(Fmt::kMaxBits));
        __m512i words[2];
        uint32_t over[2], nan[2];
        for (int half = 0; half < 2; ++half) {
            __m512 a, b;
            Input::magnitudes(g, half, a, b);
            a = _mm512_div_ps(a, scale);
            b = _mm512_div_ps(b, scale);
            over[half] =
                Order::order(_mm512_cmp_ps_mask(a, overflow, _CMP_GE_OQ), _mm512_cmp_ps_mask(b, overflow, _CMP_GE_OQ));
            nan[half] = Order::order(_mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_cmp_ps_mask(b, b, _CMP_UNORD_Q));
            words[half] = Encode::words(_mm512_min_ps(a, top), _mm512_min_ps(b, top));  // NaN becomes top, for now
        }
        const __mmask64 overflows = static_cast<uint64_t>(over[1]) << 32 | over[0];
        __mmask64 nans = static_cast<uint64_t>(nan[1]) << 32 | nan[0];
        __m512i codes = pack<Order, 0>(words[0], words[1]);
        const __mmask64 nonfinite = Input::nonfinite(g);
        tally.flushed += _mm_popcnt_u64(_mm512_testn_epi8_mask(codes, codes) & Input::nonzero(g) & ~nonfinite);
        tally.saturated += _mm_popcnt_u64(overflows);
        tally.nonfinite += _mm_popcnt_u64(nonfinite);
        if (!block.saturate) {
            codes = _mm512_mask_mov_epi8(codes, overflows, _mm512_set1_epi8(static_cast<char>(Fmt::kInfCode)));
            if (Fmt::kInfCode == Fmt::kNanCode) nans |= overflows;  // a NaN has no sign
        }
        codes = Encode::with_sign(codes, Input::sign_bytes(g));
        return _mm512_mask_mov_epi8(codes, nans, _mm512_set1_epi8(static_cast<char>(Fmt::kNanCode)));
    }

    // The smallest amax, as bits, that needs the careful path; a little low is safe.
    static uint32_t limit(float scale) {
        const bool exact =
            Input::kDivide ? scale > 0 && scale <= 0x1.FFFFFEp127f : scale >= 0x1p-60f && scale <= 0x1p100f;
        if (!exact) return 0;
        return bits_from_float(float_from_bits(Fmt::kOverflowBits) * scale * 0.9999f);
    }

    static void encode(const T* x, uint8_t* codes, int64_t n, const BlockScale& block, bool stream, Tally& tally) {
        const uint32_t bound = limit(block.scale);
        const Divisor divisor{_mm512_set1_ps(block.scale), _mm512_set1_ps(1.0f / block.scale)};
        stream = stream && (reinterpret_cast<uintptr_t>(codes) & 63) == 0;
        for (int64_t begin = 0; begin < n; begin += kChunk) {
            const int64_t end = n - begin < kChunk ? n : begin + kChunk;
            uint32_t most = kInfBits;
            int64_t i = begin;
            if (bound > 0) {
                __m512i seen = _mm512_setzero_si512();
                int64_t flushed = 0;
                for (; i + kGroup <= end; i += kGroup) {
                    const Group g = Input::load(x + i);
                    seen = Input::raise(seen, g);
                    store(codes + i, fast(g, divisor, flushed), stream);
                }
                if (i < end) {
                    const Group g = Input::load(x + i, first(end - i));
                    seen = Input::raise(seen, g);
                    _mm512_mask_storeu_epi8(codes + i, first(end - i), fast(g, divisor, flushed));
                }
                most = Input::finish(seen);
                if (most < bound && most < kInfBits) tally.flushed += flushed;
            }
            if (most >= bound || most >= kInfBits) {
                __m512i seen = _mm512_setzero_si512();
                for (i = begin; i < end; i += kGroup) {
                    const __mmask64 lanes = first(end - i);
                    const Group g = Input::load(x + i, lanes);
                    seen = Input::raise(seen, g);
                    _mm512_mask_storeu_epi8(codes + i, lanes, careful(g, block, tally));
                }
                most = Input::finish(seen);
            }
            tally.raise(most);
        }
    }

    static void finish(bool stream) {  // streamed codes are seen by the other threads after this
        if (stream) _mm_sfence();
    }
};

}  // namespace

void quantize_avx512(const QuantizeArgs& args) {
    switch (args.fmt) {
        case FormatId::hif8: return run_format<Kernel, Fp32, Bf16, Fp16, EncodeHiF8>(args);
        case FormatId::e4m3: return run_format<Kernel, Fp32, Bf16, Fp16, EncodeFp8<E4M3>>(args);
        case FormatId::e5m2: return run_format<Kernel, Fp32, Bf16, Fp16, EncodeFp8<E5M2>>(args);
    }
}

}  // namespace fp8kernels
