// dequantize with AVX-512 (F, BW, VBMI): 64 codes a turn.
//
// A table of 256 words is kept in registers as two tables of 256 bytes, each in four vectors. vpermi2b looks 64 codes
// up in two of them (128 bytes) at once; the code's top bit says which pair counts. Every value of every format is
// exact in bf16, so one such look-up decodes for all output types.
#include <immintrin.h>

#include "dequantize/driver.h"
#include "formats/inputs.h"

namespace fp8kernels {
namespace {

constexpr int64_t kGroup = 64;

__mmask64 first(int64_t n) { return n >= kGroup ? ~0ull : (1ull << n) - 1; }

struct Codes {
    __m512i bytes;  // in the order that makes unpacking give neighbours
    __mmask64 upper;
};

// Within each 128-bit lane, unpacking takes the lower 8 bytes for one result and the upper 8 for the other: codes are
// arranged so that the first result holds elements 0 .. 31 and the second 32 .. 63.
Codes arrange(__m512i codes) {
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    const __m512i bytes = _mm512_permutexvar_epi64(order, codes);
    return {bytes, _mm512_movepi8_mask(bytes)};
}

struct ByteTable {
    __m512i at[4];

    __m512i look_up(const Codes& codes) const {
        const __m512i lower = _mm512_permutex2var_epi8(at[0], codes.bytes, at[1]);
        const __m512i upper = _mm512_permutex2var_epi8(at[2], codes.bytes, at[3]);
        return _mm512_mask_blend_epi8(codes.upper, lower, upper);
    }
};

struct WordTable {
    ByteTable low, high;

    explicit WordTable(const uint16_t* words) {
        const __m512i even = _mm512_set1_epi16(0x00FF);
        const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);  // undoes the lanes of packing
        for (int i = 0; i < 4; ++i) {
            const __m512i a = _mm512_loadu_si512(words + 64 * i), b = _mm512_loadu_si512(words + 64 * i + 32);
            const auto pack = [&](__m512i x, __m512i y) {
                return _mm512_permutexvar_epi64(order, _mm512_packus_epi16(x, y));
            };
            low.at[i] = pack(_mm512_and_si512(a, even), _mm512_and_si512(b, even));
            high.at[i] = pack(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8));
        }
    }

    // The words of elements 0 .. 31 and 32 .. 63.
    void look_up(__m512i codes, __m512i& words0, __m512i& words1) const {
        const Codes arranged = arrange(codes);
        const __m512i lows = low.look_up(arranged), highs = high.look_up(arranged);
        words0 = _mm512_unpacklo_epi8(lows, highs);
        words1 = _mm512_unpackhi_epi8(lows, highs);
    }
};

void store(void* to, __m512i value, bool stream) {
    if (stream) {
        _mm512_stream_si512(static_cast<__m512i*>(to), value);
    } else {
        _mm512_storeu_si512(to, value);
    }
}

bool aligned(const void* to) { return (reinterpret_cast<uintptr_t>(to) & 63) == 0; }

// ---- outputs: 32 words of bf16 values, and a scale, to 32 elements of out -------------------------------------------

struct ToBf16 {
    using T = uint16_t;
    static T narrow(float x) { return bf16_from_float(x); }
    static __m512i round(__m512 x) {  // the rounded number is in the upper half of each lane
        const __m512i bits = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
        return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    }
    static void product(__m512i words, __m512 scale, __m512i out[1]) {
        const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
        const __m512 odd =
            _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
        const __m512i low = _mm512_srli_epi32(round(_mm512_mul_ps(even, scale)), 16);
        out[0] = _mm512_mask_blend_epi16(0xAAAAAAAAu, low, round(_mm512_mul_ps(odd, scale)));
    }
};

__m512 widen(__m256i words) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16)); }
__m512 widen_low(__m512i words) { return widen(_mm512_castsi512_si256(words)); }
__m512 widen_high(__m512i words) { return widen(_mm512_extracti64x4_epi64(words, 1)); }

struct ToFp16 {
    using T = uint16_t;
    static T narrow(float x) { return fp16_from_float(x); }
    static void product(__m512i words, __m512 scale, __m512i out[1]) {
        const __m256i low = _mm512_cvtps_ph(_mm512_mul_ps(widen_low(words), scale), _MM_FROUND_TO_NEAREST_INT);
        const __m256i high = _mm512_cvtps_ph(_mm512_mul_ps(widen_high(words), scale), _MM_FROUND_TO_NEAREST_INT);
        out[0] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }
};

struct ToFp32 {
    using T = float;
    static T narrow(float x) { return x; }
    static void product(__m512i words, __m512 scale, __m512i out[2]) {
        out[0] = _mm512_castps_si512(_mm512_mul_ps(widen_low(words), scale));
        out[1] = _mm512_castps_si512(_mm512_mul_ps(widen_high(words), scale));
    }
};

template <class To>
struct Kernel {
    using T = typename To::T;
    static constexpr int kVectors = sizeof(T) / 2;        // that 32 elements take
    static constexpr int64_t kElements = 64 / sizeof(T);  // in a vector

    static constexpr bool kLooksUp = kVectors == 1;  // a table of 256 fp32 numbers would need 16 vectors

    static T narrow(float x) { return To::narrow(x); }

    struct Values : WordTable {
        explicit Values(FormatId fmt) : WordTable(decode_table_bf16(fmt)) {}
    };

    static void multiply(const uint8_t* codes, T* out, int64_t n, float scale, const Values& values, bool stream) {
        const __m512 scales = _mm512_set1_ps(scale);
        stream = stream && aligned(out);
        const auto group = [&](__m512i bytes, __m512i result[2 * kVectors]) {
            __m512i words[2];
            values.look_up(bytes, words[0], words[1]);
            for (int half = 0; half < 2; ++half) To::product(words[half], scales, result + half * kVectors);
        };
        int64_t i = 0;
        for (; i + kGroup <= n; i += kGroup) {
            __m512i result[2 * kVectors];
            group(_mm512_loadu_si512(codes + i), result);
            for (int v = 0; v < 2 * kVectors; ++v) store(out + i + v * kElements, result[v], stream);
        }
        if (i < n) {
            alignas(64) T rest[kGroup];
            group(_mm512_maskz_loadu_epi8(first(n - i), codes + i), reinterpret_cast<__m512i*>(rest));
            for (int64_t j = 0; j < n - i; ++j) out[i + j] = rest[j];
        }
    }

    static void look_up(const uint8_t* codes, T* out, int64_t n, const T* products, bool stream) {
        if constexpr (kLooksUp) {
            const WordTable table(products);
            stream = stream && aligned(out);
            int64_t i = 0;
            for (; i + kGroup <= n; i += kGroup) {
                __m512i words[2];
                table.look_up(_mm512_loadu_si512(codes + i), words[0], words[1]);
                store(out + i, words[0], stream);
                store(out + i + 32, words[1], stream);
            }
            for (; i < n; ++i) out[i] = products[codes[i]];
        }
    }

    static void finish(bool stream) {
        if (stream) _mm_sfence();
    }
};

}  // namespace

void dequantize_avx512(const DequantizeArgs& args) {
    switch (args.type) {
        case OutputType::fp32: return run<Kernel<ToFp32>>(args);
        case OutputType::bf16: return run<Kernel<ToBf16>>(args);
        case OutputType::fp16: return run<Kernel<ToFp16>>(args);
    }
}

}  // namespace fp8kernels
