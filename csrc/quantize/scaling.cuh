// How a block of numbers gets its scale inside a CUDA kernel.
#pragma once

#include "quantize/encode.cuh"

namespace fp8kernels {

struct Scaling {
    Coding coding;
    float target;
    ScaleRule rule;

    // The scale that a block is divided by, from the one that was given (0: none) and the block's largest finite
    // number.
    __device__ float divides(float given, float finite_amax) const {
        const float scale = given == 0.0f ? scale_from_amax(finite_amax, target, rule) : given;
        return coding.carrier == kNoCarrier ? scale : usable_scale(scale, coding.carrier);
    }

    // The same as what decodes the codes, and back; both are exact.
    __device__ float decodes(float scale) const {
        return coding.carrier == kNoCarrier ? scale : __fmul_rn(scale, carrier_step(coding.carrier));
    }
    __device__ float divides_as(float decoding) const {
        return coding.carrier == kNoCarrier ? decoding
                                            : __fmul_rn(decoding, float_from_bits(fp32_bits(coding.carrier)));
    }
};

}  // namespace fp8kernels
