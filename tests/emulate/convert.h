// What csrc/cuda/convert.cuh does, on the host. What NaN becomes is not told apart.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "formats/inputs.h"

namespace fp8kernels::ptx {

inline float max_nan(float a, float b) {
    if (std::isnan(a) || std::isnan(b)) return float_from_bits(0x7FFFFFFFu);
    return a > b ? a : b;
}

inline void floats_from_fp16(uint32_t two, float& first, float& second) {
    first = float_from_fp16(static_cast<uint16_t>(two));
    second = float_from_fp16(static_cast<uint16_t>(two >> 16));
}

inline uint32_t bf16_from_floats(float first, float second) {
    return bf16_from_float(first) | static_cast<uint32_t>(bf16_from_float(second)) << 16;
}

inline uint32_t fp16_from_floats(float first, float second) {
    return fp16_from_float(first) | static_cast<uint32_t>(fp16_from_float(second)) << 16;
}

inline void forget(unsigned&) {}
inline void forget(uint4&) {}

}  // namespace fp8kernels::ptx
