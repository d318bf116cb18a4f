// dequantize in plain C++. A look-up a code is what the processor's two load ports do best: AVX2 would not be faster.
#include "dequantize/driver.h"
#include "formats/inputs.h"

namespace fp8kernels {
namespace {

template <class Element, Element (*kNarrow)(float)>
struct Kernel {
    using T = Element;
    static constexpr bool kLooksUp = true;
    static T narrow(float x) { return kNarrow(x); }

    struct Values {
        const float* of;
        explicit Values(FormatId fmt) : of(decode_table(fmt)) {}
    };

    static void multiply(const uint8_t* codes, T* out, int64_t n, float scale, const Values& values, bool) {
        for (int64_t i = 0; i < n; ++i) out[i] = narrow(values.of[codes[i]] * scale);
    }

    static void look_up(const uint8_t* codes, T* out, int64_t n, const T* products, bool) {
        for (int64_t i = 0; i < n; ++i) out[i] = products[codes[i]];
    }

    static void finish(bool) {}
};

float same(float x) { return x; }

}  // namespace

void dequantize_portable(const DequantizeArgs& args) {
    switch (args.type) {
        case OutputType::fp32: return run<Kernel<float, same>>(args);
        case OutputType::bf16: return run<Kernel<uint16_t, bf16_from_float>>(args);
        case OutputType::fp16: return run<Kernel<uint16_t, fp16_from_float>>(args);
    }
}

}  // namespace fp8kernels
