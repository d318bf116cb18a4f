// quantize in plain C++: one number at a time by the scalar encoders of csrc/formats.
#include "formats/fp8.h"
#include "formats/hif8.h"
#include "formats/inputs.h"
#include "quantize/driver.h"

namespace fp8kernels {
namespace {

struct Fp32 {
    using T = float;
    static float widen(T x) { return x; }
};

struct Bf16 {
    using T = uint16_t;
    static float widen(T x) { return float_from_bf16(x); }
};

struct Fp16 {
    using T = uint16_t;
    static float widen(T x) { return float_from_fp16(x); }
};

template <class Input, class Fmt>
struct Kernel {
    using T = typename Input::T;
    static float widen(T x) { return Input::widen(x); }

    static void finish(bool) {}

    static uint32_t amax(const T* x, int64_t n) {
        uint32_t most = 0;
        for (int64_t i = 0; i < n; ++i) {
            const uint32_t bits = bits_from_float(widen(x[i])) & kMagnitude;
            most = bits > most ? bits : most;
        }
        return most;
    }

    static void encode(const T* x, uint8_t* codes, int64_t n, const BlockScale& block, bool, Tally& tally) {
        for (int64_t i = 0; i < n; ++i) {
            const float value = widen(x[i]);
            const uint32_t size = bits_from_float(value) & kMagnitude;
            const uint32_t y = bits_from_float(value / block.scale);
            const uint8_t code = Fmt::encode_bits(y, block.saturate);
            const bool is_nan = (y & kMagnitude) > kInfBits;
            tally.raise(size);
            tally.saturated += !is_nan && (y & kMagnitude) >= Fmt::kOverflowBits;
            tally.flushed += (code & 0x7F) == 0 && !is_nan && size != 0 && size < kInfBits;
            tally.nonfinite += size >= kInfBits;
            codes[i] = code;
        }
    }
};

}  // namespace

void quantize_portable(const QuantizeArgs& args) {
    switch (args.fmt) {
        case FormatId::hif8: return run_format<Kernel, Fp32, Bf16, Fp16, HiF8>(args);
        case FormatId::e4m3: return run_format<Kernel, Fp32, Bf16, Fp16, E4M3>(args);
        case FormatId::e5m2: return run_format<Kernel, Fp32, Bf16, Fp16, E5M2>(args);
    }
}

}  // namespace fp8kernels
