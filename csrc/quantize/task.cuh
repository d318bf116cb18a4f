// What the kernels of quantize.cu are told, and the vectors that they put aside.
#pragma once

#include "cuda/launch.cuh"
#include "quantize/inputs.cuh"
#include "quantize/quantize_cuda.h"
#include "quantize/report.cuh"
#include "quantize/scaling.cuh"
#include "quantize/tiles.cuh"

namespace fp8kernels {
namespace {

struct Task : Scaling {
    const void* x;
    uint8_t* codes;
    uint8_t* codes_t;  // or null: not written on the way
    const float* scale_in;
    float* scale_out;
    float* amax;
    Tiling tiling;
    bool prepared;  // scale_out is known, and blocks are larger than tiles
    Report report;
};

__device__ inline bool is_finite(float size) { return size < float_from_bits(kInfBits); }

// Some vectors of a thread are not held in registers, but read element by element where they are needed: those that the
// fast path does not take, and those at a ragged edge or off alignment. A bit each says which; `Vectors` knows where
// they are: left(i), elements; x(i), codes(i), pointers; note(i, element, code).
template <class Input, class Vectors>
__device__ inline float largest_aside(unsigned aside, const Vectors& at, bool finite_only) {
    float most = 0.0f;
#pragma unroll 1
    for (; aside; aside &= aside - 1) {
        const int i = __ffs(aside) - 1, count = at.left(i);
        const typename Input::T* x = at.x(i);
#pragma unroll 1
        for (int e = 0; e < count; ++e) {
            const float size = fabsf(Input::widen(x[e]));
            if (!finite_only || is_finite(size)) most = ptx::max_nan(most, size);
        }
    }
    return most;
}

template <class Input, class Vectors>
__device__ inline void encode_aside(unsigned aside, const Vectors& at, float scale, const Coding& how, Tally& tally) {
#pragma unroll 1
    for (; aside; aside &= aside - 1) {
        const int i = __ffs(aside) - 1, count = at.left(i);
        const typename Input::T* x = at.x(i);
        uint8_t* codes = at.codes(i);
#pragma unroll 1
        for (int e = 0; e < count; ++e) {
            codes[e] = static_cast<uint8_t>(encode_any(Input::widen(x[e]), scale, how, tally));
            at.note(i, e, codes[e]);
        }
    }
}

}  // namespace
}  // namespace fp8kernels
